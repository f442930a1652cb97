"""The fused sequence loops as one custom operator: one node for autograd, vmap and compile.

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


@torch.library.custom_op("rnnkeys::gated_layer", mutates_args=())
def layer(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    sizes: Sequence[int],
    where: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one layer of an LSTM, or of a GRU, which has no ``c0``.

    Args:
        x: ``[N, I]``, flat time-major rows.
        w_ih: ``[G*H, I]``.
        w_hh: ``[G*H, H]``.
        b_ih: ``[G*H]`` or None.
        b_hh: ``[G*H]`` or None.
        h0: before the first step, ``[B, H]``.
        c0: before the first step, ``[B, H]``; None for a GRU.
        sizes: number of rows of every step; not read with ``where``.
        where: bool ``[T, B]``, resets of a dense batch; None for packed rows.
        reset_h: ``[T, B, H]``, the states that resets write.
        reset_c: ``[T, B, H]``; None for a GRU.
        keep: whether to return the activated gates, which the backward pass reads.

    Returns:
        ``h`` and ``c``, each ``[N, H]`` (``c`` is empty for a GRU), and the activated sigmoid gates
        and tanh gate (empty without ``keep``).
    """
    rows = lay_out(sizes, where, reset_h, reset_c)
    run = fused_gru.gru_forward if c0 is None else fused_lstm.lstm_forward
    start = rows.starts(_given(h0, c0))
    # Activations stay packed: only the backward pass reads them.
    *states, gates, candidate = run(
        rows.pack(x), w_ih, w_hh, b_ih, b_hh, start, rows.sizes, rows.resets, keep
    )
    h, *c = map(rows.unpack, states)
    return h, c[0] if c else h.new_empty(0), gates, candidate


@torch.library.custom_op("rnnkeys::gated_layer_backward", mutates_args=())
def layer_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    candidate: Tensor,
    sizes: Sequence[int],
    where: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    want_x_grad: bool,
    want_reset_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, the four parameters, the first and the reset states.

    Gradients that are not wanted, and those of a GRU's ``c``, are empty.
    """
    rows = lay_out(sizes, where, reset_h, reset_c)
    run = fused_gru.gru_backward if c0 is None else fused_lstm.lstm_backward
    states = (h,) if c0 is None else (h, c)
    grads = run(
        tuple(_if_given(rows.pack, grad) for grad in (grad_h, grad_c)[: len(states)]),
        (w_ih, w_hh, b_hh),
        rows.pack(x),
        rows.starts(_given(h0, c0)),
        (*map(rows.pack, states), gates, candidate),
        rows.sizes,
        rows.resets,
        want_x_grad,
        want_reset_grad,
    )
    resets = grads.resets or (None,) * len(states)
    split = [rows.split_start_grad(*pair) for pair in zip(grads.starts, resets, strict=True)]
    d_starts = [start for start, _ in split]
    d_resets = [reset if want_reset_grad else None for _, reset in split]
    d_x = _if_given(rows.unpack, grads.x)
    parameters = (grads.w_ih, grads.w_hh, grads.b_ih, grads.b_hh)
    results = (d_x, *parameters, *_pair(d_starts), *_pair(d_resets))
    d_x, d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_h, d_c, d_reset_h, d_reset_c = (
        h.new_empty(0) if grad is None else grad for grad in results
    )
    return d_x, d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_h, d_c, d_reset_h, d_reset_c


def _given(h: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
    return (h,) if c is None else (h, c)


def _pair(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of ``h`` and ``c``, None for a GRU's ``c``."""
    return grads[0], grads[1] if len(grads) > 1 else None


def _if_given(function: Callable[[Tensor], Tensor], rows: Tensor | None) -> Tensor | None:
    return None if rows is None else function(rows)


@layer.register_fake
def _layer_fake(x, w_ih, w_hh, b_ih, b_hh, h0, c0, sizes, where, reset_h, reset_c, keep):
    gates, hidden = w_hh.shape
    rows = x.shape[0]
    kept = rows if keep else 0
    c = x.new_empty(0) if c0 is None else x.new_empty(rows, hidden)
    kept_gates = x.new_empty(kept, gates - hidden), x.new_empty(kept, hidden)
    return x.new_empty(rows, hidden), c, *kept_gates


@layer_backward.register_fake
def _layer_backward_fake(
    grad_h, grad_c, x, w_ih, w_hh, b_hh, h0, c0, h, c, gates, candidate, sizes, where, reset_h,
    reset_c, want_x_grad, want_reset_grad,
):  # fmt: skip
    def like(tensor, wanted=True):
        # Contiguous, whatever the strides of the tensor.
        return h.new_empty(tensor.shape if wanted and tensor is not None else 0)

    bias = (h.new_empty(w_ih.shape[0]) for _ in range(2))
    starts = (h.new_empty(0) if s is None else torch.empty_like(s) for s in (h0, c0))
    resets = (like(s, want_reset_grad) for s in (reset_h, reset_c))
    return like(x, want_x_grad), like(w_ih), like(w_hh), *bias, *starts, *resets


def _setup(ctx, inputs, output):
    x, w_ih, w_hh, _, b_hh, h0, c0, ctx.sizes, where, reset_h, reset_c, _ = inputs
    ctx.save_for_backward(x, w_ih, w_hh, b_hh, h0, c0, *output, where, reset_h, reset_c)
    ctx.set_materialize_grads(False)


def _grad(ctx, grad_h, grad_c, *_):
    *most, where, reset_h, reset_c = ctx.saved_tensors
    b_hh = most[3]
    c0 = most[5]
    grad_c = None if c0 is None else grad_c
    if grad_h is None and grad_c is None:
        return (None,) * 12
    want_x = ctx.needs_input_grad[0]
    want_resets = any(ctx.needs_input_grad[9:11])
    grads = layer_backward(
        grad_h, grad_c, *most, ctx.sizes, where, reset_h, reset_c, want_x, want_resets
    )
    has_biases = b_hh is not None
    is_lstm = c0 is not None
    of_parameters = (True, True, has_biases, has_biases)
    wanted = (want_x, *of_parameters, True, is_lstm, want_resets, want_resets and is_lstm)
    given = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    *of_inputs, d_reset_h, d_reset_c = given
    return *of_inputs, None, None, d_reset_h, d_reset_c, None


layer.register_autograd(_grad, setup_context=_setup)


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


layer_backward.register_autograd(
    raise_second_derivative, setup_context=lambda ctx, inputs, output: None
)


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


for _op in (layer, layer_backward):
    _op.register_vmap(map_by_loop(_op))
