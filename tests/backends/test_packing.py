"""Packing is a permutation of steps, planned once per content, and exact in both directions."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rnnkeys.backends import packing
from rnnkeys.backends.packing import Plan, Segments, read_segments
from tests.support import problems
from tests.support.problems import MARKS

in_both_forms = pytest.mark.parametrize("block_rows", [0, 96], ids=["exact", "blocks"])


def plan(is_init: Tensor, block_rows: int = 0, carried: np.ndarray | None = None) -> Plan:
    return read_segments(is_init).plan(block_rows, carried)


@st.composite
def _marks(draw: st.DrawFn) -> Tensor:
    batch, steps = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    if draw(st.booleans()):
        torch.manual_seed(draw(st.integers(0, 2**16)))
        return torch.rand(batch, steps) < draw(st.sampled_from([0.02, 0.1, 0.5]))
    return MARKS[draw(st.sampled_from(list(MARKS)))](batch, steps)


def _lengths(is_init: Tensor) -> dict[int, int]:
    """Lengths of segments by the flat position of their first step, counted by hand."""
    lengths: dict[int, int] = {}
    for b, row in enumerate(is_init.tolist()):
        cuts = [0, *(t for t in range(1, len(row)) if row[t]), len(row)]
        lengths |= {b * len(row) + start: end - start for start, end in pairwise(cuts)}
    return lengths


def _steps(made: Plan) -> list[list[int]]:
    """Which flat position fills each row of each step."""
    return [s.tolist() for s in made.source.split(made.sizes)]


def _numbered(is_init: Tensor) -> Tensor:
    return torch.arange(is_init.numel()).view(*is_init.shape, 1).double()


@st.composite
def _shared(draw: st.DrawFn) -> tuple[Tensor, np.ndarray]:
    """Marks, and which of their segments must be the first of a row."""
    is_init = draw(_marks())
    torch.manual_seed(draw(st.integers(0, 2**16)))
    share = draw(st.sampled_from([0.0, 0.2, 1.0]))
    return is_init, (torch.rand(len(_lengths(is_init))) < share).numpy()


@given(shared=_shared())
def test_segments_that_share_rows_have_gaps_between_them(shared):
    is_init, carried = shared
    made, lengths = plan(is_init, 96, carried), _lengths(is_init)
    assert torch.equal(made.unpack(made.pack(_numbered(is_init))), _numbered(is_init))
    assert sorted(made.starts.tolist()) == sorted(lengths)
    assert made.source[made.start_rows].tolist() == made.starts.tolist()
    assert made.start_rows.tolist() == sorted(made.start_rows.tolist())
    if not made.clears:
        return
    rows = made.sizes[0]
    assert made.sizes == [rows] * len(made.sizes)
    first_of_rows = made.starts[:rows].tolist()
    must = [start for start, one in zip(sorted(lengths), carried, strict=True) if one]
    assert set(must) <= set(first_of_rows)
    padding, gaps = set(made.padding.tolist()), []
    for start, row in zip(made.starts.tolist(), made.start_rows.tolist(), strict=True):
        down = [row + k * rows for k in range(lengths[start])]
        assert made.source[down].tolist() == list(range(start, start + lengths[start]))
        gaps += [row - rows] if row >= rows else []
    assert sorted(gaps) == made.gaps.tolist()
    assert set(gaps) <= padding
    before = made.source[made.padding - rows]
    assert torch.equal(made.source[made.padding], before)  # repeats the segment before it


def test_shared_rows_are_full():
    """Few steps more than the longest segment takes, and little padding."""
    is_init = torch.rand(16, 256) < 0.05
    lengths = _lengths(is_init)
    made = plan(is_init, 96, np.zeros(len(lengths), dtype=bool))
    assert made.clears
    assert len(made.source) < 1.12 * (is_init.numel() + len(lengths))
    assert len(made.sizes) < 1.3 * max(lengths.values())


def test_shared_rows_are_as_short_as_segments_allow():
    """On average hardly longer than if segments could be cut anywhere."""
    excess = []
    for _ in range(40):
        is_init = torch.rand(16, 64) < 0.02
        is_init[:, 0] = True
        lengths = _lengths(is_init)
        made = plan(is_init, 96, np.array(sorted(lengths)) % 64 == 0)
        assert made.clears
        filled = (is_init.numel() + len(lengths)) / made.sizes[0] - 1
        excess.append(len(made.sizes) / max(filled, *lengths.values()))
    assert np.mean(excess) < 1.05


def test_segments_share_rows_only_where_that_is_cheaper():
    none, every = (np.full(192, fill) for fill in (False, True))
    short = torch.zeros(4, 96, dtype=torch.bool)
    short[:, ::2] = True  # gaps would take half as much as the data
    assert not plan(short, 96, none).clears
    assert not plan(short, 96, every).clears


@pytest.mark.parametrize("layout", problems.LAYOUTS)
def test_starts_that_are_not_zero_are_found(layout):
    is_init = torch.tensor([[1, 0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1, 0, 0]]).bool()
    states = torch.zeros(2, 2, 8, 3)  # two states of [2, 8, 3]
    states[0, 0, 3, 1], states[1, 1, 5, 2] = float("nan"), 1e-30
    states[0, 0, 1] = 7.0  # read by nobody
    shown = [problems.LAYOUTS[layout](s) for s in states]
    expected = [True] * 5 if layout == "constant" else [False, True, False, False, True]
    if layout == "constant":
        shown[0] = torch.ones(1, 1, 3).expand(2, 8, 3)
    found = read_segments(is_init).find_carried(shown)
    assert found is not None and found.tolist() == expected
    assert read_segments(torch.zeros(2, 8, dtype=torch.bool)).find_carried(shown) is None
    assert read_segments(torch.ones(2, 8, dtype=torch.bool)).find_carried(shown) is None


@in_both_forms
@given(is_init=_marks())
def test_packing_then_unpacking_is_the_identity(block_rows, is_init):
    made = plan(is_init, block_rows)
    x = _numbered(is_init)
    assert torch.equal(made.unpack(made.pack(x)), x)


@in_both_forms
@given(is_init=_marks())
def test_every_segment_runs_down_one_row_of_its_own(block_rows, is_init):
    made, lengths = plan(is_init, block_rows), _lengths(is_init)
    steps = _steps(made)
    assert sorted(made.starts.tolist()) == sorted(lengths)
    assert made.starts.tolist() == steps[0]
    for row, start in enumerate(steps[0]):
        down = [step[row] for step in steps if row < len(step)]
        last = start + lengths[start] - 1
        assert down == [min(start + t, last) for t in range(len(down))]
        assert len(down) >= lengths[start]


@in_both_forms
@given(is_init=_marks())
def test_steps_never_grow_and_blocks_cover_them(block_rows, is_init):
    made, lengths = plan(is_init, block_rows), _lengths(is_init)
    assert made.sizes == sorted(made.sizes, reverse=True)
    assert len(made.sizes) == max(lengths.values())
    assert sum(made.sizes) == len(made.source)
    assert [n for _, steps, n in made.blocks for _ in range(steps)] == made.sizes
    assert [t for t, *_ in made.blocks] == [made.sizes.index(n) for *_, n in made.blocks]


@given(is_init=_marks())
def test_an_exact_plan_has_no_padding_and_a_plan_in_blocks_says_where_it_is(is_init):
    assert not len(plan(is_init).padding)
    assert len(plan(is_init).source) == is_init.numel()
    made = plan(is_init, block_rows=96)
    padding = made.padding.tolist()
    assert sorted([*padding, *made.position.tolist()]) == list(range(len(made.source)))
    assert len(made.blocks) <= len(plan(is_init).blocks)
    assert len(made.source) <= len(made.starts) * len(made.sizes)


def test_blocks_pad_little_where_one_segment_is_long_and_many_are_short():
    is_init = torch.ones(64, 100, dtype=torch.bool)
    is_init[0] = False
    made = plan(is_init, block_rows=96)
    assert len(made.source) < 1.05 * is_init.numel()
    assert len(made.blocks) == 2


def test_segments_of_many_lengths_run_in_few_blocks():
    is_init = torch.rand(8, 1024) < 0.02
    made = plan(is_init, block_rows=96)
    assert len(made.blocks) < len(plan(is_init).blocks) / 3
    assert len(made.source) < 1.3 * is_init.numel()


def test_marks_may_have_any_strides():
    is_init = torch.rand(7, 5) < 0.3
    for view in (is_init.t().contiguous().t(), torch.stack([is_init, ~is_init], -1)[..., 0]):
        both = [Segments(marks.numpy(), marks.device).plan() for marks in (view, is_init)]
        assert _steps(both[0]) == _steps(both[1])


@given(is_init=_marks())
def test_states_are_taken_at_the_starts_of_segments(is_init):
    made = plan(is_init)
    x = _numbered(is_init)
    assert made.at_starts(x).squeeze(1).tolist() == made.starts.tolist()
    assert torch.equal(made.at_starts(x), made.pack(x)[: made.sizes[0]])


@in_both_forms
@pytest.mark.parametrize("marks", MARKS)
def test_gradients_pass_both_ways_to_any_order(block_rows, marks):
    made = plan(MARKS[marks](3, 5), block_rows)
    x = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: Tensor) -> Tensor:
        return made.unpack(made.pack(x).sin())

    torch.autograd.gradcheck(there_and_back, x)
    torch.autograd.gradgradcheck(there_and_back, x)


def test_no_gradient_reaches_padding_not_even_nan():
    is_init = torch.zeros(20, 30, dtype=torch.bool)
    is_init[:, ::7] = True
    is_init[:, 3::5] = True
    made = plan(is_init, block_rows=96)
    assert len(made.padding)
    rows = torch.zeros(len(made.source), 1, requires_grad=True)
    made.unpack(rows).backward(torch.full((20, 30, 1), float("nan")))
    assert rows.grad is not None
    assert not rows.grad[made.padding].any()
    assert rows.grad.isnan().sum() == is_init.numel()


def test_equal_marks_share_a_plan_and_others_do_not():
    is_init = torch.rand(3, 5) < 0.5
    made = plan(is_init)
    assert plan(is_init.clone()) is made
    assert plan(is_init.t().contiguous().t()) is made
    assert plan(is_init, block_rows=96) is not made
    assert plan(is_init.view(5, 3)) is not made
    changed = is_init.clone()
    changed[2, 4] = ~changed[2, 4]
    assert plan(changed) is not made


def test_marks_changed_in_place_are_planned_anew():
    is_init = torch.zeros(2, 6, dtype=torch.bool)
    assert plan(is_init).sizes == [2] * 6
    is_init[0, 4] = True
    assert plan(is_init).sizes == [3, 3, 2, 2, 1, 1]


def test_plans_kept_are_few():
    for steps in range(1, 200):
        plan(torch.zeros(1, steps, dtype=torch.bool))
    assert len(packing._read) <= packing._MOST_BATCHES
    same = torch.zeros(1, 9, dtype=torch.bool)
    for block_rows in range(200):
        plan(same, block_rows)
    assert len(read_segments(same)._plans) <= packing._MOST_PLANS


def test_a_plan_made_in_inference_mode_serves_training():
    is_init = torch.rand(4, 9) < 0.3
    with torch.inference_mode():
        made = plan(is_init)
    assert plan(is_init) is made
    x = torch.randn(4, 9, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda x: made.unpack(made.pack(x).sin()), x)


class _SlowMemory(OrderedDict[Any, Any]):
    """Gives way to other threads between finding an entry and using it."""

    def get(self, key: Any, default: Any = None) -> Any:
        found = super().get(key, default)
        time.sleep(1e-4)
        return found


def test_threads_may_plan_at_once(monkeypatch):
    """Learner and evaluator share the plans; a plan may be dropped while another is looked for."""
    monkeypatch.setattr(packing, "_read", _SlowMemory())
    masks = [torch.rand(3, 12) < 0.3 for _ in range(packing._MOST_BATCHES + 4)]
    failures: list[Exception] = []

    def work(offset: int) -> None:
        try:
            for i in range(50):
                is_init = masks[(offset * 7 + i) % len(masks)]
                x = _numbered(is_init)
                made = plan(is_init)
                assert torch.equal(made.unpack(made.pack(x)), x)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# Python warns of what is tested.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="This system has no fork.")
def test_a_child_that_is_forked_while_a_thread_plans_can_plan():
    is_taken, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        with packing._lock:
            is_taken.set()
            may_go.wait(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    is_taken.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if packing._lock.acquire(timeout=1) else 1)
    may_go.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert packing._lock.acquire(timeout=1)
    packing._lock.release()
