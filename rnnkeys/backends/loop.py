"""``"loop"``: the reference way to run time, one time step after the other in plain PyTorch.

Autograd of any order, ``torch.func`` transforms and ``torch.compile`` work through it. The other
backends are tested against it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cells import Cell, State
from .batch import DenseBatch, LayerRun


def run_steps(
    cell: Cell,
    weights: Any,
    x: Tensor,
    state: State,
    *,
    reset: Tensor | None = None,
    reset_state: State = (),
    active: Tensor | None = None,
) -> tuple[list[Tensor], list[State]]:
    """Run one layer over time-major inputs.

    Args:
        cell: the equations.
        weights: of the layer.
        x: ``[T, B, I]``.
        state: before the first step, each ``[B, H]``.
        reset: bool ``[T, B]``: where the state is replaced by ``reset_state`` before the step (not
            read at t=0).
        reset_state: each ``[T, B, H]``.
        active: bool ``[T, B]``: where False, the state stays as it was.

    Returns:
        The outputs ``[B, O]`` and the states of every step.
    """
    projected = cell.project_input(weights, x)
    outputs, states = [], []
    for t, input_t in enumerate(projected.unbind(0)):
        if reset is not None and t:
            state = select(reset[t], tuple(s[t] for s in reset_state), state)
        output, after = cell.step(weights, input_t, state)
        state = after if active is None else select(active[t], after, state)
        outputs.append(output)
        states.append(state)
    return outputs, states


def select(where: Tensor, chosen: State, other: State) -> State:
    """Take ``chosen`` where ``where [B]``; a NaN in ``other`` does not pass."""
    where = where.unsqueeze(-1)
    return tuple(torch.where(where, a, b) for a, b in zip(chosen, other, strict=True))


def join_steps(
    outputs: list[Tensor],
    states: list[State],
    join: Callable[[tuple[Tensor, ...]], Tensor] = torch.stack,
) -> tuple[Tensor, State]:
    """Join the outputs and states of all steps, once where the output is the first state."""
    joined = tuple(join(entry) for entry in zip(*states, strict=True))
    if all(state and output is state[0] for output, state in zip(outputs, states, strict=True)):
        return joined[0], joined
    return join(tuple(outputs)), joined


def run_dense(
    cell: Cell, weights: Any, x: Tensor, reset: Tensor, reset_state: State
) -> tuple[Tensor, State]:
    """Run one layer over ``x [T, B, I]`` with resets.

    Returns:
        Outputs ``[T, B, O]`` and states, each ``[T, B, H]``.
    """
    start = tuple(s[0] for s in reset_state)
    return join_steps(*run_steps(cell, weights, x, start, reset=reset, reset_state=reset_state))


class LoopBatch(DenseBatch):
    """A batch for the loop."""

    def run_layer(self, weights: Any, x: Tensor, layer: int) -> LayerRun:
        """Run one layer over ``x [T, B, I]``."""
        return LayerRun(*run_dense(self.cell, weights, x, self.reset, self.reset_state_of(layer)))
