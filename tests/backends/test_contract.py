"""Every way to run time keeps one contract: what the reference computes, and every gradient of it.

Cells, backends and shapes are axes. A cell or backend that is added to the tables is tested here
with no further line.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rnnkeys.backends import Options, choose, fused, unroll_layers, why_not
from rnnkeys.cells import GatedCell, Weights
from tests.support import problems
from tests.support.problems import (
    CELLS,
    FLAGS,
    LAYOUTS,
    TORCHS,
    WAYS,
    Problem,
    Run,
    State,
    assert_same_run,
)
from tests.support.tolerances import assert_equal

F64, F32 = torch.float64, torch.float32
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one row": {"batch": 1},
    "one step": {"steps": 1},
    "sizes of one": {"batch": 1, "inputs": 1, "hidden": 1},
    "no bias": {"bias": False},
    "three layers": {"num_layers": 3},
}
CASES = [
    pytest.param(way, cell, dtype, id=f"{way}-{cell}-{str(dtype)[6:]}")
    for way in WAYS
    for cell in CELLS
    for dtype in WAYS[way].dtypes(cell)
]
in_every_way = pytest.mark.parametrize(("way", "cell", "dtype"), CASES)
in_every_way_once = pytest.mark.parametrize(
    ("way", "cell", "dtype"),
    [
        pytest.param(way, cell, dtypes[0], id=f"{way}-{cell}")
        for way in WAYS
        for cell in CELLS
        if (dtypes := WAYS[way].dtypes(cell))
    ],
)
in_every_way_of_torchs_cells = pytest.mark.parametrize(
    ("way", "cell", "dtype"), [case for case in CASES if case.values[1] in TORCHS]
)


def _check(problem: Problem, way: str) -> None:
    d_y, d_states = problem.cotangents(WAYS[way].options.state_grad)
    actual = problems.run(problem, WAYS[way], d_y, d_states)
    assert_same_run(actual, problems.expect(problem, d_y, d_states), problem.dtype)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("shape", SHAPES)
@in_every_way
def test_backend_equals_the_reference(way, cell, dtype, shape, flags):
    sizes = dict(SHAPES[shape])
    for size in sizes.keys() & {"inputs", "hidden"}:
        sizes[size] = max(sizes[size], problems.SMALLEST.get(cell, 1))
    _check(problems.for_way(way, cell, flags, dtype=dtype, **sizes), way)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way].runs("lstm", F32, True)])
def test_backend_with_a_projection_equals_the_reference(way, flags):
    for dtype in WAYS[way].dtypes("lstm"):
        problem = problems.for_way(way, "lstm", flags, dtype=dtype, proj_size=3, num_layers=2)
        _check(problem, way)


@pytest.mark.parametrize("layout", LAYOUTS)
@in_every_way_once
def test_backend_in_any_memory_layout_equals_the_reference(way, cell, dtype, layout):
    problem = problems.for_way(way, cell, dtype=dtype, num_layers=2, layouts=(layout, layout))
    _check(problem, way)


@pytest.mark.parametrize("flags", ["none", "random", "one long among short"])
@in_every_way_once
def test_backend_over_long_time_equals_the_reference(monkeypatch, way, cell, dtype, flags):
    """More steps and rows than are handled at once anywhere."""
    monkeypatch.setattr(fused, "_MOST_ELEMENTS", 1 << 14)
    _check(problems.for_way(way, cell, flags, dtype=dtype, batch=6, steps=160, hidden=48), way)


@st.composite
def _flags(draw: st.DrawFn, batch: int, steps: int) -> Tensor:
    if draw(st.booleans()):
        return FLAGS[draw(st.sampled_from(list(FLAGS)))](batch, steps)
    row = st.lists(st.booleans(), min_size=steps, max_size=steps)
    return torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))


@st.composite
def _problems(draw: st.DrawFn, way: str, cell: str, dtype: torch.dtype) -> Problem:
    # In float32 a gradient of one or two numbers may cancel down to its rounding error.
    smallest = problems.SMALLEST.get(cell, 1) if dtype == F64 else 4
    batch, steps = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    hidden, depth = draw(st.integers(smallest, 6)), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    sizes: dict[str, Any] = {"bias": draw(st.booleans()), "num_layers": depth}
    if hidden > 1 and cell == "lstm" and WAYS[way].runs(cell, dtype, projected=True):
        sizes["proj_size"] = draw(st.sampled_from([0, hidden - 1]))
    layout = st.sampled_from(list(LAYOUTS))
    return problems.for_way(
        way,
        cell,
        draw(_flags(batch, steps)),
        dtype=dtype,
        batch=batch,
        steps=steps,
        inputs=draw(st.integers(smallest, 6)),
        hidden=hidden,
        states=draw(st.sampled_from(["random", "zero"])),
        layouts=(draw(layout), draw(layout)),
        **sizes,
    )


# A quarter of the profile's examples for each of the cells and ways.
@settings(max_examples=settings().max_examples // 4)
@given(data=st.data())
@in_every_way_once
def test_backend_of_any_drawn_problem_equals_the_reference(way, cell, dtype, data):
    _check(data.draw(_problems(way, cell, dtype)), way)


def _by_torchs_kernel(problem: Problem, d_y: Tensor, d_states: State) -> Run:
    """Run torch's own kernel in float64 on segments cut by hand.

    It shows states at segment ends only: there they are compared, and read by the loss.
    """
    rnn = copy.deepcopy(problem.rnn).double()
    x, *stored = (t.detach().double().requires_grad_() for t in (problem.x, *problem.reset_state))
    outputs, loss = torch.zeros_like(d_y, dtype=F64), torch.zeros((), dtype=F64)
    ends = [torch.zeros_like(d, dtype=F64) for d in d_states]
    for b, row in enumerate(problem.is_init.tolist()):
        cuts = [0, *(t for t in range(1, len(row)) if row[t]), len(row)]
        for start, end in pairwise(cuts):
            first = tuple(s[b, start] for s in stored)
            y, last = rnn(x[b, start:end], first if len(first) == 2 else first[0])
            outputs[b, start:end] = y.detach()
            loss = loss + (y * d_y[b, start:end]).sum()
            for k, state in enumerate(last if isinstance(last, tuple) else (last,)):
                ends[k][b, end - 1] = state.detach()
                loss = loss + (state * d_states[k][b, end - 1]).sum()
    loss.backward()
    leaves = problem._replace(rnn=rnn, x=x, reset_state=tuple(stored)).leaves
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return Run(outputs, tuple(ends), grads)


@pytest.mark.parametrize("flags", ["none", "random"])
@in_every_way_of_torchs_cells
def test_backend_equals_torchs_kernel_on_segments_cut_by_hand(way, cell, dtype, flags):
    problem = problems.make(cell, flags, dtype=dtype, num_layers=2)
    is_end = torch.cat([problem.is_init[:, 1:], torch.ones(3, 1, dtype=torch.bool)], 1)
    d_y, d_states = problem.cotangents(WAYS[way].options.state_grad)
    d_states = tuple(d * is_end[:, :, None, None] for d in d_states)
    actual = problems.run(problem, WAYS[way], d_y, d_states)
    at_ends = tuple(s * is_end[:, :, None, None] for s in actual.states)
    expected = _by_torchs_kernel(problem, d_y, d_states)
    assert_same_run(actual._replace(states=at_ends), expected, dtype)


@pytest.mark.parametrize("cut", [1, 3, 6])
@in_every_way_once
def test_backend_over_two_chunks_equals_the_whole(way, cell, dtype, cut):
    problem = problems.for_way(way, cell, "two in a row", dtype=dtype, num_layers=2)
    problem.is_init[:, cut] = False
    whole_y, whole = problems.outputs(problem, WAYS[way])

    def chunk(steps: slice, reset_state: State) -> tuple[Tensor, State]:
        part = problem._replace(
            x=problem.x[:, steps], reset_state=reset_state, is_init=problem.is_init[:, steps]
        )
        return problems.outputs(part, WAYS[way])

    y_1, first = chunk(slice(cut), tuple(s[:, :cut] for s in problem.reset_state))
    carried = [s[:, cut:].clone() for s in problem.reset_state]
    for state, before in zip(carried, first, strict=True):
        state[:, 0] = before[:, -1]
    y_2, second = chunk(slice(cut, None), tuple(carried))
    assert_equal(torch.cat([y_1, y_2], 1), whole_y, dtype, "y")
    for k, state in enumerate(whole):
        assert_equal(torch.cat([first[k], second[k]], 1), state, dtype, f"state {k}")


@in_every_way_once
def test_backend_gradient_does_not_depend_on_what_else_has_one(way, cell, dtype):
    """Frozen layers, a stored state that is learned alone, a bias that is tuned alone."""
    problem = problems.for_way(way, cell, dtype=dtype)
    d_y, d_states = problem.cotangents(WAYS[way].options.state_grad)
    expected = problems.expect(problem, d_y, d_states).grads
    for leaf in problem.leaves.values():
        leaf.requires_grad_(False)
    for name, leaf in problem.leaves.items():
        leaf.requires_grad_(True)
        grads = problems.run(problem, WAYS[way], d_y, d_states).grads
        leaf.requires_grad_(False)
        assert grads.keys() == {name}
        assert_equal(grads[name].cpu(), expected[name], dtype, name)


@in_every_way_once
def test_backend_gradient_may_come_through_one_output_alone(way, cell, dtype):
    problem = problems.for_way(way, cell, dtype=dtype, num_layers=2)
    d_y, d_states = problem.cotangents()
    y, states = problems.outputs(problem, WAYS[way])
    leaves = list(problem.leaves.values())
    for chosen, output in enumerate((y, *states)):
        if not output.requires_grad:
            continue
        cotangents = [d * (i == chosen) for i, d in enumerate((d_y, *d_states))]
        grads = torch.autograd.grad(output, leaves, cotangents[chosen], retain_graph=True)
        expected = problems.expect(problem, cotangents[0], tuple(cotangents[1:])).grads
        for name, grad in zip(problem.leaves, grads, strict=True):
            assert_equal(grad.cpu(), expected[name], dtype, f"{name} through output {chosen}")


class Counter(GatedCell):
    """Adds its input to its state: exact in any dtype, and easy to follow by eye."""

    name = "counter"
    num_gates = 1
    state_names = ("h",)

    def pointwise(self, gates_x: Tensor, gates_h: Tensor, state: State) -> State:
        return (state[0] + gates_x,)


@pytest.mark.parametrize("way", WAYS)
def test_backend_runs_a_custom_cell(way):
    weights = Weights(torch.ones(1, 1), torch.zeros(1, 1))
    obstacle = why_not(WAYS[way].backend, Counter(), weights)
    if obstacle:
        pytest.skip(str(obstacle))
    x = torch.ones(2, 6, 1)
    stored = 10 * torch.arange(12.0).view(2, 6, 1)
    is_init = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]).bool()
    states = (stored.unsqueeze(2),)
    options, backend = WAYS[way].options, WAYS[way].backend
    y, (h,) = unroll_layers(Counter(), [weights], x, states, is_init, options, backend)
    assert y.squeeze(-1).tolist() == [[1, 2, 3, 31, 41, 42], [61, 62, 63, 64, 65, 111]]
    assert torch.equal(h.squeeze(2), y)


@in_every_way_once
def test_backend_states_are_apart_from_outputs_in_memory(way, cell, dtype):
    """An activation applied to the output in place must not change the state that is stored."""
    with torch.no_grad():
        y, states = problems.outputs(problems.for_way(way, cell, dtype=dtype), WAYS[way])
    before = [s.clone() for s in states]
    y.fill_(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))


@in_every_way_once
def test_backend_states_carry_a_gradient_only_if_asked_for(way, cell, dtype):
    problem = problems.for_way(way, cell, dtype=dtype)
    for state_grad in (False, True):
        options = WAYS[way].options._replace(state_grad=state_grad)
        y, states = problems.outputs(problem, WAYS[way]._replace(options=options))
        assert y.requires_grad
        assert [s.requires_grad for s in states] == [state_grad] * len(states)


@in_every_way_once
def test_backend_with_recomputed_activations_changes_no_number_and_keeps_none(way, cell, dtype):
    problem = problems.for_way(way, cell, dtype=dtype, steps=40, num_layers=2)
    d_y, d_states = problem.cotangents(WAYS[way].options.state_grad)
    again = WAYS[way]._replace(options=WAYS[way].options._replace(recompute="full"))
    kept = {}
    for name, one_way in (("none", WAYS[way]), ("full", again)):
        with _count_saved() as saved:
            problems.outputs(problem, one_way)
        kept[name] = sum(saved)
    if way == "triton":  # keeps inputs and states, which others hold anyway, of every layer
        activations = problem.is_init.numel() * sum(4 * w.w_hh.shape[1] for w in problem.layers)
        assert kept["none"] - kept["full"] == activations
    else:
        assert kept["full"] < kept["none"] / 4
    expected = problems.run(problem, WAYS[way], d_y, d_states)
    assert_same_run(problems.run(problem, again, d_y, d_states), expected, dtype)


@contextmanager
def _count_saved() -> Iterator[list[int]]:
    """Collect the sizes of tensors kept for a backward pass."""
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@pytest.mark.parametrize(("batch", "steps"), [(0, 5), (2, 0), (0, 0)])
@in_every_way_once
def test_backend_of_an_empty_batch_returns_empty_outputs_of_the_right_shape(
    way, cell, dtype, batch, steps
):
    sizes: dict[str, Any] = {"batch": batch, "steps": steps, "num_layers": 2}
    if cell == "lstm" and WAYS[way].runs(cell, dtype, projected=True):
        sizes["proj_size"] = 3
    problem = problems.for_way(way, cell, "none", dtype=dtype, **sizes)
    y, states = problems.outputs(problem, WAYS[way])
    assert y.shape == (batch, steps, sizes.get("proj_size", 4))
    assert [s.shape for s in states] == [s.shape for s in problem.reset_state]
    y.sum().backward()  # a learner must not stop at an empty batch


def test_choose_auto_packs_outside_of_transforms():
    plain = Options(native=False)

    def chosen() -> list[str]:
        return [choose("auto", Options()), choose("auto", plain), choose("pad", Options())]

    assert chosen() == ["pad", "loop", "pad"]
    inside = []
    torch.vmap(lambda x: inside.append(chosen()) or x)(torch.zeros(2))
    assert inside == [["scan", "loop", "scan"]]
