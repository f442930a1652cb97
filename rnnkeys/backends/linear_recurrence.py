"""Linear recurrences ``h_t = a_t * h_{t-1} + b_t`` over time, with exact resets.

Tensors are time-major, ``[T, N, F]``, real or complex. At a segment start the previous state is
replaced by the stored one, so that a reset is no other operation: ``a_t`` becomes 0 and
``a_t * start_t`` is added to ``b_t``. A zero does not stop a NaN (``0 * NaN`` is NaN); the states
just before resets are therefore checked afterwards, and where one is not finite, time runs again
with the previous state replaced by a select.

Time runs as a plain loop where a step has much to compute, and in blocks, side by side, where it
has little: the block scan computes three times as much in a small fraction of the calls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Elements of a step above which a plain loop is faster than a scan in blocks.
_MOST_IN_BLOCKS = 2048
# Steps below which blocks are not worth their passes.
_FEWEST_STEPS = 32


class Resets(NamedTuple):
    """Where segments start after the first step, as flat positions ``t * N + n``, int64 ``[R]``."""

    positions: Tensor
    rows: int

    @property
    def before(self) -> Tensor:
        """Flat positions of the step before each."""
        return self.positions - self.rows


def find_resets(reset: Tensor) -> Resets:
    """Return the resets of bool ``[T, N]``; the first step always is one and is left out.

    Examples:
        >>> find_resets(torch.tensor([[True, False], [False, True]])).positions
        tensor([3])
    """
    index = reset.clone()
    index[0] = False
    return Resets(index.flatten().nonzero().squeeze(1), reset.shape[1])


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
    decay, drive = _apply_resets(a, b, start, resets)
    h = _run(decay, drive)
    if is_leaking(h, resets.before):
        h = scan_by_select(a, b, start, reset)
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
    d_b = backward_states(conjugate, grad, reset)
    d_start = start.new_zeros(start.shape if wants_start else 0)
    if wants_start:
        at = resets.positions
        passed = conjugate.flatten(0, 1)[at] if a.ndim == 3 else conjugate
        d_start.flatten(0, 1).index_copy_(0, at, passed * d_b.flatten(0, 1)[at])
        d_start[0] = (conjugate[0] if a.ndim == 3 else conjugate) * d_b[0]
    d_a = d_b * previous_states(h, start, resets).conj()
    return d_a if a.ndim == 3 else d_a.sum((0, 1)), d_b, d_start


def backward_states(a: Tensor, grad: Tensor, reset: Tensor) -> Tensor:
    """Return ``d_t = g_t + a_{t+1} d_{t+1}``, nothing passing a segment start backwards."""
    resets = find_resets(reset)
    d = _run_back(_mask(a, grad, resets), grad)
    return _run_back_by_select(a, grad, reset) if is_leaking(d, resets.positions) else d


def prefers_blocks(states: Tensor) -> bool:
    """Return whether a scan in blocks is faster than a loop for ``[T, N, F]``."""
    return len(states) >= _FEWEST_STEPS and states[0].numel() <= _MOST_IN_BLOCKS


def previous_states(h: Tensor, start: Tensor, resets: Resets) -> Tensor:
    """Return the state that enters each step, ``[T, N, F]``: stored where a segment starts."""
    previous = torch.cat([start[:1], h[:-1]])
    entering = start.flatten(0, 1)[resets.positions]
    previous.flatten(0, 1).index_copy_(0, resets.positions, entering)
    return previous


def _apply_resets(a: Tensor, b: Tensor, start: Tensor, resets: Resets) -> tuple[Tensor, Tensor]:
    """Return decay and drive with the resets in them."""
    drive = b.clone(memory_format=torch.contiguous_format)
    first = a[0] if a.ndim == 3 else a
    drive[0].addcmul_(first.expand_as(start[0]), start[0])
    if resets.positions.numel():
        at = a.flatten(0, 1)[resets.positions] if a.ndim == 3 else a
        entering = at * start.flatten(0, 1)[resets.positions]
        drive.flatten(0, 1).index_add_(0, resets.positions, entering)
    return _mask(a, b, resets), drive


def _mask(a: Tensor, like: Tensor, resets: Resets) -> Tensor:
    """Return the decays, 0 where a segment starts; ``[F]`` stay so if none does."""
    if not resets.positions.numel():
        return a
    masked = a.expand_as(like).clone(memory_format=torch.contiguous_format)
    masked.flatten(0, 1).index_fill_(0, resets.positions, 0)
    return masked


def is_leaking(values: Tensor, index: Tensor) -> bool:
    """Return whether a value that is not finite stands where a reset multiplies it by zero."""
    return bool(index.numel()) and not bool(values.flatten(0, 1)[index].isfinite().all())


def _run(a: Tensor, b: Tensor) -> Tensor:
    """Run time from a zero state."""
    if prefers_blocks(b):
        h = _run_blocks(a, b)
        # Products of decays may overflow where the states do not.
        if bool(h.sum().isfinite()):
            return h
    return _run_loop(a, b)


def _run_back(a: Tensor, grad: Tensor) -> Tensor:
    """Run ``d_t = g_t + a_{t+1} * d_{t+1}``."""
    if prefers_blocks(grad):
        backwards = torch.cat([a[:1], a[1:].flip(0)]) if a.ndim == 3 else a
        d = _run_blocks(backwards, grad.flip(0))
        if bool(d.sum().isfinite()):
            return d.flip(0)
    steps = _steps(a, len(grad))[1:]
    out = torch.empty_like(grad, memory_format=torch.contiguous_format)
    d = out[-1].copy_(grad[-1])
    for a_next, g_t, d_t in zip(
        reversed(steps), reversed(grad.unbind()[:-1]), reversed(out.unbind()[:-1]), strict=True
    ):
        d = torch.addcmul(g_t, a_next, d, out=d_t)
    return out


def _run_loop(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty_like(b, memory_format=torch.contiguous_format)
    h = out[0].copy_(b[0])
    for a_t, b_t, h_t in zip(_steps(a, len(b))[1:], b.unbind()[1:], out.unbind()[1:], strict=True):
        h = torch.addcmul(b_t, a_t, h, out=h_t)
    return out


def _steps(a: Tensor, steps: int) -> tuple[Tensor, ...]:
    return a.unbind() if a.ndim == 3 else (a,) * steps


def _run_blocks(a: Tensor, b: Tensor) -> Tensor:
    """Run blocks of about ``sqrt(T)`` steps side by side, then carry states from block to block.

    The states inside a block that starts from zeros, and the products of decays up to each step,
    need nothing of the blocks before; ``h = local + product * carried`` joins them. Steps that fill
    no block run as a loop.
    """
    length = 1 << max(2, round(len(b) ** 0.5 - 1).bit_length() - 1)
    count = len(b) // length
    whole = count * length
    constant = a.ndim == 1
    blocks = b[:whole].view(count, length, *b.shape[1:])
    decays = None if constant else a[:whole].view(count, length, *b.shape[1:])
    local = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    local[:, 0] = blocks[:, 0]
    product = a.new_empty(length, *a.shape) if constant else torch.empty_like(blocks)
    powers = product if constant else product.transpose(0, 1)
    powers[0] = a if decays is None else decays[:, 0]
    for c in range(1, length):
        a_c = a if decays is None else decays[:, c]
        torch.addcmul(blocks[:, c], a_c, local[:, c - 1], out=local[:, c])
        torch.mul(a_c, powers[c - 1], out=powers[c])
    carried = torch.zeros_like(local[:, 0])
    for k in range(1, count):
        through = powers[-1] if constant else product[k - 1, -1]
        torch.addcmul(local[k - 1, -1], through, carried[k - 1], out=carried[k])
    join = product[None, :, None] if constant else product
    local.addcmul_(join, carried[:, None])
    h = local.view(whole, *b.shape[1:])
    if whole == len(b):
        return h
    rest = [h]
    for t in range(whole, len(b)):
        rest.append(torch.addcmul(b[t], a if constant else a[t], rest[-1][-1])[None])
    return torch.cat(rest)


def scan_by_select(a: Tensor, b: Tensor, start: Tensor, reset: Tensor) -> Tensor:
    """Run :func:`scan` in differentiable operations, the state selected at every reset."""
    h, out = start[0], []
    for t, a_t in enumerate(_steps(a, len(b))):
        h = torch.where(reset[t, :, None], start[t], h) if t else start[0]
        h = torch.addcmul(b[t], a_t.expand_as(h), h)
        out.append(h)
    return torch.stack(out)


def _run_back_by_select(a: Tensor, grad: Tensor, reset: Tensor) -> Tensor:
    d, steps = grad[-1], _steps(a, len(grad))
    out: list[Tensor] = [d]
    for t in range(len(grad) - 2, -1, -1):
        through = steps[t + 1] * d
        d = grad[t] + through.masked_fill(reset[t + 1, :, None], 0)
        out.append(d)
    return torch.stack(out[::-1])
