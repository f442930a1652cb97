"""``"pad"``: segments side by side in packed rows, without resets.

LSTMs run torch's native kernel in the dtypes that it is fast in. GRUs, other dtypes and gradients
through cell states run the custom operator of ``"scan"``; other cells run step by step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..cells import Cell, LongShortTermMemory, State
from . import native, shared_rows
from .batch import Batch, LayerRun
from .loop import join_steps
from .packing import Plan, read_segments
from .scan import has_operator, run_operator

# The time of a call to the native kernel, in rows of one step: a constant part, and the part that
# reads the weights, which is worth fewer rows the wider they are.
_CALL_ROWS = 64
_CALL_SIZE = 2e6


def runs_native(cell: Cell, weights: Any, dtype: torch.dtype) -> bool:
    """Return whether the native kernel runs a layer fast."""
    return type(cell) is LongShortTermMemory and weights.w_hr is None and dtype in native.DTYPES


def block_rows(inputs: int, hidden: int) -> int:
    """Return the time of one call to the native kernel, in rows of one step.

    Measured; rounded to a power of two, so that layers of similar size share a plan.

    Examples:
        >>> block_rows(64, 128), block_rows(64, 256)
        (128, 64)
    """
    rows = _CALL_ROWS + _CALL_SIZE / ((inputs + hidden) * hidden)
    return 1 << round(math.log2(rows))


class PackedBatch(Batch):
    """A batch packed segment by segment.

    Args:
        cell: the equations.
        x: ``[B, T, I]``.
        reset_state: each ``[B, T, L, H]``, read at segment starts.
        is_init: bool ``[B, T]``.
        is_native: whether layers run the native kernel.
    """

    def __init__(
        self, cell: Cell, x: Tensor, reset_state: State, is_init: Tensor, is_native: bool
    ) -> None:
        self.cell = cell
        self.is_native = is_native
        hidden = reset_state[0].shape[-1]
        rows = block_rows(x.shape[-1], hidden) if is_native else 0
        segments = read_segments(is_init)
        may_share = is_native and not segments.are_rows and shared_rows.can_run(x, hidden)
        nonzero = segments.find_nonzero_starts(reset_state) if may_share else None
        self.plan: Plan = segments.plan(rows, nonzero)
        self.start = tuple(self.plan.at_starts(s) for s in reset_state)
        self.unpack_copies = not self.plan.is_dense

    def pack(self, x: Tensor) -> Tensor:
        """Return packed rows ``[N, F]``."""
        return self.plan.pack(x)

    def unpack(self, rows: Tensor) -> Tensor:
        """Return ``[B, T, F]``."""
        return self.plan.unpack(rows)

    def run_layer(self, weights: Any, x: Tensor, layer: int) -> LayerRun:
        """Run one layer over packed rows ``x [N, I]``."""
        start = tuple(s[:, layer] for s in self.start)
        if self.is_native:
            return native.run(weights, x, start, self.plan)
        if has_operator(self.cell, weights):
            states = run_operator(weights, x, start, self.plan.sizes)
            return LayerRun(states[0], states, saves_output=True)
        return self._run_steps(weights, x, start)

    def _run_steps(self, weights: Any, x: Tensor, state: State) -> LayerRun:
        outputs, states = [], []
        for input_t in self.cell.project_input(weights, x).split(self.plan.sizes):
            state = tuple(s[: input_t.shape[0]] for s in state)
            output, state = self.cell.step(weights, input_t, state)
            outputs.append(output)
            states.append(state)
        return LayerRun(*join_steps(outputs, states, torch.cat))
