"""The fused sequence loops as custom operators: one node each for autograd, vmap and compile.

The size of a graph with such an operator does not depend on the number of steps. A second
derivative raises an error that names the backend that supports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import fused_gru, fused_lstm
from .cut_rows import lay_out


@torch.library.custom_op("rnnkeys::lstm", mutates_args=())
def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    sizes: Sequence[int],
    where: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ``lstm_forward``; a dense batch passes ``where [T, B]`` and the reset states."""
    rows = lay_out(sizes, where, reset_h, reset_c)
    bias = None if b_ih is None or b_hh is None else b_ih + b_hh
    start_h, start_c = rows.starts((h0, c0))
    # Activations stay packed: only the backward pass reads them.
    h, c, i_f_o, g = fused_lstm.lstm_forward(
        rows.pack(x), w_ih, w_hh, bias, (start_h, start_c), rows.sizes, rows.resets, keep
    )
    return rows.unpack(h), rows.unpack(c), i_f_o, g


@torch.library.custom_op("rnnkeys::lstm_backward", mutates_args=())
def lstm_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    h: Tensor,
    c: Tensor,
    i_f_o: Tensor,
    g: Tensor,
    sizes: Sequence[int],
    where: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    want_x_grad: bool,
    want_reset_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run ``lstm_backward``; gradients that are not wanted are empty."""
    rows = lay_out(sizes, where, reset_h, reset_c)
    start_h, start_c = rows.starts((h0, c0))
    grads = fused_lstm.lstm_backward(
        (_if_given(rows.pack, grad_h), _if_given(rows.pack, grad_c)),
        (w_ih, w_hh),
        rows.pack(x),
        (start_h, start_c),
        (rows.pack(h), rows.pack(c), i_f_o, g),
        rows.sizes,
        rows.resets,
        want_x_grad,
        want_reset_grad,
    )
    dh, d_reset_h = rows.split_start_grad(grads.h0, grads.reset_h)
    dc, d_reset_c = rows.split_start_grad(grads.c0, grads.reset_c)
    if not want_reset_grad:
        d_reset_h = d_reset_c = None
    d_x = _if_given(rows.unpack, grads.x)
    d_x, d_reset_h, d_reset_c = (_or_empty(d, h) for d in (d_x, d_reset_h, d_reset_c))
    return d_x, grads.w_ih, grads.w_hh, grads.bias, dh, dc, d_reset_h, d_reset_c


@torch.library.custom_op("rnnkeys::gru", mutates_args=())
def gru(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    sizes: Sequence[int],
    where: Tensor | None,
    reset_h: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``gru_forward``; a dense batch passes ``where [T, B]`` and the reset states."""
    rows = lay_out(sizes, where, reset_h)
    (start,) = rows.starts((h0,))
    # Activations stay packed: only the backward pass reads them.
    h, r_z, n = fused_gru.gru_forward(
        rows.pack(x), w_ih, w_hh, b_ih, b_hh, start, rows.sizes, rows.resets, keep
    )
    return rows.unpack(h), r_z, n


