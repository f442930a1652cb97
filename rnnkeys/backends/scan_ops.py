"""The scans of linear cells as custom operators: one node each for autograd, vmap and compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._compat import in_derivative
from ..cells.linear import join_pairs, mix_coefficients, split_pairs
from . import gated_recurrence
from . import linear_recurrence as plain
from .ops import raise_second_derivative
from .triton import linear_launch as kernels


@torch.library.custom_op("rnnkeys::linear_scan", mutates_args=())
def scan(a: Tensor, b: Tensor, start: Tensor, reset: Tensor, paired: bool) -> Tensor:
    """Run ``linear_recurrence.scan``; with ``paired``, real tensors hold complex pairs."""
    if kernels.can_run(b):
        return kernels.scan(a, b, start, reset, paired)
    if not paired:
        return plain.scan(a, b, start, reset)
    return _as_pairs(plain.scan(_as_complex(a), _as_complex(b), _as_complex(start), reset))


@torch.library.custom_op("rnnkeys::linear_scan_backward", mutates_args=())
def scan_backward(
    grad: Tensor,
    a: Tensor,
    h: Tensor,
    start: Tensor,
    reset: Tensor,
    wants_start: bool,
    paired: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``linear_recurrence.scan_backward``; ``paired`` as in :func:`scan`."""
    if kernels.can_run(h):
        return kernels.scan_backward(grad, a, h, start, reset, wants_start, paired)
    if not paired:
        return plain.scan_backward(grad, a, h, start, reset, wants_start)
    grad, a, h, start = (_as_complex(x) for x in (grad, a, h, start))
    d_a, d_b, d_start = plain.scan_backward(grad, a, h, start, reset, wants_start)
    return _as_pairs(d_a), _as_pairs(d_b), _as_pairs(d_start)


def _as_complex(x: Tensor) -> Tensor:
    """View pairs ``[..., 2 F]`` as complex ``[..., F]``, of a copy where strides are odd."""
    if x.storage_offset() % 2 or any(stride % 2 for stride in x.stride()[:-1]) or x.stride(-1) != 1:
        x = x.contiguous()
        x = x.clone() if x.storage_offset() % 2 else x
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _as_pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x).flatten(-2)


@torch.library.custom_op("rnnkeys::gated_scan", mutates_args=())
def gated(p: Tensor, start: Tensor, reset: Tensor) -> Tensor:
    """Run ``gated_recurrence.forward``."""
    if kernels.can_run(p):
        return kernels.gated_scan(p, start, reset)
    return gated_recurrence.forward(p, start, reset)


@torch.library.custom_op("rnnkeys::gated_scan_backward", mutates_args=())
def gated_backward(
    grad: Tensor, p: Tensor, h: Tensor, start: Tensor, reset: Tensor, wants_start: bool
) -> tuple[Tensor, Tensor]:
    """Run ``gated_recurrence.backward``."""
    if kernels.can_run(p):
        return kernels.gated_scan_backward(grad, p, h, start, reset, wants_start)
    return gated_recurrence.backward(grad, p, h, start, reset, wants_start)


def _like(x: Tensor) -> Tensor:
    """Return an empty contiguous tensor of the same shape."""
    return x.new_empty(x.shape)


@scan.register_fake
def _(a: Tensor, b: Tensor, start: Tensor, reset: Tensor, paired: bool) -> Tensor:
    return _like(b)


