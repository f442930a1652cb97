"""oneDNN's LSTM kernel over blocks of packed rows, with the cell states it hides.

The kernel returns outputs and the last cell state. It keeps the others in the workspace for its
backward pass, from where they are copied. Where they lie is no part of its interface, so it is
probed once for every size, and in every block the last step is computed again from what was found
and compared with the returned state.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cells import LSTM_CELL, Weights

# Relative to the largest state: rounding differs a little, a wrong place differs a lot.
_END_TOLERANCE = 1e-4
_LSTM_MODE = 2
# Elements of a page, on which oneDNN begins every part of its workspace.
_PAGE = 1024


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


def run(
    weights: Weights,
    x: Tensor,
    start: tuple[Tensor, Tensor],
    blocks: list[tuple[int, int, int]],
    only_starts: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run one layer over packed rows.

    Args:
        weights: of the layer, without projection.
        x: inputs ``[N, I]``, contiguous.
        start: ``(h, c)`` the segments start from, each ``[S, H]``, contiguous.
        blocks: ``(first step, number of steps, rows)``.
        only_starts: whether cell states after segments' first steps suffice.

    Returns:
        Outputs ``[N, H]`` and cell states, detached: after every step, ``[N, H]``, or after the
        segments' first steps, ``[S, H]``; None if they could not be found.
    """
    b_ih, b_hh = weights.b_ih, weights.b_hh
    if b_ih is None or b_hh is None:
        b_ih = b_hh = x.new_zeros(weights.w_hh.shape[0])
    given = (x, weights.w_ih, weights.w_hh, b_ih, b_hh, *start)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return _Blocks.apply(*given, blocks, keep, only_starts)


class _Ran(NamedTuple):
    """What oneDNN made of a block: outputs ``[T, B, H]``, last state, and its workspace."""

    y: Tensor
    h: Tensor
    c: Tensor
    workspace: Tensor


class _Blocks(torch.autograd.Function):
    """Blocks of packed rows, by the operators beneath ``nn.LSTM``, as one node of autograd."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any):
        *given, ctx.blocks, keep, only_starts = arguments
        x, *weights, h, c = (t.detach() for t in given)
        cells = None if only_starts else x.new_empty(x.shape[0], h.shape[1])
        y, kept, row = None, [], 0
        for _, steps, rows in ctx.blocks:
            block = slice(row, row + steps * rows)
            h, c = h[:rows], c[:rows]
            rows_x = x[block].view(steps, rows, -1)
            ran = _run_block(weights, rows_x, h, c, keep or not only_starts)
            found = _hidden_cells(ran, x.shape[1])
            if only_starts and row == 0:
                cells = _first_cells(ran, found)
            elif cells is not None and not only_starts:
                cells = _store_cells(ran, found, cells, block)
            y = _store(ran.y.flatten(0, 1), y, block, x.shape[0])
            if keep:
                kept += [h, c, ran.h, ran.c, ran.workspace]
            h, c, row = ran.h, ran.c, block.stop
        if keep:
            ctx.save_for_backward(x, y, *weights, *kept)
        if cells is not None:
            ctx.mark_non_differentiable(cells)
        # No zeros for the gradient of cells, which has no reader.
        ctx.set_materialize_grads(False)
        return y, cells

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        refuse_second_order()
        x, y, *rest = ctx.saved_tensors
        weights, kept = rest[:4], rest[4:]
        d_y, d_x = grads[0].contiguous(), None
        dh, dc = torch.zeros_like(kept[0]), torch.zeros_like(kept[1])
        d_weights: list[Tensor] = []
        end = x.shape[0]
        for k in range(len(ctx.blocks) - 1, -1, -1):
            _, steps, rows = ctx.blocks[k]
            block, end = slice(end - steps * rows, end), end - steps * rows
            h, c, last_h, last_c, workspace = kept[5 * k : 5 * k + 5]
            x_k, y_k, d_y_k = (t[block].view(steps, rows, -1) for t in (x, y, d_y))
            # Positions: see aten::mkldnn_rnn_layer_backward.
            d_x_k, *d_weights_k, _, dh_k, dc_k = torch.ops.aten.mkldnn_rnn_layer_backward(
                *(x_k, *weights, h, c, y_k, last_h, last_c, d_y_k, dh[:rows], dc[:rows]),
                *(False, _LSTM_MODE, y.shape[1], 1, True, True, False, [], False, workspace),
            )
            d_x = _store(d_x_k.flatten(0, 1), d_x, block, x.shape[0])
            dh[:rows], dc[:rows] = dh_k, dc_k
            d_weights = _add(d_weights, d_weights_k)
        d_w_ih, d_w_hh, d_b = d_weights
        # Both biases have one gradient; whoever changes that of one in place must not meet both.
        return d_x, d_w_ih, d_w_hh, d_b, d_b.clone(), dh, dc, None, None, None


def _add(sums: list[Tensor], terms: list[Tensor]) -> list[Tensor]:
    if not sums:
        return terms
    return [a.add_(b) for a, b in zip(sums, terms, strict=True)]


def _run_block(weights, x: Tensor, h: Tensor, c: Tensor, with_workspace: bool) -> _Ran:
    """Run ``x [T, B, I]``; it leaves a workspace only where gradients are recorded."""
    with torch.set_grad_enabled(with_workspace):
        y, h, c, workspace = torch.mkldnn_rnn_layer(  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            *(x, *weights, h, c),
            *(False, [], _LSTM_MODE, h.shape[1], 1, True, False, False, with_workspace),
        )
    # Without gradients there is none: torch gives None.
    return _Ran(y, h, c, y.new_empty(0) if workspace is None else workspace)


def _store(rows: Tensor, out: Tensor | None, block: slice, total: int) -> Tensor:
    """Write rows into ``out [total, H]``, which is made unless the rows are all there are."""
    if rows.shape[0] == total:
        return rows
    out = rows.new_empty(total, rows.shape[1]) if out is None else out
    out[block] = rows
    return out


def _store_cells(ran: _Ran, found: Tensor | None, cells: Tensor, block: slice) -> Tensor | None:
    """Write a block's cell states into ``cells [N, H]``; None if they are hidden well."""
    if found is None:
        return None
    out = cells[block].view_as(ran.y)
    out[:-1] = found
    out[-1] = ran.c
    return cells


