"""The oracle is checked before it is believed: against torch's kernels and finite differences."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support import reference
from tests.support.tolerances import assert_equal

B, T, I, H = 3, 7, 5, 4
F64 = torch.float64
CELLS = ("lstm", "gru")
SIZES = {  # keyword arguments of nn.LSTM and nn.GRU
    "bias": {},
    "no bias": {"bias": False},
    "three layers": {"num_layers": 3},
}
LSTM_SIZES = {"projection": {"proj_size": 2}, "projected layers": {"proj_size": 2, "num_layers": 2}}
CASES = [(cell, SIZES[size]) for cell in CELLS for size in SIZES] + [
    ("lstm", kwargs) for kwargs in LSTM_SIZES.values()
]
RESETS = {
    "none": [],
    "at 0": [(0, 0), (1, 0)],
    "two in a row": [(0, 3), (0, 4), (2, 1)],
    "at the last step": [(1, T - 1)],
    "everywhere": [(b, t) for b in range(B) for t in range(T)],
}


class Problem(NamedTuple):
    """A torch module, its inputs, and the same thing for the reference."""

    rnn: nn.RNNBase
    x: Tensor
    reset_states: list[tuple[Tensor, ...]]
    is_init: Tensor

    @property
    def cell(self) -> reference.Cell:
        return reference.LSTM() if isinstance(self.rnn, nn.LSTM) else reference.GRU()

    @property
    def parameters(self) -> list[list[Tensor | None]]:
        """Per layer, in the order of ``reference.Weights``."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        layers = range(self.rnn.num_layers)
        return [[getattr(self.rnn, f"{n}_l{i}", None) for n in names] for i in layers]

    def run(self) -> list[reference.Run]:
        weights = []
        for layer in self.parameters:
            arrays: list[Any] = [None if p is None else p.detach().numpy() for p in layer]
            weights.append(reference.Weights(*arrays))
        states = [[s.detach().numpy() for s in layer] for layer in self.reset_states]
        return reference.unroll_layers(
            self.cell, weights, self.x.detach().numpy(), states, self.is_init.numpy()
        )


def _problem(cell: str, resets: str = "none", **kwargs) -> Problem:
    rnn = (nn.LSTM if cell == "lstm" else nn.GRU)(I, H, batch_first=True, dtype=F64, **kwargs)
    sizes = (rnn.proj_size or H, H) if cell == "lstm" else (H,)
    reset_states = [
        tuple(torch.randn(B, T, size, dtype=F64, requires_grad=True) for size in sizes)
        for _ in range(rnn.num_layers)
    ]
    is_init = torch.zeros(B, T, dtype=torch.bool)
    for b, t in RESETS[resets]:
        is_init[b, t] = True
    return Problem(rnn, torch.randn(B, T, I, dtype=F64, requires_grad=True), reset_states, is_init)


def _segments(is_init: Tensor) -> Iterator[tuple[int, int, int]]:
    """Cut the rows by hand: yields row, first step and end of each segment."""
    for b, row in enumerate(is_init.tolist()):
        starts = [0, *(t for t in range(1, T) if row[t]), T]
        yield from ((b, start, end) for start, end in pairwise(starts))


def _torch_segments(problem: Problem) -> tuple[Tensor, dict[tuple[int, int], tuple[Tensor, ...]]]:
    """Run torch's kernel on each segment; also the last states, each ``[L, H]``, by ``(b, t)``."""
    pieces: list[list[Tensor]] = [[] for _ in range(B)]
    last = {}
    for b, start, end in _segments(problem.is_init):
        first: tuple[Tensor, ...] = tuple(
            torch.stack([layer[k][b, start] for layer in problem.reset_states])
            for k in range(len(problem.reset_states[0]))
        )
        y, states = problem.rnn(
            problem.x[b, start:end], first if isinstance(problem.rnn, nn.LSTM) else first[0]
        )
        pieces[b].append(y)
        last[b, end - 1] = states if isinstance(states, tuple) else (states,)
    return torch.stack([torch.cat(piece) for piece in pieces]), last


