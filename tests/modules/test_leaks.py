"""No segment changes another: not in value, not in gradient, and not by a NaN.

Rows, steps and layers share matrix products and buffers in every fast way to run time, so this is
tested bit by bit.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.support import problems
from tests.support.problems import CELLS, WAYS, Problem, Run, State

# Two rows; segments of the first: steps 0-2, 3, 4-8. The one in the middle is a single step.
IS_INIT = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0, 0]]).bool()
SEGMENTS = {"first": (0, 0, 3), "one step": (0, 3, 4), "middle": (0, 4, 9), "last": (1, 5, 9)}
in_every_way = pytest.mark.parametrize(
    ("way", "cell"),
    [
        pytest.param(way, cell, id=f"{way}-{cell}")
        for way in WAYS
        for cell in CELLS
        if WAYS[way].dtypes(cell)
    ],
)
one_segment = pytest.mark.parametrize("name", SEGMENTS)
not_finite = pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])


class Experiment(NamedTuple):
    """A problem with incoming gradients, and where (bool ``[B, T]``) its segment lies."""

    problem: Problem
    d_y: Tensor
    d_states: State
    inside: Tensor

    def run(self, way: str) -> Run:
        return problems.run(self.problem, WAYS[way], self.d_y, self.d_states)


def _experiment(way: str, cell: str, segment: str) -> Experiment:
    problem = problems.for_way(
        way, cell, IS_INIT, dtype=WAYS[way].dtypes(cell)[-1], batch=2, steps=9, num_layers=2
    )
    d_y, d_states = problem.cotangents(WAYS[way].options.state_grad)
    row, start, end = SEGMENTS[segment]
    inside = torch.zeros_like(problem.is_init)
    inside[row, start:end] = True
    return Experiment(problem, d_y, d_states, inside)


def _per_step(result: Run, problem: Problem) -> dict[str, Tensor]:
    """All that belongs to a step: outputs, states, gradients of inputs and stored states."""
    names = problem.cell.state_names
    grads = {name: result.grads[name] for name in ("x", *(f"state {n}" for n in names))}
    states = dict(zip(names, result.states, strict=True))
    return {"y": result.y, **states, **{f"gradient of {k}": v for k, v in grads.items()}}


def _assert_same_outside(experiment: Experiment, clean: Run, dirty: Run) -> None:
    before = _per_step(clean, experiment.problem)
    for name, after in _per_step(dirty, experiment.problem).items():
        outside = ~experiment.inside
        assert before[name].isfinite().all(), f"{name} is not finite to begin with"
        assert torch.equal(after[outside], before[name][outside]), f"{name} changed elsewhere"


def _overwrite(where: Tensor, value: float | None, *tensors: Tensor) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor[where] = torch.randn_like(tensor[where]) if value is None else value


@one_segment
@in_every_way
def test_segments_do_not_affect_each_other(way, cell, name):
    """Bit by bit; the gradients of parameters too, where the loss does not read the segment."""
    experiment = _experiment(way, cell, name)
    problem, inside = experiment.problem, experiment.inside
    for d in (experiment.d_y, *experiment.d_states):
        d[inside] = 0
    clean = experiment.run(way)
    _overwrite(inside, None, problem.x, *problem.reset_state)
    dirty = experiment.run(way)
    assert not torch.equal(dirty.y, clean.y), "the change must be one that can be seen"
    _assert_same_outside(experiment, clean, dirty)
    for parameter, _ in problem.rnn.named_parameters():
        assert torch.equal(dirty.grads[parameter], clean.grads[parameter]), parameter
    assert not dirty.grads["x"][inside].any()


@one_segment
@in_every_way
def test_segment_loss_has_no_gradient_in_others(way, cell, name):
    experiment = _experiment(way, cell, name)
    clean = experiment.run(way)
    _overwrite(experiment.inside, None, experiment.d_y, *experiment.d_states)
    dirty = experiment.run(way)
    assert not torch.equal(dirty.grads["x"], clean.grads["x"])
    _assert_same_outside(experiment, clean, dirty)


@not_finite
@one_segment
@in_every_way
def test_values_not_finite_stay_in_their_segment(way, cell, name, value):
    """In inputs and in the stored state that the segment starts from."""
    experiment = _experiment(way, cell, name)
    clean = experiment.run(way)
    problem = experiment.problem
    _overwrite(experiment.inside, value, problem.x, *problem.reset_state)
    dirty = experiment.run(way)
    assert not dirty.grads["x"][experiment.inside].isfinite().all()
    _assert_same_outside(experiment, clean, dirty)


@not_finite
@one_segment
@in_every_way
def test_gradient_that_is_not_finite_stays_in_its_segment(way, cell, name, value):
    experiment = _experiment(way, cell, name)
    clean = experiment.run(way)
    _overwrite(experiment.inside, value, experiment.d_y)
    dirty = experiment.run(way)
    assert not dirty.grads["x"][experiment.inside].isfinite().all()
    _assert_same_outside(experiment, clean, dirty)


@not_finite
@in_every_way
def test_state_stored_inside_a_segment_is_not_read(way, cell, value):
    """Also for the parameters: a stale state must not get there by zero times NaN."""
    experiment = _experiment(way, cell, "first")
    clean = experiment.run(way)
    stale = ~experiment.problem.is_init
    stale[:, 0] = False
    _overwrite(stale, value, *experiment.problem.reset_state)
    dirty = experiment.run(way)
    _assert_same_outside(experiment._replace(inside=torch.zeros_like(stale)), clean, dirty)
    for name, grad in dirty.grads.items():
        assert torch.equal(grad, clean.grads[name]), name


@not_finite
@in_every_way
def test_stored_state_that_is_not_finite_does_not_pass_a_later_start(way, cell, value):
    """What an episode before diverged to is not carried over, in any layer, forward or backward."""
    experiment = _experiment(way, cell, "first")
    clean = experiment.run(way)
    first = torch.zeros_like(experiment.inside)
    first[0, 0] = True
    _overwrite(first, value, *experiment.problem.reset_state)
    dirty = experiment.run(way)
    _assert_same_outside(experiment, clean, dirty)


@in_every_way
def test_later_steps_change_nothing_before_them(way, cell):
    """Causality inside a segment: outputs and states do not see the future."""
    experiment = _experiment(way, cell, "middle")
    future = experiment.inside.clone()
    future[0, :7] = False
    y, states = problems.outputs(experiment.problem, WAYS[way])
    _overwrite(future, float("nan"), experiment.problem.x)
    y_after, states_after = problems.outputs(experiment.problem, WAYS[way])
    for before, after in zip((y, *states), (y_after, *states_after), strict=True):
        assert torch.equal(before[~future], after[~future])
