"""Linear recurrences ``h_t = a_t * h_{t-1} + b_t`` over time, with exact resets.

Tensors are time-major, ``[T, N, F]``, real or complex. At a segment start the previous state is
replaced by the stored one, so that a reset needs no operation of its own: ``a_t`` becomes 0 and
``a_t * start_t`` is added to ``b_t``. A zero does not stop a NaN (``0 * NaN`` is NaN); the states
just before resets are therefore checked afterwards, and where one is not finite, time runs again
with the previous state replaced by a select.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_steps import (
    Chunk,
    cut_chunks,
    enter_at_resets,
    find_resets,
    is_finite_at,
    prefers_blocks,
    run_chunk_back,
    run_steps,
)


def scan(a: Tensor, b: Tensor, start: Tensor, reset: Tensor) -> Tensor:
    """Run ``h_t = a_t * h_{t-1} + b_t``, not seen by autograd.

    Args:
        a: ``[T, N, F]``, or ``[F]`` for one decay at every step.
        b: ``[T, N, F]``.
        start: ``[T, N, F]``, the stored states; read at the first step and where ``reset``.
        reset: bool ``[T, N]``.

    Returns:
        ``h [T, N, F]``.
    """
    resets = find_resets(reset)
    decays = a.expand_as(b)
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    entering = start[0]
    for chunk in cut_chunks(start, resets):
        h_c, a_c = chunk.of(h).copy_(chunk.of(b)), copy(chunk.of(decays))
        enter_at_resets(chunk, a_c, h_c)
        run_steps(a_c, h_c, entering)
        entering = h_c[-1]
    if _may_overflow(h) or not is_finite_at(h, resets - b.shape[1]):
        return scan_by_select(a, b, start, reset)
    return h


def scan_backward(
    grad: Tensor, a: Tensor, h: Tensor, start: Tensor, reset: Tensor, wants_start: bool
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the gradients of ``a``, ``b`` and, if it is wanted, ``start`` of :func:`scan`.

    .. math:: d_t = g_t + \bar a_{t+1} d_{t+1}, \quad
        \nabla b_t = d_t, \quad \nabla a_t = d_t \bar h_{t-1}

    with the term of ``t + 1`` left out where a segment starts there, whose own previous state is
    the stored one.
    """
    resets = find_resets(reset)
    conjugate = a.conj().resolve_conj()
    d_b = _backward_states(conjugate, grad, start, resets)
    if _may_overflow(d_b) or not is_finite_at(d_b, resets):
        d_b = backward_states_by_select(conjugate, grad, reset)
    d_start = start.new_zeros(start.shape if wants_start else 0)
    d_a = torch.zeros_like(a) if a.ndim == 1 else torch.empty_like(h)
    decays = conjugate.expand_as(h)
    for chunk in cut_chunks(start, resets):
        if wants_start:
            write_start_grads(chunk, chunk.of(decays), chunk.of(d_b), d_start)
        previous = _previous_states(chunk, h, start)
        if previous.is_complex():
            previous = previous.conj_physical_()
        if a.ndim == 1:
            d_a += previous.mul_(chunk.of(d_b)).sum((0, 1))
        else:
            torch.mul(previous, chunk.of(d_b), out=chunk.of(d_a))
    return d_a, d_b, d_start


def _backward_states(a: Tensor, grad: Tensor, start: Tensor, resets: Tensor) -> Tensor:
    """Return ``d_t = g_t + a_{t+1} d_{t+1}``; ``a`` is ``[T, N, F]`` or ``[F]``."""
    d = torch.empty_like(grad, memory_format=torch.contiguous_format)
    decays = a.expand_as(grad)
    entering, following = None, torch.zeros_like(d[0])
    for chunk in reversed(cut_chunks(start, resets)):
        d_c, a_c = chunk.of(d).copy_(chunk.of(grad)), chunk.of(decays)
        shifted = a_c.new_empty(len(a_c) + 1, *a_c.shape[1:])
        shifted[:-1] = a_c
        following = run_chunk_back(chunk, shifted, d_c, entering, following)
        entering = d_c[0]
    return d


def write_start_grads(chunk: Chunk, a: Tensor, d: Tensor, out: Tensor) -> None:
    """Write ``a_t * d_t`` at the segment starts of a chunk, the first step of all among them.

    Args:
        chunk: the steps.
        a: ``[C, N, F]``, their decays, conjugated.
        d: ``[C, N, F]``, the gradients of their states.
        out: ``[T, N, F]``, the gradient of the stored states.
    """
    if chunk.first == 0:
        torch.mul(a[0], d[0], out=out[0])
    if chunk.has_resets:
        chunk.write_rows(chunk.of(out), chunk.rows_of(a).mul_(chunk.rows_of(d)))


def _previous_states(chunk: Chunk, h: Tensor, start: Tensor) -> Tensor:
    """Return the state that enters each step of a chunk: the stored one where a segment starts."""
    previous = h.new_empty(chunk.until - chunk.first, *h.shape[1:])
    previous[0] = h[chunk.first - 1] if chunk.first else start[0]
    previous[1:] = h[chunk.first : chunk.until - 1]
    chunk.write_rows(previous, chunk.entering)
    return previous


def copy(x: Tensor) -> Tensor:
    """Return a contiguous copy."""
    return x.clone(memory_format=torch.contiguous_format)


def _may_overflow(h: Tensor) -> bool:
    """Return whether products of decays in blocks may have overflowed where states do not."""
    return prefers_blocks(h) and not bool(h.sum().isfinite())


def scan_by_select(a: Tensor, b: Tensor, start: Tensor, reset: Tensor) -> Tensor:
    """Run :func:`scan` in differentiable operations, the state selected at every reset."""
    h = start[0]
    out = []
    for t, a_t in enumerate(_steps(a, len(b))):
        h = torch.where(reset[t, :, None], start[t], h) if t else start[0]
        h = torch.addcmul(b[t], a_t.expand_as(h), h)
        out.append(h)
    return torch.stack(out)


def backward_states_by_select(a: Tensor, grad: Tensor, reset: Tensor) -> Tensor:
    """Return ``d_t = g_t + a_{t+1} d_{t+1}``, nothing passing a segment start backwards."""
    d = grad[-1]
    steps = _steps(a, len(grad))
    out: list[Tensor] = [d]
    for t in range(len(grad) - 2, -1, -1):
        through = steps[t + 1] * d
        d = grad[t] + through.masked_fill(reset[t + 1, :, None], 0)
        out.append(d)
    return torch.stack(out[::-1])


def _steps(a: Tensor, steps: int) -> tuple[Tensor, ...]:
    return a.unbind() if a.ndim == 3 else (a,) * steps