def _first_cells(ran: _Ran, found: Tensor | None) -> Tensor | None:
    if ran.y.shape[0] == 1:
        return ran.c.clone()
    return None if found is None else found[0].clone()


def _hidden_cells(ran: _Ran, inputs: int) -> Tensor | None:
    """View the cell states after all steps but the last, ``[T - 1, B, H]``, in the workspace.

    None if they are not where they are looked for.
    """
    hidden = ran.y.shape[2]
    if ran.workspace.numel() == 0 or not _workspace_is_known(inputs, hidden):
        return None
    parts = _in_workspace(ran, inputs)
    if parts is None:
        return None
    cells, gates = parts
    if not len(cells):
        return cells
    # One row tells a wrong place from the right one. If it is not finite it tells nothing, and must
    # not change how the others are computed.
    row = slice(-1, None)
    error = _error(gates[-1, row], cells[-1, row], ran.c[row])
    if error.max() <= _END_TOLERANCE * ran.c[row].abs().max():
        return cells
    finite = ran.c.isfinite()
    error = _error(gates[-1], cells[-1], ran.c)
    worst, largest = (torch.where(finite, t, 0).max() for t in (error, ran.c.abs()))
    return cells if worst <= _END_TOLERANCE * largest else None


def _error(gates: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Difference of ``c`` after a step from what its gates make of ``c`` before it."""
    i, f, g, _ = gates.chunk(4, 1)
    return torch.addcmul(i * g, f, before).sub_(after).abs_()


def _in_workspace(ran: _Ran, inputs: int) -> tuple[Tensor, Tensor] | None:
    """View cell states ``[T - 1, B, H]`` and activated gates ``[T, B, 4H]``; None if none fit.

    oneDNN lays out: gates, two parts of outputs, and cell states, which begin with two entries for
    every step that it does not use here.
    """
    steps, rows, hidden = ran.y.shape
    flat = ran.workspace.view(torch.float32).flatten()
    width = _padded(4 * hidden)
    parts = (
        steps * rows * width,
        steps * rows * _padded(hidden),
        2 * (steps + 1) * rows * _padded(max(inputs, hidden)),
    )
    first = sum(-(-size // _PAGE) * _PAGE for size in parts) + (steps + 2) * rows * hidden
    cells = flat[first : first + (steps - 1) * rows * hidden]
    if cells.numel() < (steps - 1) * rows * hidden:
        return None
    gates = flat[: parts[0]].view(steps, rows, width)[..., : 4 * hidden]
    return cells.view(steps - 1, rows, hidden), gates


def _padded(width: int) -> int:
    """Elements of a row: a multiple of 16, and 16 more where that is a multiple of 256."""
    width = -(-width // 16) * 16
    return width + 16 * (width % 256 == 0)


@functools.cache
def _workspace_is_known(inputs: int, hidden: int) -> bool:
    """Whether states lie where they are looked for, by a small example."""
    steps, rows = 4, 3
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) - 0.5

    sizes = ((4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
    weights = Weights(*(draw(*size) for size in sizes))
    x, h, c = draw(steps, rows, inputs), draw(rows, hidden), draw(rows, hidden)
    ran = _run_block(weights[:4], x, h, c, with_workspace=True)
    with torch.no_grad():
        expected, state = [], (h, c)
        for x_t in x:
            state = LSTM_CELL.step(weights, LSTM_CELL.input_gates(weights, x_t), state)
            expected.append(state[1])
        found = _in_workspace(ran, inputs)
    if found is None:
        return False
    return torch.allclose(found[0], torch.stack(expected[:-1]), rtol=0, atol=1e-5)