@torch.library.custom_op("rnnkeys::gru_backward", mutates_args=())
def gru_backward(
    grad_h: Tensor,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    h: Tensor,
    r_z: Tensor,
    n: Tensor,
    sizes: Sequence[int],
    where: Tensor | None,
    reset_h: Tensor | None,
    want_x_grad: bool,
    want_reset_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run ``gru_backward``; gradients that are not wanted are empty."""
    rows = lay_out(sizes, where, reset_h)
    (start,) = rows.starts((h0,))
    grads = fused_gru.gru_backward(
        rows.pack(grad_h),
        (w_ih, w_hh, b_hh),
        rows.pack(x),
        start,
        (rows.pack(h), r_z, n),
        rows.sizes,
        rows.resets,
        want_x_grad,
        want_reset_grad,
    )
    dh, d_reset = rows.split_start_grad(grads.h0, grads.reset_h)
    d_x = _or_empty(_if_given(rows.unpack, grads.x), h)
    d_reset = _or_empty(d_reset if want_reset_grad else None, h)
    return d_x, grads.w_ih, grads.w_hh, grads.b_ih, grads.b_hh, dh, d_reset


def _if_given(function: Callable[[Tensor], Tensor], rows: Tensor | None) -> Tensor | None:
    return None if rows is None else function(rows)


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if grad is None else grad


def _wants(ctx: Any, index: int) -> bool:
    return bool(ctx.needs_input_grad[index])


def _like(tensor: Tensor) -> Tensor:
    """Return an empty contiguous tensor of the same shape, whatever the strides of ``tensor``."""
    return tensor.new_empty(tensor.shape)


def _like_if(tensor: Tensor, wanted: bool) -> Tensor:
    return _like(tensor) if wanted else tensor.new_empty(0)


@lstm.register_fake
def _lstm_fake(x, w_ih, w_hh, b_ih, b_hh, h0, c0, sizes, where, reset_h, reset_c, keep):
    hidden, rows = w_hh.shape[1], x.shape[0]
    kept = rows if keep else 0
    widths = ((rows, hidden), (rows, hidden), (kept, 3 * hidden), (kept, hidden))
    return tuple(x.new_empty(size) for size in widths)


@gru.register_fake
def _gru_fake(x, w_ih, w_hh, b_ih, b_hh, h0, sizes, where, reset_h, keep):
    hidden, rows = w_hh.shape[1], x.shape[0]
    kept = rows if keep else 0
    widths = ((rows, hidden), (kept, 2 * hidden), (kept, hidden))
    return tuple(x.new_empty(size) for size in widths)


@lstm_backward.register_fake
def _lstm_backward_fake(
    grad_h,
    grad_c,
    x,
    w_ih,
    w_hh,
    h0,
    c0,
    h,
    c,
    i_f_o,
    g,
    sizes,
    where,
    reset_h,
    reset_c,
    want_x_grad,
    want_reset_grad,
):
    resets = (_like_if(h if s is None else s, want_reset_grad) for s in (reset_h, reset_c))
    d_x, d_b = _like_if(x, want_x_grad), w_ih.new_empty(w_ih.shape[0])
    return d_x, _like(w_ih), _like(w_hh), d_b, torch.empty_like(h0), torch.empty_like(c0), *resets


@gru_backward.register_fake
def _gru_backward_fake(
    grad_h, x, w_ih, w_hh, b_hh, h0, h, r_z, n, sizes, where, reset_h, want_x_grad, want_reset_grad
):
    d_reset = _like_if(h if reset_h is None else reset_h, want_reset_grad)
    d_x, (d_b_ih, d_b_hh) = _like_if(x, want_x_grad), (w_ih.new_empty(len(w_ih)) for _ in "ih")
    return d_x, _like(w_ih), _like(w_hh), d_b_ih, d_b_hh, torch.empty_like(h0), d_reset


def _lstm_setup(ctx, inputs, output):
    x, w_ih, w_hh, _, b_hh, h0, c0, ctx.sizes, where, reset_h, reset_c, _ = inputs
    ctx.has_biases = b_hh is not None
    ctx.save_for_backward(x, w_ih, w_hh, h0, c0, *output, where, reset_h, reset_c)
    ctx.set_materialize_grads(False)


def _lstm_grad(ctx, grad_h, grad_c, *_):
    *most, where, reset_h, reset_c = ctx.saved_tensors
    wants = _wants(ctx, 0), _wants(ctx, 9) or _wants(ctx, 10)
    grads = lstm_backward(grad_h, grad_c, *most, ctx.sizes, where, reset_h, reset_c, *wants)
    d_x, d_w_ih, d_w_hh, d_b, dh, dc, *d_resets = grads
    # A copy: changing the gradient of one bias in place must not change the other.
    d_biases = (d_b, d_b.clone()) if ctx.has_biases else (None, None)
    resets = d_resets if wants[1] else (None, None)
    of_x = d_x if wants[0] else None
    return of_x, d_w_ih, d_w_hh, *d_biases, dh, dc, None, None, *resets, None


def _gru_setup(ctx, inputs, output):
    x, w_ih, w_hh, _, b_hh, h0, ctx.sizes, where, reset_h, _ = inputs
    ctx.save_for_backward(x, w_ih, w_hh, b_hh, h0, *output, where, reset_h)
    ctx.set_materialize_grads(False)


def _gru_grad(ctx, grad_h, *_):
    if grad_h is None:
        return (None,) * 10
    *most, where, reset_h = ctx.saved_tensors
    wants = _wants(ctx, 0), _wants(ctx, 8)
    grads = gru_backward(grad_h, *most, ctx.sizes, where, reset_h, *wants)
    d_x, d_w_ih, d_w_hh, d_b_ih, d_b_hh, dh, d_reset = grads
    d_biases = (None, None) if most[3] is None else (d_b_ih, d_b_hh)
    of_x, of_reset = d_x if wants[0] else None, d_reset if wants[1] else None
    return of_x, d_w_ih, d_w_hh, *d_biases, dh, None, None, of_reset, None


lstm.register_autograd(_lstm_grad, setup_context=_lstm_setup)
gru.register_autograd(_gru_grad, setup_context=_gru_setup)


def raise_second_derivative(ctx, *grads):
    """Raise: hand-written backward passes are differentiated once, those of scans too.

    Raises:
        RuntimeError: always, with the remedy.
    """
    raise RuntimeError(
        "The recurrent kernels have no second derivative (a gradient made with "
        "create_graph=True was differentiated again). Build the module with "
        "recurrent_backend='loop', which any order of autograd sees through."
    )


for _op in (lstm_backward, gru_backward):
    _op.register_autograd(raise_second_derivative, setup_context=lambda ctx, inputs, output: None)


def map_by_loop(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """Make a vmap rule that runs the operator once per element and stacks the results."""

    def rule(info, in_dims, *args):
        results = []
        for k in range(info.batch_size):
            picked = [
                a if d is None or not isinstance(a, Tensor) else a.select(d, k)
                for a, d in zip(args, in_dims, strict=True)
            ]
            results.append(op(*picked))
        outputs = tuple(torch.stack(entry) for entry in zip(*results, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


for _op in (lstm, gru, lstm_backward, gru_backward):
    _op.register_vmap(map_by_loop(_op))
