"""oneDNN's LSTM kernel over rows that segments share.

The kernel has no resets, and it is fastest over few blocks of one size. So short segments that
start from zeros run end to end in rows of one length, with a gap of one step or more between them.
The input gets one more entry, which is 1 in padding and 0 elsewhere. Its weights close the input
gate and the forget gate: the state after a gap is zero, and so is every gradient that reaches the
gap. Only values that are not finite pass. They are noticed in padding, where the same entry opens
the output gate, and the rows then run again with resets by select.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._compat import is_legacy_batchedtensor
from ..cells import Weights
from . import onednn, ops
from .packing import Plan

# The logit of a closed gate, whatever biases and states add to it.
_CLOSED = -3e38
# Largest value that closed gates let through: their sigmoid need not be exactly 0.
_ALMOST_ZERO = 1e-20


def can_run(x: Tensor, hidden: int) -> bool:
    """Return whether rows may be shared: oneDNN has the kernel, and its cell states are found."""
    return onednn.can_run(x) and onednn.is_place_known(x.shape[-1] + 1, hidden)


def run(weights: Weights, x: Tensor, h: Tensor, c: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Run one layer over shared rows.

    Args:
        weights: of the layer, without projection.
        x: ``[N, I]``.
        h: before the first step, ``[sizes[0], H]``, contiguous.
        c: before the first step, ``[sizes[0], H]``, contiguous.
        plan: of the rows.

    Returns:
        Outputs and cell states ``[N, H]``; the cell states are detached.
    """
    inputs = (x, *onednn.list_parameters(weights), h, c)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    y, cells = _SharedRows.apply(*inputs, plan, keep)
    if y is None:
        return _run_by_select([x.index_fill(0, plan.padding, 0), *inputs[1:]], plan)
    return y, cells


class _SharedRows(torch.autograd.Function):
    """Run rows ``[N, I]``, and return None if a value has passed a gap."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any):
        *tensors, plan, keep = arguments
        x, *parameters, h, c = (t.detach() for t in tensors)
        ctx.set_materialize_grads(False)
        x, parameters[0] = _add_padding_entry(x, plan.padding), _add_closing_weights(parameters[0])
        inputs, hidden = x.shape[1], h.shape[1]
        sizes = onednn.cut_blocks(plan.blocks, inputs, hidden)
        saved = [x, *parameters, h, c]
        outputs = []
        cells: list[Tensor] | None = []
        for block in onednn.run_blocks(parameters, x, h, c, sizes):
            outputs.append(block.y.flatten(0, 1))
            cells = onednn.add_cell_states(cells, block, inputs)
            if keep:
                saved += block
        y = onednn.join_rows(outputs)
        if cells is None or not _is_zero(y, plan.padding):
            return None, None
        states = torch.cat(cells)
        ctx.plan = plan
        ctx.mark_non_differentiable(states)
        ctx.save_for_backward(*saved)
        return y, states

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        # Read once: activation checkpoints allow no second time.
        saved = ctx.saved_tensors
        x, *parameters, h, c = saved[:7]
        inputs = x.shape[1] - 1
        d_y = grads[0].contiguous()
        # Of several gradients at once no value can be read.
        if not is_legacy_batchedtensor(d_y):
            blocks = onednn.as_blocks(saved[7:])
            d_x, d_w_ih, *others = onednn.run_blocks_backward(parameters, x, h, c, blocks, d_y)
            if _is_zero(d_x, ctx.plan.padding):
                return d_x[:, :inputs], d_w_ih[:, :inputs].contiguous(), *others, None, None
        w_ih, *others = parameters
        given = x[:, :inputs], w_ih[:, :inputs], *others, h, c
        return *_differentiate_by_select(given, ctx.plan, d_y), None, None


def _add_padding_entry(x: Tensor, padding: Tensor) -> Tensor:
    """Return ``[N, I + 1]``: zeros and a 1 in padding, else the input and a 0."""
    wide = x.new_empty(len(x), x.shape[1] + 1)
    wide[:, :-1] = x
    wide[:, -1] = 0
    # Values that are not finite, or nearly so, would open the gates.
    wide.index_fill_(0, padding, 0)
    wide[:, -1].index_fill_(0, padding, 1)
    return wide


def _add_closing_weights(w_ih: Tensor) -> Tensor:
    """Return weights ``[4H, I + 1]`` that close the gates ``i`` and ``f`` and open ``o``."""
    gates, inputs = w_ih.shape
    wide = w_ih.new_empty(gates, inputs + 1)
    wide[:, :inputs] = w_ih
    i_f, g, o = wide[:, inputs].split([gates // 2, gates // 4, gates // 4])
    i_f.fill_(_CLOSED)
    g.fill_(0)
    o.fill_(-_CLOSED)
    return wide


def _is_zero(rows: Tensor, padding: Tensor) -> bool:
    return torch.linalg.vector_norm(rows.index_select(0, padding)).item() <= _ALMOST_ZERO


def _run_by_select(inputs: Sequence[Tensor], plan: Plan) -> tuple[Tensor, Tensor]:
    """Run the layer by the operator of ``"scan"``, with resets in padding and after it."""
    h = inputs[5]
    where = h.new_zeros(len(plan.source), dtype=torch.bool)
    where = where.index_fill_(0, plan.padding, True).view(-1, plan.sizes[0])
    where[1:] |= where[:-1].clone()
    zeros = h.new_zeros(()).expand(*where.shape, h.shape[1])
    y, cells, *_ = ops.layer(*inputs, (), where, zeros, zeros, torch.is_grad_enabled())
    return y, cells.detach()


def _differentiate_by_select(inputs: Sequence[Tensor], plan: Plan, d_y: Tensor) -> list[Tensor]:
    """Compute the gradients of all inputs by the operator of ``"scan"``."""
    with torch.enable_grad():
        leaves = [t.detach().contiguous().requires_grad_() for t in inputs]
        y, _ = _run_by_select(leaves, plan)
        return list(torch.autograd.grad(y, leaves, d_y))
