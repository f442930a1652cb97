"""One time step of a stack of layers, as collectors run it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._compat import gru_cell, lstm_cell
from ..cells import Cell, GatedRecurrentUnit, LongShortTermMemory, State, Weights


def run_step(
    cell: Cell,
    layers: list[Any],
    x: Tensor,
    states: State,
    dropout: float,
    native: bool,
) -> tuple[Tensor, State]:
    """Run one time step of a stack.

    Args:
        cell: the equations.
        layers: the weights of every layer.
        x: ``[N, I]``.
        states: each ``[N, L, H]``.
        dropout: probability of dropout between layers.
        native: whether torch's native kernels may run.

    Returns:
        Outputs ``[N, O]`` and the next states ``[N, L, H]``.
    """
    after = []
    for layer, weights in enumerate(layers):
        if layer and dropout:
            x = F.dropout(x, dropout)
        state = tuple(s[:, layer] for s in states)
        kernel = _KERNELS.get(type(cell)) if native else None
        if kernel is not None and weights.w_hr is None:
            state = kernel(weights, x, state)
            x = state[0]
        else:
            x, state = cell(weights, x, state)
        after.append(state)
    if len(after) > 1:
        return x, tuple(torch.stack(entry, 1) for entry in zip(*after, strict=True))
    # The state of one layer is not copied, and an in-place activation on the output must not
    # change it.
    return x.clone(), tuple(s.unsqueeze(1) for s in after[0])


def _step_lstm(weights: Weights, x: Tensor, state: State) -> State:
    return lstm_cell(x, state, *weights[:4])


def _step_gru(weights: Weights, x: Tensor, state: State) -> State:
    return (gru_cell(x, state[0], *weights[:4]),)


_KERNELS = {LongShortTermMemory: _step_lstm, GatedRecurrentUnit: _step_gru}
