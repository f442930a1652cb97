r"""The recurrence of minGRU and minLSTM, fused with its pointwise functions.

.. math:: h_t = a_t h_{t-1} + (1 - a_t) g(v_t), \quad a_t = \sigma(-u_t), \quad
    g(v) = v + 1/2 \text{ where } v \ge 0 \text{, else } \sigma(v)

``u`` and ``v`` come as one projection ``[T, N, 2F]``, time-major. The pointwise functions of some
steps are computed just before these steps run, so that they are in the cache, and again in the
backward pass, so that the projection and the states are all that is kept. Resets are those of
``linear_recurrence``. See "Were RNNs All We Needed?", Feng et al., 2024 (arXiv:2410.01201), in the
linear domain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..cells.linear import candidate, mix_coefficients
from . import linear_recurrence
from .linear_recurrence import Resets, find_resets

# Elements whose pointwise functions are computed at once.
_CHUNK = 1 << 16


class _Chunk(NamedTuple):
    """Some steps: ``first`` to ``until``, and the resets among them as positions inside."""

    first: int
    until: int
    resets: Tensor

    def of(self, x: Tensor) -> Tensor:
        return x[self.first : self.until]


def forward(p: Tensor, start: Tensor, reset: Tensor) -> Tensor:
    """Run time; not seen by autograd.

    Args:
        p: ``[T, N, 2F]``, ``u`` and then ``v``.
        start: ``[T, N, F]``, the stored states; read at the first step and where ``reset``.
        reset: bool ``[T, N]``.

    Returns:
        ``h [T, N, F]``.
    """
    u, v = p.chunk(2, -1)
    if linear_recurrence.prefers_blocks(start):
        return linear_recurrence.scan(*mix_coefficients(u, v), start, reset)
    resets = find_resets(reset)
    out = torch.empty_like(start, memory_format=torch.contiguous_format)
    state = start[0]
    for chunk in _chunks(start, resets):
        a, b = _coefficients_of(chunk, u, v)
        _apply_resets(chunk, a, b, start)
        steps = zip(a.unbind(), b.unbind(), chunk.of(out).unbind(), strict=True)
        for a_t, b_t, h_t in steps:
            state = torch.addcmul(b_t, a_t, state, out=h_t)
    if linear_recurrence.is_leaking(out, resets.before):
        return linear_recurrence.scan(*mix_coefficients(u, v), start, reset)
    return out


def backward(
    grad: Tensor, p: Tensor, h: Tensor, start: Tensor, reset: Tensor, wants_start: bool
) -> tuple[Tensor, Tensor]:
    r"""Return the gradients of ``p`` and, if it is wanted, of ``start`` (else an empty tensor).

    With :math:`d_t` as in ``linear_recurrence.scan_backward``,

    .. math:: \nabla u_t = d_t (1 - a_t) a_t (g(v_t) - h_{t-1}), \quad
        \nabla v_t = d_t (1 - a_t) g'(v_t)
    """
    resets = find_resets(reset)
    d_h = _whole_backward(grad, p, reset) if linear_recurrence.prefers_blocks(start) else None
    d_p, d_start, is_leaking = _backward_in_chunks(grad, d_h, p, h, start, resets, wants_start)
    if is_leaking:
        d_h = _whole_backward(grad, p, reset)
        d_p, d_start, _ = _backward_in_chunks(grad, d_h, p, h, start, resets, wants_start)
    return d_p, d_start


def _whole_backward(grad: Tensor, p: Tensor, reset: Tensor) -> Tensor:
    return linear_recurrence.backward_states(torch.sigmoid(-p.chunk(2, -1)[0]), grad, reset)


def _backward_in_chunks(
    grad: Tensor,
    d_h: Tensor | None,
    p: Tensor,
    h: Tensor,
    start: Tensor,
    resets: Resets,
    wants_start: bool,
) -> tuple[Tensor, Tensor, bool]:
    """Go through time backwards; ``d_h`` are the gradients of states where they are known.

    Returns:
        The gradients of ``p`` and ``start``, and whether something that is not finite stands
        where a reset multiplies it by zero.
    """
    u, v = p.chunk(2, -1)
    d_p, d_start = p.new_empty(p.shape), start.new_zeros(start.shape if wants_start else 0)
    d_u, d_v = d_p.chunk(2, -1)
    following, is_leaking = torch.zeros_like(start[0]), False
    for chunk in reversed(list(_chunks(start, resets))):
        a, v_t = torch.sigmoid(-chunk.of(u)), chunk.of(v)
        slope = v_t.clamp(max=0).sigmoid_()
        g = v_t.clamp(min=0).add_(slope)
        if d_h is None:
            d, following = _run_chunk_back(chunk, a, grad, following)
            is_leaking = is_leaking or linear_recurrence.is_leaking(d, chunk.resets)
        else:
            d = chunk.of(d_h)
        if wants_start:
            _write_start_grads(chunk, a, d, d_start)
        inflow = torch.addcmul(d, a, d, value=-1)
        torch.addcmul(slope, slope, slope, value=-1, out=slope).masked_fill_(v_t >= 0, 1.0)
        torch.mul(inflow, slope, out=chunk.of(d_v))
        g.sub_(_entering(chunk, h, start)).mul_(a)
        torch.mul(g, inflow, out=chunk.of(d_u))
    return d_p, d_start, is_leaking


def _write_start_grads(chunk: _Chunk, a: Tensor, d: Tensor, d_start: Tensor) -> None:
    at = chunk.resets
    passed = a.flatten(0, 1)[at] * d.flatten(0, 1)[at]
    chunk.of(d_start).flatten(0, 1).index_copy_(0, at, passed)
    if chunk.first == 0:
        torch.mul(a[0], d[0], out=d_start[0])


def _run_chunk_back(
    chunk: _Chunk, a: Tensor, grad: Tensor, following: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the chunk's states, and what they pass to the step before it."""
    masked = a
    if chunk.resets.numel():
        masked = a.clone()
        masked.flatten(0, 1).index_fill_(0, chunk.resets, 0)
    d, passed = torch.empty_like(a), following.clone()
    steps = (masked.unbind(), chunk.of(grad).unbind(), d.unbind())
    for a_t, g_t, d_t in zip(*map(reversed, steps), strict=True):
        torch.add(g_t, passed, out=d_t)
        torch.mul(a_t, d_t, out=passed)
    return d, passed


