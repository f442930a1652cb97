"""oneDNN's LSTM kernel over packed rows.

The kernel knows no resets. Where segments share a row, the input gets one more entry that is 1 in
the gaps between them and 0 elsewhere, whose weights shut the input gate and the forget gate: the
state after a gap is zero, exactly, and so is every gradient that reaches it. Values that are not
finite do get through; they are noticed in the gaps, where the same entry opens the output gate, and
the steps run again with resets by select.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._compat import is_legacy_batchedtensor
from ..cells import Weights
from . import ops
from .packing import Plan
from .workspace import Ran, hidden_cells, run_block, run_block_back, size_of

# What shuts a gate in a gap, whatever biases and state add to it.
_SHUT = -3e38
# What sigmoids that are not quite 0 may let through.
_ALMOST_ZERO = 1e-20
# Elements of a workspace, 31.5 MiB. Of 32 MiB and more in one piece glibc keeps nothing for the
# next pass, and to get it anew from the system takes as long as to compute; that runs in pieces.
_MOST_KEPT = 63 << 17


def runs(x: Tensor) -> bool:
    """Whether oneDNN has the kernel for such inputs."""
    is_fit = x.dtype == torch.float32 and x.device.type == "cpu"
    return is_fit and torch.backends.mkldnn.is_available()


def refuse_second_order() -> None:
    """Raise where a backward pass is to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "recurrent_backend='pad' runs a vendor kernel that has no second derivative, and a "
            "gradient was asked for with create_graph=True. Build the module with "
            "recurrent_backend='loop', which any order of autograd sees through."
        )


def refuse_second_order_of(y: Tensor) -> None:
    """Raise where a backward pass through ``y`` is to be differentiated."""
    if y.requires_grad:
        y.register_hook(lambda _: refuse_second_order())


def _refuse_several(grad: Tensor) -> None:
    """Raise where gradients of several outputs are to be had at once."""
    if is_legacy_batchedtensor(grad):
        raise RuntimeError(
            "recurrent_backend='pad' runs a vendor kernel that has no rule for several gradients "
            "at once (is_grads_batched=True, vectorize=True). Build the module with "
            "recurrent_backend='scan', or take one after the other."
        )