def _loss_gradients(problem: Problem) -> list[reference.Gradients]:
    """Gradients by the reference of a random loss, checked against autograd through torch's kernel.

    The loss reads all outputs, and the states at segment ends, which is where torch shows them.
    """
    runs = problem.run()
    y, last = _torch_segments(problem)
    d_y = torch.randn_like(y)
    is_end = torch.zeros(B, T, 1, dtype=F64)
    for b, t in last:
        is_end[b, t] = 1
    d_states = [[torch.randn_like(s) * is_end for s in layer] for layer in problem.reset_states]
    loss = (y * d_y).sum()
    for (b, t), states in last.items():
        for layer, d_layer in enumerate(d_states):
            pairs = zip(d_layer, states, strict=True)
            loss = loss + torch.stack([(d[b, t] * s[layer]).sum() for d, s in pairs]).sum()
    loss.backward()
    return reference.backward_layers(
        runs, d_y.numpy(), [[d.numpy() for d in layer] for layer in d_states]
    )


def _compare(actual: np.ndarray, expected: Tensor | None, what: str) -> None:
    assert expected is not None, what
    assert_equal(torch.from_numpy(actual), expected, F64, what)


@pytest.mark.parametrize("resets", RESETS)
@pytest.mark.parametrize(("cell", "kwargs"), CASES)
def test_reference_outputs_and_states_equal_torchs_on_segments_cut_by_hand(cell, kwargs, resets):
    problem = _problem(cell, resets, **kwargs)
    runs = problem.run()
    y, last = _torch_segments(problem)
    _compare(runs[-1].y, y, "y")
    for (b, t), states in last.items():
        for k, state in enumerate(states):
            actual = np.stack([run.states[k][b, t] for run in runs])
            _compare(actual, state, f"state {k} at {b}, {t}")


@pytest.mark.parametrize("resets", RESETS)
@pytest.mark.parametrize(("cell", "kwargs"), CASES)
def test_reference_gradients_equal_autograds(cell, kwargs, resets):
    problem = _problem(cell, resets, **kwargs)
    gradients = _loss_gradients(problem)
    _compare(gradients[0].x, problem.x.grad, "x")
    for i, gradient in enumerate(gradients):
        for name, d, p in zip(
            reference.Weights._fields, gradient.weights, problem.parameters[i], strict=True
        ):
            assert (d is None) == (p is None), name
            if d is not None and p is not None:
                _compare(d, p.grad, f"{name} of layer {i}")
        for k, (d, state) in enumerate(
            zip(gradient.reset_state, problem.reset_states[i], strict=True)
        ):
            _compare(d, state.grad, f"reset state {k} of layer {i}")


@pytest.mark.parametrize("resets", ["none", "two in a row"])
@pytest.mark.parametrize("kwargs", [{}, {"proj_size": 2}])
def test_reference_cell_states_and_gradients_equal_autograds_through_single_steps(kwargs, resets):
    """``nn.LSTM`` hides ``c`` inside a segment: here torch runs one step at a time."""
    problem = _problem("lstm", resets, **kwargs)
    states = _torch_steps(problem)
    (run,) = problem.run()
    d_states = [torch.randn_like(s) for s in states]
    torch.autograd.backward(states, d_states)
    gradient = reference.backward(run, np.zeros_like(run.y), [d.numpy() for d in d_states])
    for k, (actual, expected) in enumerate(zip(run.states, states, strict=True)):
        _compare(actual, expected, f"state {k}")
    _compare(gradient.x, problem.x.grad, "x")
    for k, d in enumerate(gradient.reset_state):
        _compare(d, problem.reset_states[0][k].grad, f"reset state {k}")