def _coefficients_of(chunk: _Chunk, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    a, b = torch.sigmoid(-chunk.of(u)), candidate(chunk.of(v))
    return a, torch.addcmul(b, a, b, value=-1, out=b)


def _apply_resets(chunk: _Chunk, a: Tensor, b: Tensor, start: Tensor) -> None:
    if chunk.resets.numel():
        entering = a.flatten(0, 1)[chunk.resets] * chunk.of(start).flatten(0, 1)[chunk.resets]
        b.flatten(0, 1).index_add_(0, chunk.resets, entering)
        a.flatten(0, 1).index_fill_(0, chunk.resets, 0)


def _entering(chunk: _Chunk, h: Tensor, start: Tensor) -> Tensor:
    """Return the state that enters each step of a chunk."""
    if chunk.first and not chunk.resets.numel():
        return h[chunk.first - 1 : chunk.until - 1]
    first = h[chunk.first - 1 : chunk.first] if chunk.first else start[:1]
    previous = torch.cat([first, h[chunk.first : chunk.until - 1]])
    entering = chunk.of(start).flatten(0, 1)[chunk.resets]
    previous.flatten(0, 1).index_copy_(0, chunk.resets, entering)
    return previous


def _chunks(states: Tensor, resets: Resets) -> Iterator[_Chunk]:
    """Yield chunks of steps whose tensors fit into the cache, with their resets."""
    steps, rows, features = states.shape
    at_once = max(1, _CHUNK // max(1, rows * features))
    firsts = range(0, steps, at_once)
    bounds = torch.tensor([*firsts, steps], device=resets.positions.device) * rows
    ends = torch.searchsorted(resets.positions, bounds).tolist()
    for k, first in enumerate(firsts):
        inside = resets.positions[ends[k] : ends[k + 1]] - first * rows
        yield _Chunk(first, min(first + at_once, steps), inside)
