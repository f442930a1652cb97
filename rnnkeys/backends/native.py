"""The vendor's LSTM kernel (oneDNN, cuDNN) over packed rows, with the cell states it hides.

The kernel runs packed rows block by block. oneDNN's tells the cell states after every step, with
some care (``onednn``). Otherwise, with ``h`` known, all gates come from one matmul without a loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .._compat import lstm_layers
from ..cells import Weights
from . import onednn
from .packing import Plan

Block = tuple[int, int, int]

_DTYPES = (torch.float32, torch.bfloat16)


def serves(dtype: torch.dtype) -> bool:
    """Whether the kernel is fast for this dtype."""
    return dtype in _DTYPES


def run(
    weights: Weights,
    x: Tensor,
    start: tuple[Tensor, ...],
    plan: Plan,
    only_starts: bool,
    unpacks: bool,
) -> tuple[Tensor, Tensor]:
    """Run one LSTM layer over packed rows.

    Args:
        weights: of the layer, without projection.
        x: inputs, rows ``[N, I]``; for oneDNN the batch ``[B, T, I]`` will do.
        start: ``(h, c)`` before the first step, each ``[sizes[0], H]``.
        plan: that packs the rows, in blocks.
        only_starts: whether cell states after segments' first steps suffice.
        unpacks: whether oneDNN's outputs are wanted as a batch.

    Returns:
        Outputs, rows ``[N, H]`` or the batch ``[B, T, H]``, and cell states, detached: after every
        step, ``[N, H]``, or after the segments' first steps, ``[S, H]``.
    """
    h0, c0 = start
    if onednn.runs(x):
        y, cells = onednn.run(weights, x, (h0, c0), plan, only_starts, unpacks)
    else:
        x, h0, c0 = (t.contiguous() for t in (x, *start))
        y, cells = _run_vendor(weights, x, (h0, c0), plan), None
        onednn.refuse_second_order_of(y)
    if cells is None:
        with torch.no_grad():
            x, h = (plan.pack_blank(t) if t.ndim == 3 else t for t in (x, y))
            cells = _cells_from_outputs(weights, x, h, (h0, c0), plan, only_starts)
    return y, cells


def _rows_of(blocks: Sequence[Block]) -> list[int]:
    return [steps * rows for _, steps, rows in blocks]


def _run_vendor(weights: Weights, x: Tensor, start: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
    """Run the blocks by whatever kernel torch has for the device."""
    outputs, state = [], tuple(s.unsqueeze(0) for s in start)
    has_biases = weights.b_ih is not None
    parameters = [w for w in weights[:4] if w is not None]
    for block, (_, steps, rows) in zip(x.split(_rows_of(plan.blocks)), plan.blocks, strict=True):
        state = tuple(s[:, :rows].contiguous() for s in state)
        y, *state = lstm_layers(
            block.view(steps, rows, -1),
            state,
            parameters,
            *(has_biases, 1, 0.0, False, False, False),
        )
        outputs.append(y.flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _cells_from_outputs(
    weights: Weights,
    x: Tensor,
    h: Tensor,
    start: tuple[Tensor, ...],
    plan: Plan,
    only_starts: bool,
) -> Tensor:
    """Compute cell states from outputs, those after segments' first steps or all."""
    hidden = h.shape[1]
    gates = 3 * hidden
    is_short = only_starts and not plan.clears
    sizes = plan.sizes[:1] if is_short else plan.sizes
    rows = sum(sizes)
    w_ih, w_hh = weights.w_ih[:gates], weights.w_hh[:gates]
    bias = None
    if weights.b_ih is not None and weights.b_hh is not None:
        bias = weights.b_ih[:gates] + weights.b_hh[:gates]
    pre = F.linear(x[:rows], w_ih, bias).addmm_(_before(start[0], h, sizes), w_hh.t())
    i_f, g = pre[:, : 2 * hidden].sigmoid_(), pre[:, 2 * hidden :].tanh_()
    i, f = i_f.split(hidden, 1)
    c = i.mul_(g) if is_short else torch.mul(i, g)
    if plan.clears:
        for gate in (c, f):
            gate.index_fill_(0, plan.padding, 0)
    previous = start[1]
    for f_now, c_now in zip(f.split(sizes), c.split(sizes), strict=True):
        previous = c_now.addcmul_(f_now, previous[: c_now.shape[0]])
    return plan.at_first_steps(c) if only_starts else c


def _before(start: Tensor, after: Tensor, sizes: list[int]) -> Tensor:
    steps = after[: sum(sizes)].split(sizes)
    return torch.cat([start, *(s[:n] for s, n in zip(steps[:-1], sizes[1:], strict=True))])
