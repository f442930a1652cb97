"""Long rows of short segments inside the operators: fewer steps, and the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rnnkeys.backends import cut_rows, fused_gru, fused_lstm, ops, unroll_layers
from tests.support import problems
from tests.support.problems import FLAGS, TORCHS, WAYS, State, assert_same_run
from tests.support.tolerances import assert_equal

SCAN = WAYS["scan"]
GATES = {"lstm": 4, "gru": 3}
of_both_cells = pytest.mark.parametrize("cell", TORCHS)


@pytest.fixture
def _always_cut(monkeypatch) -> None:
    monkeypatch.setattr(cut_rows, "_LEAST_GAIN", 0)


@pytest.fixture
def steps_run(monkeypatch) -> list[int]:
    """Collect the number of steps of every forward loop."""
    seen: list[int] = []

    def spy(forward: Any) -> Any:
        def run(x: Tensor, *arguments: Any) -> Any:
            seen.append(len(arguments[-3]))
            return forward(x, *arguments)

        return run

    monkeypatch.setattr(fused_lstm, "lstm_forward", spy(fused_lstm.lstm_forward))
    monkeypatch.setattr(fused_gru, "gru_forward", spy(fused_gru.gru_forward))
    return seen


@pytest.mark.parametrize("flags", FLAGS)
@of_both_cells
def test_scan_with_cut_rows_equals_the_reference(cell, flags, _always_cut):
    problem = problems.make(cell, flags, num_layers=2, batch=4, steps=9)
    d_y, d_states = problem.cotangents()
    actual = problems.run(problem, SCAN, d_y, d_states)
    assert_same_run(actual, problems.expect(problem, d_y, d_states), problem.dtype)


@of_both_cells
def test_operator_with_cut_rows_has_the_gradients_of_finite_differences(cell, _always_cut):
    """First states and those of resets at t=0 are apart: the operator reads the former."""
    batch, steps, hidden = 2, 4, 3
    gates, count = GATES[cell] * hidden, len(problems.CELLS[cell][0].state_names)
    parameters = [(gates, 2), (gates, hidden), (gates,), (gates,)]
    shapes = [(batch * steps, 2), *parameters, *[(batch, hidden)] * count]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    resets = [torch.randn(steps, batch, hidden, dtype=torch.float64, requires_grad=True)] * count
    where = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 1]]).bool()

    def states(*given: Tensor) -> State:
        first, reset = given[:-count], given[-count:]
        no_c = [None] * (2 - count)
        return ops.layer(*first, *no_c, [], where, *reset, *no_c, True)[:count]

    assert torch.autograd.gradcheck(states, [*leaves, *resets])


def _episodes(steps: int = 60, length: int = 6) -> Tensor:
    return (torch.arange(steps) % length == 0).unsqueeze(0)


@of_both_cells
def test_scan_of_a_flat_batch_takes_as_many_steps_as_the_longest_episode(cell, steps_run):
    problem = problems.make(cell, _episodes(), batch=1, steps=60)
    y, _ = problems.outputs(problem, SCAN)
    assert steps_run == [6]
    y.sum().backward()


@of_both_cells
def test_scan_without_short_segments_runs_rows_as_they_are(cell, steps_run):
    problems.outputs(problems.make(cell, "two in a row", steps=9), SCAN)
    assert steps_run == [9]


@of_both_cells
def test_scan_of_a_flat_batch_in_vmap_over_data_cuts_each_element(cell, steps_run):
    """As the losses of TD3, which run the root and the next tensordict in one vmap."""
    problem = problems.make(cell, _episodes(), batch=1, steps=60)
    flags = torch.stack([_episodes(), _episodes(length=15)])

    def run(is_init: Tensor) -> Tensor:
        return problems.outputs(problem._replace(is_init=is_init), SCAN)[0]

    together = torch.vmap(run)(flags)
    assert steps_run == [6, 15]
    assert_equal(together, torch.stack([run(one) for one in flags]), problem.dtype)


@of_both_cells
def test_scan_with_cut_rows_equals_the_reference_in_compiled_code(cell, _always_cut):
    problem = problems.make(cell, batch=4, steps=9)
    d_y, d_states = problem.cotangents()
    expected = problems.expect(problem, d_y, d_states)
    one, layers, is_init = problem.cell, problem.layers, problem.is_init

    def run(x: Tensor, *reset_state: Tensor) -> Any:
        return unroll_layers(one, layers, x, reset_state, is_init, SCAN.options, "scan")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y, states = compiled(problem.x, *problem.reset_state)
    leaves = problem.leaves
    grads = torch.autograd.grad([y, *states], list(leaves.values()), [d_y, *d_states])
    actual = expected._replace(y=y, states=states, grads=dict(zip(leaves, grads, strict=True)))
    assert_same_run(actual, expected, problem.dtype)
