"""Segments, plans, and the packing of batches into rows."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rnnkeys.backends import packing
from rnnkeys.backends.packing import Plan, Segments, read_segments
from tests.support.problems import FLAGS

in_both_forms = pytest.mark.parametrize("block_rows", [0, 96], ids=["exact", "blocks"])


def plan(is_init: Tensor, block_rows: int = 0) -> Plan:
    return read_segments(is_init).plan(block_rows)


@st.composite
def _flags(draw: st.DrawFn) -> Tensor:
    batch, steps = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    if draw(st.booleans()):
        torch.manual_seed(draw(st.integers(0, 2**16)))
        return torch.rand(batch, steps) < draw(st.sampled_from([0.02, 0.1, 0.5]))
    return FLAGS[draw(st.sampled_from(list(FLAGS)))](batch, steps)


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


@in_both_forms
@given(is_init=_flags())
def test_unpack_after_pack_returns_the_batch(block_rows, is_init):
    made = plan(is_init, block_rows)
    x = _numbered(is_init)
    assert torch.equal(made.unpack(made.pack(x)), x)


@in_both_forms
@given(is_init=_flags())
def test_plan_gives_each_segment_one_row(block_rows, is_init):
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
@given(is_init=_flags())
def test_plan_sizes_fall_and_blocks_cover_all_steps(block_rows, is_init):
    made, lengths = plan(is_init, block_rows), _lengths(is_init)
    assert made.sizes == sorted(made.sizes, reverse=True)
    assert len(made.sizes) == max(lengths.values())
    assert sum(made.sizes) == len(made.source)
    assert [rows for steps, rows in made.blocks for _ in range(steps)] == made.sizes
    assert len(set(made.sizes)) == len(made.blocks)


@given(is_init=_flags())
def test_plan_padding_contains_the_rows_that_no_step_fills(is_init):
    assert not len(plan(is_init).padding)
    assert len(plan(is_init).source) == is_init.numel()
    made = plan(is_init, block_rows=96)
    padding = made.padding.tolist()
    assert sorted([*padding, *made.position.tolist()]) == list(range(len(made.source)))
    assert len(made.blocks) <= len(plan(is_init).blocks)
    assert len(made.source) <= len(made.starts) * len(made.sizes)


def test_blocks_of_one_long_and_many_short_segments_are_two_with_little_padding():
    is_init = torch.ones(64, 100, dtype=torch.bool)
    is_init[0] = False
    made = plan(is_init, block_rows=96)
    assert len(made.source) < 1.05 * is_init.numel()
    assert len(made.blocks) == 2


def test_blocks_of_many_lengths_are_few_with_little_padding():
    is_init = torch.rand(8, 1024) < 0.02
    made = plan(is_init, block_rows=96)
    assert len(made.blocks) < len(plan(is_init).blocks) / 3
    assert len(made.source) < 1.3 * is_init.numel()


def test_plan_of_strided_flags_equals_that_of_contiguous_ones():
    is_init = torch.rand(7, 5) < 0.3
    for view in (is_init.t().contiguous().t(), torch.stack([is_init, ~is_init], -1)[..., 0]):
        both = [Segments(flags.numpy(), flags.device).plan() for flags in (view, is_init)]
        assert _steps(both[0]) == _steps(both[1])


@given(is_init=_flags())
def test_at_starts_returns_the_states_of_the_first_packed_step(is_init):
    made = plan(is_init)
    x = _numbered(is_init)
    assert made.at_starts(x).squeeze(1).tolist() == made.starts.tolist()
    assert torch.equal(made.at_starts(x), made.pack(x)[: made.sizes[0]])


@in_both_forms
@pytest.mark.parametrize("flags", FLAGS)
def test_pack_and_unpack_have_gradients_of_any_order(block_rows, flags):
    made = plan(FLAGS[flags](3, 5), block_rows)
    x = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: Tensor) -> Tensor:
        return made.unpack(made.pack(x).sin())

    torch.autograd.gradcheck(there_and_back, x)
    torch.autograd.gradgradcheck(there_and_back, x)


def test_unpack_gives_padding_zero_gradient_even_for_nan():
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


def test_read_segments_returns_one_plan_for_equal_flags_only():
    is_init = torch.rand(3, 5) < 0.5
    made = plan(is_init)
    assert plan(is_init.clone()) is made
    assert plan(is_init.t().contiguous().t()) is made
    assert plan(is_init, block_rows=96) is not made
    assert plan(is_init.view(5, 3)) is not made
    changed = is_init.clone()
    changed[2, 4] = ~changed[2, 4]
    assert plan(changed) is not made


def test_read_segments_after_flags_change_in_place_plans_again():
    is_init = torch.zeros(2, 6, dtype=torch.bool)
    assert plan(is_init).sizes == [2] * 6
    is_init[0, 4] = True
    assert plan(is_init).sizes == [3, 3, 2, 2, 1, 1]


def test_read_segments_keeps_few_batches_and_plans():
    for steps in range(1, 200):
        plan(torch.zeros(1, steps, dtype=torch.bool))
    assert len(packing._read) <= packing._MOST_BATCHES
    same = torch.zeros(1, 9, dtype=torch.bool)
    for block_rows in range(200):
        plan(same, block_rows)
    assert len(read_segments(same)._plans) <= packing._MOST_PLANS


def test_plan_made_in_inference_mode_serves_training():
    is_init = torch.rand(4, 9) < 0.3
    with torch.inference_mode():
        made = plan(is_init)
    assert plan(is_init) is made
    x = torch.randn(4, 9, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda x: made.unpack(made.pack(x).sin()), x)


class _SlowCache(OrderedDict[Any, Any]):
    """Lets other threads run between finding an entry and using it."""

    def get(self, key: Any, default: Any = None) -> Any:
        found = super().get(key, default)
        time.sleep(1e-4)
        return found


def test_read_segments_from_many_threads_is_right(monkeypatch):
    """Learner and evaluator share plans; one may be dropped while another thread looks it up."""
    monkeypatch.setattr(packing, "_read", _SlowCache())
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
def test_child_forked_while_a_thread_plans_can_plan():
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
