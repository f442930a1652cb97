"""``"triton"``: an unpacked batch, whose resets the kernels apply."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...cells import Cell, State
from ..batch import Batch, LayerRun, Options
from . import order_segments, unroll


class TritonBatch(Batch):
    """A batch ``[B, T]`` that the Triton kernels read in place.

    Args:
        cell: the equations.
        reset_state: each ``[B, T, L, H]``.
        is_init: bool ``[B, T]``.
        options: how to run.
    """

    def __init__(self, cell: Cell, reset_state: State, is_init: Tensor, options: Options) -> None:
        self.cell = cell
        self.reset_state = reset_state
        self.is_init = is_init
        self.options = options
        self.order = order_segments(is_init)

    def pack(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def unpack(self, rows: Tensor) -> Tensor:
        """Return ``rows``."""
        return rows

    def run_layer(self, weights: Any, x: Tensor, layer: int) -> LayerRun:
        """Run one layer over ``x [B, T, I]``."""
        start = tuple(s[:, :, layer] for s in self.reset_state)
        y, states = unroll(self.cell, weights, x, start, self.is_init, self.options, self.order)
        return LayerRun(y, states, saves_output=True)
