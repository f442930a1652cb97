"""``"loop"``: the reference way to run time, plain torch operations, one step at a time.

Every order of autograd, vmap and compile see through it. Other backends are tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import Cell, Weights

State = tuple[Tensor, ...]


def run_steps(
    cell: Cell,
    weights: Weights,
    x: Tensor,
    state: State,
    *,
    reset: Tensor | None = None,
    reset_state: State = (),
    active: Tensor | None = None,
) -> tuple[list[State], State]:
    """Run one layer over time-major inputs.

    Args:
        cell: the equation.
        weights: of the layer.
        x: ``[T, B, I]``.
        state: before the first step, each ``[B, H]``.
        reset: bool ``[T, B]``: where the state is replaced by ``reset_state`` before the step (not
            read at t=0).
        reset_state: each ``[T, B, H]``.
        active: bool ``[T, B]``: where False, the state stays as it was.

    Returns:
        The states after every step, and the last one.
    """
    gates = cell.input_gates(weights, x)
    steps = []
    for t, gates_t in enumerate(gates.unbind(0)):
        if reset is not None and t:
            state = select(reset[t], tuple(s[t] for s in reset_state), state)
        new = cell.step(weights, gates_t, state)
        state = new if active is None else select(active[t], new, state)
        steps.append(state)
    return steps, state


def select(where: Tensor, chosen: State, other: State) -> State:
    """Take ``chosen`` where ``where [B]``; a NaN in ``other`` does not pass."""
    where = where.unsqueeze(-1)
    return tuple(torch.where(where, a, b) for a, b in zip(chosen, other, strict=True))


def run_dense(cell: Cell, weights: Weights, x: Tensor, reset: Tensor, reset_state: State) -> State:
    """Run one layer over ``x [T, B, I]`` with resets; returns states, each ``[T, B, H]``."""
    start = tuple(s[0] for s in reset_state)
    steps, _ = run_steps(cell, weights, x, start, reset=reset, reset_state=reset_state)
    return tuple(torch.stack(entry) for entry in zip(*steps, strict=True))