@scan_backward.register_fake
def _(
    grad: Tensor,
    a: Tensor,
    h: Tensor,
    start: Tensor,
    reset: Tensor,
    wants_start: bool,
    paired: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(a), _like(h), _like(start) if wants_start else start.new_empty(0)


@gated.register_fake
def _(p: Tensor, start: Tensor, reset: Tensor) -> Tensor:
    return _like(start)


@gated_backward.register_fake
def _(
    grad: Tensor, p: Tensor, h: Tensor, start: Tensor, reset: Tensor, wants_start: bool
) -> tuple[Tensor, Tensor]:
    return _like(p), _like(start) if wants_start else start.new_empty(0)


def _keep_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, start, reset, ctx.paired = inputs
    ctx.save_for_backward(a, output, start, reset)


def _grad_scan(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wants_start = bool(ctx.needs_input_grad[2])
    d_a, d_b, d_start = scan_backward(grad, *ctx.saved_tensors, wants_start, ctx.paired)
    return d_a, d_b, d_start if wants_start else None, None, None


def _keep_gated(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    p, start, reset = inputs
    ctx.save_for_backward(p, output, start, reset)


def _grad_gated(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wants_start = bool(ctx.needs_input_grad[1])
    d_p, d_start = gated_backward(grad, *ctx.saved_tensors, wants_start)
    return d_p, d_start if wants_start else None, None


def _map_rows(op: Callable[..., Any], info: Any, dims: Sequence[int | None], *args: Any) -> Any:
    """Run an operator under vmap, the mapped dimension folded into the rows ``[T, N, ...]``."""
    size = info.batch_size
    folded = [
        _fold(x, dim, size) if isinstance(x, Tensor) else x
        for x, dim in zip(args, dims, strict=True)
    ]
    out = op(*folded)
    if isinstance(out, Tensor):
        return _unfold(out, size), 1
    return tuple(_unfold(one, size) for one in out), (1,) * len(out)


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Fold a mapped dimension into the rows: ``[T, N, ...]`` to ``[T, size * N, ...]``."""
    moved = x.movedim(dim, 1) if dim is not None else x.unsqueeze(1).expand(-1, size, *x.shape[1:])
    return moved.flatten(1, 2)


def _unfold(x: Tensor, size: int) -> Tensor:
    # A gradient that is not wanted is empty.
    return x.unflatten(1, (size, -1)) if x.ndim > 1 else x.expand(size, 0).T


def _map_scan(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    a = _decay_per_row(args[0], dims[0], args[1], dims[1], info.batch_size)
    return _map_rows(scan, info, (0, *dims[1:]), a, *args[1:])


def _decay_per_row(a: Tensor, dim: int | None, b: Tensor, b_dim: int | None, size: int) -> Tensor:
    """Return decays ``[size, T, N, F]``, those of ``[F]`` repeated."""
    like = b.movedim(b_dim, 0) if b_dim is not None else b[None]
    a = a.movedim(dim, 0) if dim is not None else a[None]
    if a.ndim == 2:
        a = a[:, None, None]
    return a.expand(size, *like.shape[1:])


def _map_scan_backward(
    info: Any, dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
    grad, a, h, *others = args
    decays = _decay_per_row(a, dims[1], h, dims[2], info.batch_size)
    found, where = _map_rows(scan_backward, info, (dims[0], 0, *dims[2:]), grad, decays, h, *others)
    if a.ndim - (dims[1] is not None) > 1:
        return found, where
    d_a, d_b, d_start = found
    return (d_a.sum((0, 2)), d_b, d_start), (0, 1, 1)


scan.register_autograd(_grad_scan, setup_context=_keep_scan)
gated.register_autograd(_grad_gated, setup_context=_keep_gated)
for _op in (scan_backward, gated_backward):
    _op.register_autograd(raise_second_derivative, setup_context=lambda ctx, inputs, output: None)
scan.register_vmap(_map_scan)
scan_backward.register_vmap(_map_scan_backward)
gated.register_vmap(partial(_map_rows, gated))
gated_backward.register_vmap(partial(_map_rows, gated_backward))


def linear_scan(
    a: Tensor, b: Tensor, initial: Tensor | None = None, is_init: Tensor | None = None
) -> Tensor:
    r"""Run the linear recurrence :math:`h_t = a_t h_{t-1} + b_t` along time, with exact resets.

    One operator with a hand-written backward pass: its graph does not grow with time, it maps under
    ``torch.vmap`` and compiles with ``fullgraph=True``. Gradients reach ``a``, ``b`` and
    ``initial``. Derivatives taken by ``torch.func`` run a plain loop.

    Args:
        a: decays, ``[B, T, F]``, or ``[F]`` if they are the same at every step; real or complex.
        b: inputs ``[B, T, F]``, of the same dtype.
        initial: the states before the first step, ``[B, F]``, or ``[B, T, F]`` to start every
            segment from the state stored at its first step. By default zeros.
        is_init: bool ``[B, T]``, True where a segment starts. Segments after the first of a row
            start from zeros if ``initial`` is ``[B, F]``. By default every row is one segment.

    Returns:
        The states after every step, ``[B, T, F]``.

    Raises:
        ValueError: if a shape does not fit, or if devices differ.
        TypeError: if dtypes differ or are integers, or if ``is_init`` is not bool.

    Examples:
        >>> ones = torch.ones(1, 4, 1)
        >>> flags = torch.tensor([[True, False, True, False]])
        >>> linear_scan(ones / 2, ones, is_init=flags).flatten()
        tensor([1.0000, 1.5000, 1.0000, 1.5000])
    """
    _check_types(a=a, b=b, initial=initial, is_init=is_init)
    _check_shapes(a, b, initial)
    if is_init is not None:
        _check_flags(is_init, b)
    if not b.numel():
        return b + 0 * a.sum()
    batch, steps, _ = b.shape
    if is_init is None:
        is_init = b.new_zeros(batch, steps, dtype=torch.bool)
    start = torch.zeros_like(b) if initial is None else initial
    if start.ndim == 2:
        start = torch.cat([start[:, None], b.new_zeros(batch, steps - 1, b.shape[2])], 1)
    b, start, is_init = (x.transpose(0, 1) for x in (b, start, is_init))
    return run(a if a.ndim == 1 else a.transpose(0, 1), b, start, is_init).transpose(0, 1)


def run(a: Tensor, b: Tensor, start: Tensor, reset: Tensor, paired: bool = False) -> Tensor:
    """Run ``linear_recurrence.scan`` with gradients: as one operator where its rules allow.

    Args:
        a: ``[T, N, F]`` or ``[F]``.
        b: ``[T, N, F]``.
        start: ``[T, N, F]``.
        reset: bool ``[T, N]``.
        paired: whether real tensors hold complex numbers, in pairs of real and imaginary part.
    """
    if not in_derivative():
        return scan(a, b, start, reset, paired)
    if paired:
        a, b, start = (torch.complex(*split_pairs(x)) for x in (a, b, start))
        h = plain.scan_by_select(a, b, start, reset)
        return join_pairs(h.real, h.imag)
    return plain.scan_by_select(a, b, start, reset)


def run_gated(p: Tensor, start: Tensor, reset: Tensor) -> Tensor:
    """Run ``gated_recurrence.forward`` with gradients: as one operator where its rules allow."""
    if in_derivative():
        return plain.scan_by_select(*mix_coefficients(*p.chunk(2, -1)), start, reset)
    return gated(p, start, reset)


def _check_types(**given: Any) -> None:
    for name, value in given.items():
        is_missing = value is None and name in ("initial", "is_init")
        if not is_missing and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor. Got a {type(value).__name__}.")
    device = given["b"].device
    for name, value in given.items():
        if value is not None and value.device != device:
            raise ValueError(f"{name} must be on the device of b, {device}. Got {value.device}.")
    dtype = given["b"].dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"b must be floating or complex. Got {dtype}: convert it with .float().")


def _check_shapes(a: Tensor, b: Tensor, initial: Tensor | None) -> None:
    if b.ndim != 3:
        raise ValueError(f"b must have the shape [B, T, F]. Got {list(b.shape)}.")
    if a.shape not in (b.shape, b.shape[2:]):
        raise ValueError(
            f"a must have the shape of b, {list(b.shape)}, or [F] = {list(b.shape[2:])}. Got "
            f"{list(a.shape)}."
        )
    if initial is not None and initial.shape not in (b.shape, (b.shape[0], b.shape[2])):
        raise ValueError(
            f"initial must have the shape [B, F] = {[b.shape[0], b.shape[2]]} or [B, T, F] = "
            f"{list(b.shape)}. Got {list(initial.shape)}."
        )
    for name, value in (("a", a), ("initial", initial)):
        if value is not None and value.dtype != b.dtype:
            raise TypeError(
                f"{name} must have the dtype of b, {b.dtype}. Got {value.dtype}: convert it with "
                f"{name}.to(b.dtype)."
            )


def _check_flags(is_init: Tensor, b: Tensor) -> None:
    if is_init.dtype != torch.bool:
        raise TypeError(f"is_init must be bool. Got {is_init.dtype}: convert it with .bool().")
    if is_init.shape != b.shape[:2]:
        raise ValueError(
            f"is_init must have the shape [B, T] = {list(b.shape[:2])}. Got {list(is_init.shape)}."
        )
