"""The places of segments in packed rows that they share."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnkeys.backends import layouts

lengths_of_segments = st.lists(st.integers(1, 30), min_size=2, max_size=40).map(np.array)


@given(lengths=lengths_of_segments, data=st.data())
def test_lay_end_to_end_leaves_a_gap_between_segments_of_a_row(lengths, data):
    rows = data.draw(st.integers(1, len(lengths) - 1))
    first = data.draw(st.sets(st.integers(0, len(lengths) - 1), max_size=rows))
    nonzero = np.isin(np.arange(len(lengths)), list(first))
    layout = layouts.lay_end_to_end(lengths, nonzero, rows)
    assert (layout.sizes == rows).all()
    assert not layout.step[nonzero].any()
    for row in range(rows):
        here = np.flatnonzero(layout.row == row)
        here = here[np.argsort(layout.step[here])]
        assert layout.step[here[0]] == 0
        for before, after in pairwise(here.tolist()):
            assert layout.step[after] > layout.step[before] + lengths[before]
        assert layout.step[here[-1]] + lengths[here[-1]] <= len(layout.sizes)


def test_lay_end_to_end_fills_rows_that_fit_exactly():
    lengths = np.array([3, 4, 1, 2, 5])
    layout = layouts.lay_end_to_end(lengths, np.zeros(5, dtype=bool), 3)
    assert layout.sizes.tolist() == [3] * 6


@pytest.mark.parametrize("lengths", [[64] * 4 + [2] * 30, [40, 30, 20, 10] * 5, range(1, 40)])
def test_choose_layout_shares_rows_where_little_of_them_is_padding(lengths):
    of_segments = np.array(lengths)
    layout = layouts.choose_layout(of_segments, 128, np.zeros(len(of_segments), dtype=bool))
    assert layout.step.any()
    assert layout.sizes.sum() < 1.2 * of_segments.sum()


@pytest.mark.parametrize("nonzero", [None, np.ones(200, dtype=bool)])
def test_choose_layout_shares_no_rows_among_segments_with_a_state(nonzero):
    layout = layouts.choose_layout(np.arange(1, 201), 128, nonzero)
    assert not layout.step.any()


def test_choose_layout_shares_no_rows_where_gaps_cost_more_than_calls():
    lengths = np.ones(4000, dtype=int)
    assert not layouts.choose_layout(lengths, 128, np.zeros(4000, dtype=bool)).step.any()


def test_choose_layout_makes_the_number_of_shared_rows_a_multiple_of_eight():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 300)
    layout = layouts.choose_layout(lengths, 128, np.zeros(300, dtype=bool))
    assert layout.step.any() and layout.sizes[0] % 8 == 0
