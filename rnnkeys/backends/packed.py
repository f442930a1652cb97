"""``"pad"``: segments side by side in packed rows, run by the vendor's kernel or by the fused loop.

The vendor's kernel runs LSTMs in the dtypes it is made for; GRUs, other dtypes and gradients
through cell states take the fused loop; any other cell takes the plain one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..cells import Cell, State
from . import native as vendor_lstm
from . import onednn
from .dense import has_kernel, run_rows
from .loop import join_steps
from .packing import Plan

_CALL_ROWS = 64
_CALL_SIZE = 2e6


def wants_vendor(
    cell: Cell, weights: Any, dtype: torch.dtype, vendor: bool, state_grad: bool
) -> bool:
    """Whether the vendor's kernel runs layers: fast for the dtype, no gradient through ``c``."""
    is_fit = vendor and not state_grad and cell.name == "lstm"
    return is_fit and weights.w_hr is None and vendor_lstm.serves(dtype)


def shares_rows(x: Tensor) -> bool:
    """Whether the vendor's kernel can clear the state between segments that share a row."""
    return onednn.runs(x)


def block_rows(inputs: int, hidden: int) -> int:
    """Cost of a block of steps for the vendor's kernel, in rows of one step.

    A call costs a certain time, which is worth fewer rows the wider they are, and reads the weights
    anew. Measured; rounded to a power of two, so that layers of similar size share a plan.

    Examples:
        >>> block_rows(64, 128), block_rows(64, 256)
        (128, 64)
    """
    rows = _CALL_ROWS + _CALL_SIZE / ((inputs + hidden) * hidden)
    return 1 << round(math.log2(rows))


def run(
    cell: Cell,
    weights: Any,
    x: Tensor,
    start: State,
    plan: Plan,
    *,
    vendor: bool,
    only_starts: bool,
    unpacks: bool,
) -> tuple[Tensor, State]:
    """Run one layer over packed rows.

    Args:
        cell: the equation.
        weights: of the layer.
        x: packed inputs ``[N, I]``; with ``vendor``, where it shares rows, the batch
            ``[B, T, I]`` will do.
        start: states before the first step, each ``[sizes[0], H]``.
        plan: that packed the rows.
        vendor: whether to run the vendor's kernel.
        only_starts: whether states after the first step of each segment suffice.
        unpacks: whether ``h`` of the vendor's kernel, where it shares rows, is wanted as a batch
            ``[B, T, H]``.

    Returns:
        Outputs ``[N, O]`` and the states after every step, each ``[N, H]``. With ``vendor``, those
        besides ``h`` are detached and, with ``only_starts``, those of segments' first steps,
        ``[S, H]``.
    """
    if vendor:
        states = vendor_lstm.run(weights, x, start, plan, only_starts, unpacks)
        return states[0], states
    if has_kernel(cell, weights):
        states = run_rows(cell, weights, x, start, plan.sizes)
        return states[0], states
    return _run_plain(cell, weights, x, start, plan)


def _run_plain(
    cell: Cell, weights: Any, x: Tensor, start: State, plan: Plan
) -> tuple[Tensor, State]:
    """Run a cell without a kernel, one packed step after the other."""
    outputs, states, state = [], [], start
    for input_t in cell.project_input(weights, x).split(plan.sizes):
        state = tuple(s[: input_t.shape[0]] for s in state)
        output, state = cell.step(weights, input_t, state)
        outputs.append(output)
        states.append(state)
    return join_steps(outputs, states, torch.cat)