def _torch_steps(problem: Problem) -> list[Tensor]:
    """Run one step at a time by a call of ``nn.LSTM`` each: ``h`` and ``c`` at every position."""
    history = []
    state = tuple(s[:, 0] for s in problem.reset_states[0])
    for t in range(T):
        starts = problem.is_init[:, t, None]
        state = tuple(
            torch.where(starts, r[:, t], s)
            for r, s in zip(problem.reset_states[0], state, strict=True)
        )
        _, (h, c) = problem.rnn(problem.x[:, t, None], tuple(s[None] for s in state))
        state = (h[0], c[0])
        history.append(state)
    return [torch.stack(s, dim=1) for s in zip(*history, strict=True)]


@pytest.mark.parametrize("resets", ["none", "two in a row", "everywhere"])
@pytest.mark.parametrize(
    ("cell", "kwargs"), [("lstm", {}), ("lstm", {"proj_size": 2}), ("gru", {})]
)
def test_gradients_equal_finite_differences(cell, kwargs, resets):
    """Along random directions of all arguments at once; the loss reads outputs and states."""
    rng = np.random.default_rng(0)
    (run,) = (problem := _problem(cell, resets, **kwargs)).run()
    is_init = problem.is_init.numpy()
    names = [n for n, w in zip(run.weights._fields, run.weights, strict=True) if w is not None]
    arguments = [problem.x.detach().numpy(), *(getattr(run.weights, n) for n in names)]
    arguments += [s.detach().numpy() for s in problem.reset_states[0]]
    d_y, d_states = rng.normal(size=run.y.shape), [rng.normal(size=s.shape) for s in run.states]

    def loss(arguments: list[np.ndarray]) -> float:
        weights = reference.Weights(**dict(zip(names, arguments[1:], strict=False)))
        out = reference.unroll(
            problem.cell, weights, arguments[0], arguments[1 + len(names) :], is_init
        )
        pairs = zip((d_y, *d_states), (out.y, *out.states), strict=True)
        return sum(float((d * a).sum()) for d, a in pairs)

    gradient = reference.backward(run, d_y, d_states)
    gradients = [gradient.x, *(getattr(gradient.weights, n) for n in names), *gradient.reset_state]
    for _ in range(5):
        direction = [rng.normal(size=a.shape) for a in arguments]

        def along(step: float, direction: list[np.ndarray] = direction) -> float:
            return loss([a + step * d for a, d in zip(arguments, direction, strict=True)])

        # Of fourth order: a step that is large enough for rounding errors has no other error.
        eps = 1e-4
        near, far = along(eps) - along(-eps), along(2 * eps) - along(-2 * eps)
        analytic = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        assert analytic == pytest.approx((8 * near - far) / (12 * eps), rel=1e-7)


@pytest.mark.parametrize("cell", CELLS)
def test_reference_segment_gets_nothing_from_before_it_not_even_nan(cell):
    problem = _problem(cell, "two in a row")
    (clean,) = problem.run()
    with torch.no_grad():
        problem.x[0, :3] = float("nan")
        for state in problem.reset_states[0]:
            state[0, 1:3] = float("inf")  # no segment starts there, so nothing may read it
    (dirty,) = problem.run()
    assert np.isnan(dirty.y[0, :3]).all()
    assert np.array_equal(dirty.y[0, 3:], clean.y[0, 3:])
    assert np.array_equal(dirty.y[1:], clean.y[1:])


@pytest.mark.parametrize("cell", CELLS)
def test_reference_reset_state_has_a_gradient_at_segment_starts_alone(cell):
    problem = _problem(cell, "two in a row")
    (gradient,) = _loss_gradients(problem)
    starts = problem.is_init.numpy().copy()
    starts[:, 0] = True
    for d in gradient.reset_state:
        assert np.array_equal((d != 0).any(-1), starts)


def test_reference_shares_nothing_with_what_it_judges():
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    modules = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    modules += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert {str(m).partition(".")[0] for m in modules} == {
        *("__future__", "collections", "typing", "numpy")
    }
