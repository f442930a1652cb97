"""``"pad"``: segments side by side in packed rows, run by the vendor's kernel or by the fused loop.

The vendor's kernel runs LSTMs in the dtypes it is made for; GRUs, other dtypes and gradients
through cell states take the fused loop; any other cell takes the plain one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cells import Cell, Weights
from . import native as vendor_lstm
from . import onednn
from .dense import has_kernel, run_rows
from .loop import State, run_steps
from .packing import Plan

_CALL_ROWS = 64
_CALL_SIZE = 2e6


def wants_vendor(cell: Cell, dtype: torch.dtype, vendor: bool, state_grad: bool) -> bool:
    """Whether the vendor's kernel serves: fast for these dtypes, no gradient through ``c``.

    Of layers without a projection.
    """
    return vendor and not state_grad and cell.name == "lstm" and vendor_lstm.serves(dtype)


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
    weights: Weights,
    x: Tensor,
    start: State,
    plan: Plan,
    *,
    vendor: bool,
    only_starts: bool,
    unpacks: bool,
) -> State:
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
        The states after every step, each ``[N, H]``. With ``vendor``, those besides ``h`` are
        detached and, with ``only_starts``, those of segments' first steps, ``[S, H]``.
    """
    if vendor:
        return vendor_lstm.run(weights, x, start, plan, only_starts, unpacks)
    if has_kernel(cell, weights):
        return run_rows(cell, weights, x, start, plan.sizes)
    return _run_plain(cell, weights, x, start, plan)


def _run_plain(cell: Cell, weights: Weights, x: Tensor, start: State, plan: Plan) -> State:
    """Cells without a kernel: the plain loop over the packed steps."""
    steps, state = [], start
    for x_t in x.split(plan.sizes):
        state = tuple(s[: x_t.shape[0]] for s in state)
        _, state = run_steps(cell, weights, x_t.unsqueeze(0), state)
        steps.append(state)
    return tuple(torch.cat(entry) for entry in zip(*steps, strict=True))