def run(
    weights: Weights,
    x: Tensor,
    start: tuple[Tensor, Tensor],
    plan: Plan,
    only_starts: bool,
    unpacks: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run one layer over packed rows.

    Args:
        weights: of the layer, without projection.
        x: inputs, the batch ``[B, T, I]`` or rows ``[N, I]``.
        start: ``(h, c)`` before the first step, each ``[sizes[0], H]``.
        plan: that packs the rows.
        only_starts: whether cell states after segments' first steps suffice.
        unpacks: whether to return outputs as a batch, for themselves in memory.

    Returns:
        Outputs, the batch ``[B, T, H]`` or rows ``[N, H]``, and cell states, detached: after every
        step, ``[N, H]``, or after the segments' first steps, ``[S, H]``; None if they could not be
        found.
    """
    b_ih, b_hh = weights.b_ih, weights.b_hh
    if b_ih is None or b_hh is None:
        b_ih = b_hh = x.new_zeros(weights.w_hh.shape[0])
    given = (x, weights.w_ih, weights.w_hh, b_ih, b_hh, *start)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if not plan.clears:
        return _run_own_rows(given, plan, keep, only_starts, unpacks)
    y, cells = _SharedRows.apply(*given, plan, keep, only_starts, unpacks)
    if y is None:
        y, cells = _run_with_resets((plan.pack(x) if x.ndim == 3 else x, *given[1:]), plan)
        cells = plan.at_first_steps(cells) if only_starts else cells
        y = plan.unpack(y) if unpacks else y
    return y, cells


def _run_own_rows(
    given: Any, plan: Plan, keep: bool, only_starts: bool, unpacks: bool
) -> tuple[Tensor, Tensor | None]:
    """Run segments that share no rows, by torch's own nodes of autograd, the quicker to call."""
    x, *weights, h, c = given if keep else (t.detach() for t in given)
    x = (plan.pack(x) if x.ndim == 3 else x).contiguous()
    h, c = h.contiguous(), c.contiguous()
    with_workspace = keep or not only_starts
    blocks = list(_cut(plan, x.shape[1], h.shape[1], with_workspace))
    outputs: list[Tensor] = []
    cells: list[Tensor] | None = []
    for x_k in _split(x, blocks):
        rows = x_k.shape[1]
        if h.shape[0] > rows:
            h, c = h[:rows], c[:rows]
        ran = run_block(weights, x_k, h, c, with_workspace)
        h, c, last = ran.h, ran.c, ran.c.detach()
        # All segments begin in the first step.
        if cells is not None and not (only_starts and cells):
            found = hidden_cells(ran._replace(c=last), x.shape[1])
            cells = None if found is None else [*cells, found.flatten(0, 1), last]
        outputs.append(ran.y)
    refuse_second_order_of(outputs[-1])
    y = _as_batch(outputs, plan) if unpacks else _joined(outputs)
    if cells is None or not only_starts:
        return y, None if cells is None else torch.cat(cells)
    hidden, last = cells
    return y, (hidden if len(hidden) else last)[: plan.sizes[0]]


class _SharedRows(torch.autograd.Function):
    """Rows that segments share, with gaps in which the state is cleared, piece by piece.

    Returns None for outputs where something got through a gap.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any):
        *given, plan, keep, only_starts, unpacks = arguments
        x, *weights, h, c = (t.detach() for t in given)
        h, c = h.contiguous(), c.contiguous()
        # No zeros for the gradient of cells, which has no reader.
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.packs, ctx.unpacks = plan, x.ndim == 3, unpacks
        x, weights[0] = _with_gaps(x, plan), _with_shutters(weights[0])
        ctx.blocks = list(_cut(plan, x.shape[1], h.shape[1], with_workspace=True))
        wanted = _Wanted(plan, only_starts, h)
        outputs, kept, row = [], [], 0
        for x_k in _split(x, ctx.blocks):
            ran = run_block(weights, x_k, h, c, with_workspace=True)
            wanted.take(ran, x.shape[1], row)
            outputs.append(ran.y)
            if keep:
                kept += [h, c, *ran]
            h, c, row = ran.h, ran.c, row + x_k.shape[0] * x_k.shape[1]
        y = _joined(outputs)
        if not _all_zero(y, plan.gaps):
            return None, None
        if keep:
            ctx.save_for_backward(x, *weights, *kept)
        if wanted.cells is not None:
            ctx.mark_non_differentiable(wanted.cells)
        return _unpacked(y, plan) if unpacks else y, wanted.cells

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        refuse_second_order()
        _refuse_several(grads[0])
        plan, (x, *rest) = ctx.plan, ctx.saved_tensors
        weights, kept = rest[:4], rest[4:]
        d_y = (plan.pack_blank(grads[0]) if ctx.unpacks else grads[0]).contiguous()
        d_h = d_c = None
        d_inputs: list[Tensor] = []
        d_weights: list[Tensor] = []
        parts = zip(_split(x, ctx.blocks), _split(d_y, ctx.blocks), strict=True)
        for k, (x_k, d_y_k) in reversed(list(enumerate(parts))):
            h, c, *ran = kept[6 * k : 6 * k + 6]
            (d_x_k, *d_weights_k), (d_h, d_c) = run_block_back(
                weights, x_k, (h, c), Ran(*ran), (d_y_k, d_h, d_c)
            )
            d_inputs.insert(0, d_x_k)
            d_weights = _add(d_weights, d_weights_k)
        found = [_joined(d_inputs), *d_weights, d_weights[-1].clone(), d_h, d_c]
        found = _without_gaps(found, (x, *weights, *kept[:2]), plan, d_y)
        if ctx.packs and ctx.needs_input_grad[0]:
            found[0] = plan.unpack(found[0])
        # Both biases have one gradient; whoever changes that of one in place must not meet both.
        return *found, None, None, None, None


def _with_gaps(x: Tensor, plan: Plan) -> Tensor:
    """Rows of inputs with one more entry, which is 1 in padding, where the others are 0."""
    inputs = x.shape[-1]
    wide = x.new_empty(len(plan.source), inputs + 1)
    if x.ndim == 3:
        torch.index_select(x.flatten(0, 1), 0, plan.source, out=wide[:, :inputs])
    else:
        wide[:, :inputs] = x
    # What is not finite, or nearly so, would open gates again.
    wide.index_fill_(0, plan.padding, 0)
    wide[:, inputs:] = plan.is_padding
    return wide


def _with_shutters(w_ih: Tensor) -> Tensor:
    """Weights of inputs, with those of the entry, for gates in gaps."""
    gates, inputs = w_ih.shape
    wide = w_ih.new_empty(gates, inputs + 1)
    wide[:, :inputs] = w_ih
    wide[:, inputs] = _shutters(gates // 4)
    return wide


@functools.lru_cache(64)
def _shutters(hidden: int) -> Tensor:
    """Weights of the entry: input gate, forget gate, cell, output gate."""
    with torch.inference_mode(False):
        weights = torch.tensor([_SHUT, _SHUT, 0, -_SHUT], dtype=torch.float32, device="cpu")
        return weights.repeat_interleave(hidden)


def _split(rows: Tensor, blocks: list[tuple[int, int]]) -> list[Tensor]:
    """Rows ``[N, F]`` as blocks ``[steps, size, F]``."""
    parts = rows.split([steps * size for steps, size in blocks]) if len(blocks) > 1 else (rows,)
    return [part.view(*block, -1) for part, block in zip(parts, blocks, strict=True)]


def _joined(blocks: list[Tensor]) -> Tensor:
    """Rows ``[N, F]`` of blocks ``[steps, rows, F]``; of one a view."""
    rows = [block.flatten(0, -2) for block in blocks]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _as_batch(blocks: list[Tensor], plan: Plan) -> Tensor:
    """Outputs as a batch, in memory that nobody reads in the backward pass."""
    if not plan.is_dense:
        return plan.unpack(_joined(blocks))
    batches = [block.transpose(0, 1) for block in blocks]
    if len(batches) > 1:
        return torch.cat(batches, dim=1)
    return batches[0].clone(memory_format=torch.contiguous_format)


def _unpacked(rows: Tensor, plan: Plan) -> Tensor:
    """Rows as a batch, and no view, which nobody might change in place."""
    y = rows.new_empty(*plan.shape, rows.shape[1])
    torch.index_select(rows, 0, plan.position, out=y.view(-1, rows.shape[1]))
    return y


def _without_gaps(grads: list[Tensor], wide: tuple, plan: Plan, d_y: Tensor) -> list[Tensor]:
    """Gradients without those of the entry; computed anew where one got through a gap."""
    inputs = wide[0].shape[1] - 1
    if _all_zero(grads[0], plan.gaps):
        return [grads[0][:, :inputs], grads[1][:, :inputs].contiguous(), *grads[2:]]
    given = [t.detach() for t in (wide[0][:, :inputs], wide[1][:, :inputs], *wide[2:])]
    with torch.enable_grad():
        leaves = [t.contiguous().requires_grad_() for t in given]
        y, _ = _run_with_resets(leaves, plan)
        return list(torch.autograd.grad(y, leaves, d_y))


def _all_zero(rows: Tensor, gaps: Tensor) -> bool:
    return torch.linalg.vector_norm(rows.index_select(0, gaps)).item() <= _ALMOST_ZERO


def _run_with_resets(given: Any, plan: Plan) -> tuple[Tensor, Tensor]:
    """Run the rows by the fused loop, which takes zeros for what enters and leaves padding."""
    x, w_ih, w_hh, b_ih, b_hh, h, c = given
    rows = plan.sizes[0]
    where = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    where = where.index_fill_(0, plan.padding, True).view(-1, rows)
    where[1:] |= where[:-1].clone()
    zeros = h.new_zeros(()).expand(*where.shape, h.shape[1])
    keep = torch.is_grad_enabled()
    y, cells, *_ = ops.lstm(x, w_ih, w_hh, b_ih, b_hh, h, c, (), where, zeros, zeros, keep)
    return y, cells.detach()


def _cut(plan: Plan, inputs: int, hidden: int, with_workspace: bool) -> Iterator[tuple[int, int]]:
    """Steps and rows of the blocks to run: those of the plan, cut where workspaces grow large."""
    for _, steps, rows in plan.blocks:
        size = with_workspace * size_of(steps, rows, inputs, hidden)
        pieces = max(1, min(-(-size // _MOST_KEPT), steps))
        for k in range(pieces):
            yield steps * (k + 1) // pieces - steps * k // pieces, rows


def _add(sums: list[Tensor], terms: list[Tensor]) -> list[Tensor]:
    if not sums:
        return terms
    return [a.add_(b) for a, b in zip(sums, terms, strict=True)]


class _Wanted:
    """Cell states taken out of the blocks that ran: after all steps, or segments' first ones.

    Attributes:
        cells: ``[N, H]`` or ``[S, H]``; None once some could not be found.
    """

    def __init__(self, plan: Plan, only_starts: bool, like: Tensor) -> None:
        self.rows = plan.start_rows if only_starts else None
        self.on_host = plan.start_rows_on_host
        count = len(plan.source if self.rows is None else self.rows)
        self.cells: Tensor | None = like.new_empty(count, like.shape[1])

    def take(self, ran: Ran, inputs: int, begin: int) -> None:
        """Take what is wanted of a block that begins at row ``begin``."""
        steps, size, hidden = ran.y.shape
        last, end = begin + (steps - 1) * size, begin + steps * size
        bounds = begin, last, end
        if self.rows is not None:
            bounds = self.on_host.searchsorted(bounds).tolist()
        if self.cells is None or bounds[0] == bounds[2]:
            return
        found = hidden_cells(ran, inputs)
        if found is None:
            self.cells = None
            return
        for rows, k, first in ((found.view(-1, hidden), 0, begin), (ran.c, 1, last)):
            out = self.cells[bounds[k] : bounds[k + 1]]
            if self.rows is None:
                out.copy_(rows)
            elif len(out):
                index = self.rows[bounds[k] : bounds[k + 1]]
                torch.index_select(rows, 0, index - first if first else index, out=out)
