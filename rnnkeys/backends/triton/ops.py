"""The Triton recurrence as custom operators: one runs a layer, one its gradient.

A compiled graph has one node for each, for any number of steps. Both take the precision as an
argument, so that a backward pass uses the precision of its forward pass, on any thread.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ...precision import library_matmuls
from ..ops import raise_second_derivative
from . import products
from .mapping import map_rows
from .products import Problem


@torch.library.custom_op("rnnkeys::triton_layer", mutates_args=())
def layer(
    cell: str,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reset_h: Tensor,
    reset_c: Tensor | None,
    is_init: Tensor,
    order: Tensor,
    dtype: torch.dtype,
    precision: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer; see :func:`rnnkeys.backends.triton.unroll`.

    Returns:
        ``h`` and ``c``, each ``[B, T, H]`` (``c`` is empty for a GRU), and with ``keep`` the
        activations ``[B, T, 4H]`` (else empty).
    """
    from . import launch

    p = Problem(cell, x, w_ih, w_hh, b_ih, b_hh, reset_h, reset_c, is_init, dtype, precision)
    with library_matmuls(p.precision), _no_autocast(x):
        gates = products.project(p)
    h = w_hh.new_empty(*x.shape[:2], p.hidden)
    c = h.new_empty(0) if reset_c is None else torch.empty_like(h)
    states, resets = ((h,), (reset_h,)) if reset_c is None else ((h, c), (reset_h, reset_c))
    w = w_hh.to(dtype).contiguous()
    flags = launch.Flags(is_init.contiguous(), order)
    launch.forward(cell, gates, states, resets, flags, w, p.inner_bias, keep, p.precision)
    return h, c, gates if keep else gates.new_empty(0)


@torch.library.custom_op("rnnkeys::triton_layer_backward", mutates_args=())
def layer_backward(
    grad_h: Tensor,
    grad_c: Tensor | None,
    cell: str,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reset_h: Tensor,
    reset_c: Tensor | None,
    is_init: Tensor,
    order: Tensor,
    dtype: torch.dtype,
    precision: str,
    h: Tensor,
    c: Tensor,
    act: Tensor,
    kept: bool,
    want_x: bool,
    want_weights: bool,
    want_reset: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, the four parameters and the two resets.

    Gradients that are not wanted are empty.
    """
    from . import launch

    p = Problem(cell, x, w_ih, w_hh, b_ih, b_hh, reset_h, reset_c, is_init, dtype, precision)
    w = w_hh.to(dtype).contiguous()
    state, reset = (h, reset_h) if reset_c is None else (c, reset_c)
    direct = torch.zeros_like(h) if want_reset else None
    with library_matmuls(p.precision), _no_autocast(x):
        h_tm1 = products.gather_entering_states(p, h) if want_weights or not kept else h
        if not kept:
            act = products.recompute_activations(p, h_tm1)
        d_gates = torch.empty_like(act)
        grads = (grad_h.contiguous(), None if grad_c is None else grad_c.contiguous())
        grads, scale = products.scale_into_range(p, grads)
        flags = launch.Flags(is_init.contiguous(), order)
        launch.backward(cell, grads, act, state, reset, flags, w, d_gates, direct, p.precision)
        d_x = products.input_grad(p, d_gates) if want_x else h.new_empty(0)
        d_weights = [h.new_empty(0) for _ in range(4)]
        if want_weights:
            d_weights = products.weight_grads(p, d_gates, h_tm1)
        d_resets = (h.new_empty(0), h.new_empty(0))
        if direct is not None:
            d_resets = products.reset_grads(p, d_gates, direct)
        results = products.scale_back((d_x, *d_weights, *d_resets), scale)
    return cast(Any, results)


def _no_autocast(x: Tensor) -> torch.autocast:
    """Turn autocast off: the caller has applied it already, so products keep their dtypes."""
    return torch.autocast(x.device.type, enabled=False)


@layer.register_fake
def _layer_fake(
    cell, x, w_ih, w_hh, b_ih, b_hh, reset_h, reset_c, is_init, order, dtype, precision, keep
):  # fmt: skip
    hidden = w_hh.shape[1]
    h = w_hh.new_empty(*x.shape[:2], hidden)
    c = h.new_empty(0) if reset_c is None else torch.empty_like(h)
    kept = (*x.shape[:2], 4 * hidden) if keep else (0,)
    return h, c, x.new_empty(kept, dtype=dtype)


@layer_backward.register_fake
def _layer_backward_fake(
    grad_h, grad_c, cell, x, w_ih, w_hh, b_ih, b_hh, reset_h, reset_c, is_init, order, dtype,
    precision, h, c, act, kept, want_x, want_weights, want_reset,
):  # fmt: skip
    def like(tensor, wanted):
        if tensor is None or not wanted:
            return h.new_empty(0)
        return tensor.new_empty(tensor.shape)

    parameters = (like(w, want_weights) for w in (w_ih, w_hh, b_ih, b_hh))
    resets = (like(None if r is None else h, want_reset) for r in (reset_h, reset_c))
    return like(x, want_x), *parameters, *resets


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.cell, *tensors, ctx.dtype, ctx.precision, ctx.kept = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, _: Tensor | None) -> Any:
    *inputs, h, c, act = ctx.saved_tensors
    x, w_ih, w_hh, b_ih, b_hh, reset_h, reset_c, is_init, order = inputs
    wants = ctx.needs_input_grad
    if grad_h is None:
        grad_h = torch.zeros_like(h)
    d_x, *d_weights, d_reset_h, d_reset_c = layer_backward(
        grad_h, None if reset_c is None else grad_c,
        ctx.cell, *inputs, ctx.dtype, ctx.precision,
        h, c, act, ctx.kept, wants[1], any(wants[2:6]), any(wants[6:8]),
    )  # fmt: skip
    grads = (d_x, *d_weights, d_reset_h, d_reset_c)
    given = [g if want else None for g, want in zip(grads, wants[1:8], strict=True)]
    return None, *given, None, None, None, None, None


layer.register_autograd(_grad, setup_context=_setup)
layer_backward.register_autograd(
    raise_second_derivative, setup_context=lambda ctx, inputs, output: None
)
layer.register_vmap(map_rows(layer, parameters=range(2, 6), is_init=8))
layer_backward.register_vmap(
    map_rows(layer_backward, parameters=range(4, 8), is_init=10, per_element=19)
)
