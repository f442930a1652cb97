"""``"pad"``: segments side by side in packed rows, run by the vendor's kernel or by the fused loop.

The vendor's LSTM (oneDNN, cuDNN) runs the packed rows block by block and returns outputs only; the
cell states that it does not return are computed from them: with ``h`` known, all gates come from
one matmul, and ``c_t = f_t c_{t-1} + i_t g_t`` is pointwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cells import Cell, Weights
from ..segments import Plan
from .loop import State, run_steps
from .scan import has_kernel, run_rows

_VENDOR_DTYPES = (torch.float32, torch.bfloat16)


def wants_vendor(cell: Cell, dtype: torch.dtype, vendor: bool, state_grad: bool) -> bool:
    """Whether the vendor's kernel serves: fast for these dtypes, no gradient through ``c``."""
    return vendor and not state_grad and cell.name == "lstm" and dtype in _VENDOR_DTYPES


def run(
    cell: Cell,
    weights: Weights,
    x: Tensor,
    start: State,
    plan: Plan,
    *,
    vendor: bool,
    only_starts: bool,
) -> State:
    """Run one layer over packed rows.

    Args:
        cell: the equation.
        weights: of the layer.
        x: packed inputs ``[N, I]``.
        start: states the segments start from, each ``[S, H]``.
        plan: that packed the rows.
        vendor: whether to run the vendor's kernel.
        only_starts: whether states after the first step of each segment suffice; others may then be
            NaN.

    Returns:
        The states after every step, each ``[N, H]``; with ``vendor``, those besides ``h`` are
        detached.
    """
    if vendor and weights.w_hr is None:
        h = _vendor_lstm(weights, x, start, plan)
        with torch.no_grad():
            return h, _recover_c(weights, x, h, start, plan, only_starts)
    if has_kernel(cell, weights):
        return run_rows(cell, weights, x, start, plan.sizes)
    return _run_plain(cell, weights, x, start, plan)


def _vendor_lstm(weights: Weights, x: Tensor, start: State, plan: Plan) -> Tensor:
    parameters = [w for w in weights if w is not None]
    has_biases = weights.b_ih is not None
    h, c = (s.unsqueeze(0) for s in start)
    outputs, row = [], 0
    for _, steps, rows in plan.blocks:
        block = x[row : row + steps * rows].view(steps, rows, -1)
        row += steps * rows
        hx = (h[:, :rows].contiguous(), c[:, :rows].contiguous())
        y, h, c = torch._VF.lstm(block, hx, parameters, has_biases, 1, 0.0, False, False, False)  # pyright: ignore[reportAttributeAccessIssue]
        outputs.append(y.reshape(steps * rows, -1))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _FirstOrderOnly.apply(y)


class _FirstOrderOnly(torch.autograd.Function):
    """Identity that refuses to be differentiated twice, which the vendor's kernel cannot be."""

    @staticmethod
    def forward(ctx: Any, y: Tensor):
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "recurrent_backend='pad' runs a vendor kernel that has no second derivative, and a "
                "gradient was asked for with create_graph=True. Build the module with "
                "recurrent_backend='loop', which any order of autograd sees through."
            )
        return grads[0]


def _recover_c(
    weights: Weights, x: Tensor, h: Tensor, start: State, plan: Plan, only_starts: bool
) -> Tensor:
    """Compute cell states from outputs; with ``only_starts`` NaN after segments' first steps."""
    hidden = h.shape[1]
    gates = 3 * hidden
    sizes = plan.sizes[:1] if only_starts else plan.sizes
    rows = sum(sizes)
    w_ih, w_hh = weights.w_ih[:gates], weights.w_hh[:gates]
    bias = None
    if weights.b_ih is not None and weights.b_hh is not None:
        bias = weights.b_ih[:gates] + weights.b_hh[:gates]
    pre = F.linear(x[:rows], w_ih, bias).addmm_(_before(start[0], h, sizes), w_hh.t())
    i_f, g = pre[:, : 2 * hidden].sigmoid_(), pre[:, 2 * hidden :].tanh_()
    i, f = i_f.split(hidden, 1)
    c = i.mul_(g) if only_starts else torch.mul(i, g)
    f_t, c_t = f.split(sizes), c.split(sizes)
    previous = start[1]
    for f_now, c_now in zip(f_t, c_t, strict=True):
        previous = c_now.addcmul_(f_now, previous[: c_now.shape[0]])
    if not only_starts:
        return c
    all_rows = h.new_full(h.shape, float("nan"))
    all_rows[:rows] = c
    return all_rows


def _before(start: Tensor, after: Tensor, sizes: list[int]) -> Tensor:
    steps = after[: sum(sizes)].split(sizes)
    return torch.cat([start, *(s[:n] for s, n in zip(steps[:-1], sizes[1:], strict=True))])


def _run_plain(cell: Cell, weights: Weights, x: Tensor, start: State, plan: Plan) -> State:
    """Cells without a kernel: the plain loop over the packed steps."""
    steps, state = [], start
    for x_t in x.split(plan.sizes):
        state = tuple(s[: x_t.shape[0]] for s in state)
        _, state = run_steps(cell, weights, x_t.unsqueeze(0), state)
        steps.append(state)
    return tuple(torch.cat(entry) for entry in zip(*steps, strict=True))
