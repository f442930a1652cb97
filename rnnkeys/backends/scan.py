"""``"scan"``: the dense batch in place, resets by select.

Shapes are static and nothing synchronizes with the host. LSTM, GRU and the scans of linear cells
run as one custom operator with a hand-written backward pass; other cells, and derivatives by
``torch.func``, run the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._compat import in_derivative, in_transform
from ..cells import Cell, GatedRecurrentUnit, LinearCell, LongShortTermMemory, State
from . import linear_layer, ops
from .batch import DenseBatch, LayerRun
from .loop import run_dense


def has_operator(cell: Cell, weights: Any) -> bool:
    """Return whether a custom operator runs the cell: an LSTM or a GRU without projection."""
    return type(cell) in (LongShortTermMemory, GatedRecurrentUnit) and weights.w_hr is None


def run_operator(
    weights: Any,
    x: Tensor,
    start: State,
    sizes: Sequence[int],
    reset: Tensor | None = None,
    reset_state: State = (),
) -> State:
    """Run one layer of an LSTM or a GRU over flat time-major rows.

    Args:
        weights: of the layer.
        x: ``[N, I]``.
        start: state before the first step, each ``[B, H]``: two for an LSTM, one for a GRU.
        sizes: number of rows of every step; not read with ``reset``.
        reset: bool ``[T, B]``, where the state is replaced before a step; None for packed rows.
        reset_state: each ``[T, B, H]``.

    Returns:
        The states after every step, each ``[N, H]``.
    """
    keep = _records((x, *weights[:4], *start, *reset_state))
    h0, c0, *_ = (*start, None)
    reset_h, reset_c, *_ = (*reset_state, None, None)
    states = ops.layer(x, *weights[:4], h0, c0, sizes, reset, reset_h, reset_c, keep)
    return states[: len(start)]


def _records(inputs: Sequence[Tensor | None]) -> bool:
    """Return whether a backward pass may follow; in a transform, tensors do not show it."""
    if not torch.is_grad_enabled():
        return False
    return in_transform() or any(t is not None and t.requires_grad for t in inputs)


class ScanBatch(DenseBatch):
    """A batch for the operators."""

    def run_layer(self, weights: Any, x: Tensor, layer: int) -> LayerRun:
        """Run one layer over ``x [T, B, I]``."""
        reset_state = self.reset_state_of(layer)
        if isinstance(self.cell, LinearCell):
            y, states = linear_layer.run(self.cell, weights, x, self.reset, reset_state)
            return LayerRun(y, states, saves_output=True)
        if in_derivative() or not has_operator(self.cell, weights):
            return LayerRun(*run_dense(self.cell, weights, x, self.reset, reset_state))
        steps, batch = x.shape[:2]
        start = tuple(s[0] for s in reset_state)
        rows = x.reshape(steps * batch, -1)
        flat = run_operator(weights, rows, start, (), self.reset, reset_state)
        states = tuple(s.view(steps, batch, -1) for s in flat)
        return LayerRun(states[0], states, saves_output=True)
