"""The fused sequence loops as custom operators: one node each for autograd, vmap and compile.

A graph that holds such an operator does not grow with the number of steps. Second derivatives are
not defined; asking for them raises an error that names the backend that has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import fused


def _sizes(sizes: Sequence[int], where: Tensor | None, rows: int) -> list[int]:
    """Rows of every step; a dense batch names them by its reset mask ``[T, B]``."""
    if where is None:
        return list(sizes)
    return [where.shape[1]] * where.shape[0]


@torch.library.custom_op("rnnkeys::lstm", mutates_args=())
def lstm(
    gates: Tensor,
    w_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    sizes: Sequence[int],
    where: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`fused.lstm_forward`; dense batches give ``where [T, B]`` and its states."""
    resets = _resets(where, reset_h, reset_c)
    return fused.lstm_forward(
        gates, w_hh, (h0, c0), _sizes(sizes, where, gates.shape[0]), resets, keep
    )


@torch.library.custom_op("rnnkeys::lstm_backward", mutates_args=())
def lstm_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    w_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    h: Tensor,
    c: Tensor,
    act: Tensor,
    sizes: Sequence[int],
    where: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    want_reset_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`fused.lstm_backward`; reset gradients that were not asked for are empty."""
    resets = _resets(where, reset_h, reset_c)
    steps = _sizes(sizes, where, act.shape[0])
    grads = fused.lstm_backward(
        grad_h, grad_c, w_hh, (h0, c0), (h, c, act), steps, resets, want_reset_grad
    )
    *most, d_reset_h, d_reset_c = grads
    gates, d_w, dh, dc = most
    return gates, d_w, dh, dc, _or_empty(d_reset_h, h), _or_empty(d_reset_c, h)


@torch.library.custom_op("rnnkeys::gru", mutates_args=())
def gru(
    gates: Tensor,
    w_hh: Tensor,
    bias_n: Tensor,
    h0: Tensor,
    sizes: Sequence[int],
    where: Tensor | None,
    reset_h: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Run :func:`fused.gru_forward`; dense batches give ``where [T, B]`` and its states."""
    resets = _resets(where, reset_h)
    return fused.gru_forward(
        gates, w_hh, bias_n, h0, _sizes(sizes, where, gates.shape[0]), resets, keep
    )


@torch.library.custom_op("rnnkeys::gru_backward", mutates_args=())
def gru_backward(
    grad_h: Tensor,
    w_hh: Tensor,
    h0: Tensor,
    h: Tensor,
    act: Tensor,
    sizes: Sequence[int],
    where: Tensor | None,
    reset_h: Tensor | None,
    want_reset_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`fused.gru_backward`; a reset gradient that was not asked for is empty."""
    resets = _resets(where, reset_h)
    steps = _sizes(sizes, where, act.shape[0])
    grads = fused.gru_backward(grad_h, w_hh, h0, (h, act), steps, resets, want_reset_grad)
    *most, d_reset = grads
    gates, d_w, d_b, dh = most
    return gates, d_w, d_b, dh, _or_empty(d_reset, h)


def _resets(where: Tensor | None, *state: Tensor | None) -> fused.Resets | None:
    if where is None:
        return None
    return fused.Resets(where, tuple(s for s in state if s is not None))


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if grad is None else grad


def _wants(ctx: Any, index: int) -> bool:
    return bool(ctx.needs_input_grad[index])


@lstm.register_fake
def _lstm_fake(gates, w_hh, h0, c0, sizes, where, reset_h, reset_c, keep):
    hidden = w_hh.shape[1]
    h = gates.new_empty(gates.shape[0], hidden)
    return h, torch.empty_like(h), gates.new_empty(gates.shape[0] if keep else 0, 4 * hidden)


@gru.register_fake
def _gru_fake(gates, w_hh, bias_n, h0, sizes, where, reset_h, keep):
    hidden = w_hh.shape[1]
    h = gates.new_empty(gates.shape[0], hidden)
    return h, gates.new_empty(gates.shape[0] if keep else 0, 4 * hidden)


@lstm_backward.register_fake
def _lstm_backward_fake(
    grad_h, grad_c, w_hh, h0, c0, h, c, act, sizes, where, reset_h, reset_c, want_reset_grad
):
    def reset(state):
        return state.new_empty(state.shape) if want_reset_grad else h.new_empty(0)

    return (
        torch.empty_like(act),
        torch.empty_like(w_hh),
        torch.empty_like(h0),
        torch.empty_like(c0),
        reset(reset_h),
        reset(reset_c),
    )


@gru_backward.register_fake
def _gru_backward_fake(grad_h, w_hh, h0, h, act, sizes, where, reset_h, want_reset_grad):
    hidden = w_hh.shape[1]
    reset = reset_h.new_empty(reset_h.shape) if want_reset_grad else h.new_empty(0)
    gates = torch.empty_like(act)[:, hidden:]
    return gates, torch.empty_like(w_hh), w_hh.new_empty(hidden), torch.empty_like(h0), reset


def _lstm_setup(ctx, inputs, output):
    _, w_hh, h0, c0, ctx.sizes, where, reset_h, reset_c, _ = inputs
    ctx.save_for_backward(w_hh, h0, c0, *output, where, reset_h, reset_c)
    ctx.set_materialize_grads(False)


def _lstm_grad(ctx, grad_h, grad_c, _):
    w_hh, h0, c0, h, c, act, where, reset_h, reset_c = ctx.saved_tensors
    want = _wants(ctx, 6) or _wants(ctx, 7)
    gates, d_w, dh, dc, d_reset_h, d_reset_c = lstm_backward(
        grad_h, grad_c, w_hh, h0, c0, h, c, act, ctx.sizes, where, reset_h, reset_c, want
    )
    resets = (d_reset_h, d_reset_c) if want else (None, None)
    return gates, d_w, dh, dc, None, None, *resets, None


def _gru_setup(ctx, inputs, output):
    _, w_hh, _, h0, ctx.sizes, where, reset_h, _ = inputs
    ctx.save_for_backward(w_hh, h0, *output, where, reset_h)
    ctx.set_materialize_grads(False)


def _gru_grad(ctx, grad_h, _):
    if grad_h is None:
        return (None,) * 8
    w_hh, h0, h, act, where, reset_h = ctx.saved_tensors
    want = _wants(ctx, 6)
    gates, d_w, d_b, dh, d_reset = gru_backward(
        grad_h, w_hh, h0, h, act, ctx.sizes, where, reset_h, want
    )
    return gates, d_w, d_b, dh, None, None, d_reset if want else None, None


lstm.register_autograd(_lstm_grad, setup_context=_lstm_setup)
gru.register_autograd(_gru_grad, setup_context=_gru_setup)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "The hand-written recurrent kernels have no second derivative (a gradient made with "
        "create_graph=True was differentiated again). Build the module with "
        "recurrent_backend='loop', which any order of autograd sees through."
    )


for _op in (lstm_backward, gru_backward):
    _op.register_autograd(_no_second_derivative, setup_context=lambda ctx, inputs, output: None)


def _map_by_loop(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """Vmap rule that always holds: run the operator once per element and stack."""

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
    _op.register_vmap(_map_by_loop(_op))
