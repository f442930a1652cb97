"""One step of a stack of layers, as a collector runs it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._compat import gru_cell, lstm_cell
from ..cells import Cell, Weights


def run_step(
    cell: Cell,
    layers: list[Weights],
    x: Tensor,
    states: tuple[Tensor, ...],
    dropout: float,
    vendor: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one step of a stack: ``x [N, I]``, states ``[N, L, H]``."""
    after = []
    for layer, weights in enumerate(layers):
        if layer and dropout:
            x = F.dropout(x, dropout)
        state = tuple(s[:, layer] for s in states)
        if vendor and weights.w_hr is None:
            state = _vendor_step(cell, weights, x, state)
        else:
            state = cell.step(weights, cell.input_gates(weights, x), state)
        x = state[0]
        after.append(state)
    # An in-place activation on the output must not change the state: one layer's state would share
    # its memory.
    if len(after) == 1:
        return x.clone(), tuple(s.unsqueeze(1) for s in after[0])
    return x, tuple(torch.stack(entry, 1) for entry in zip(*after, strict=True))


def _vendor_step(
    cell: Cell, weights: Weights, x: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    parameters = weights[:4]
    if cell.name == "lstm":
        return lstm_cell(x, state, *parameters)
    return (gru_cell(x, state[0], *parameters),)
