r"""The recurrence of minGRU and minLSTM, fused with its pointwise functions.

.. math:: h_t = a_t h_{t-1} + z_t\, g(v_t), \quad z_t = \sigma(u_t), \quad a_t = 1 - z_t, \quad
    g(v) = \max(v + 1/2, \sigma(v))

``u`` and ``v`` come as one projection ``[T, N, 2F]``, time-major. The pointwise functions of some
steps are computed just before these steps run, so that they are in the cache, and again in the
backward pass, so that the projection and the states are all that is kept. Resets are those of
``linear_recurrence``. See "Were RNNs All We Needed?", Feng et al., 2024 (arXiv:2410.01201), in the
linear domain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells.linear import mix_coefficients
from . import linear_recurrence
from .linear_steps import (
    Chunk,
    cut_chunks,
    enter_at_resets,
    find_resets,
    is_finite_at,
    run_chunk_back,
    run_steps,
)

aten = torch.ops.aten


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
    resets = find_resets(reset)
    h = torch.empty_like(start, memory_format=torch.contiguous_format)
    entering = start[0]
    for chunk in cut_chunks(start, resets):
        h_c = chunk.of(h)
        z, below = _sigmoid(chunk.of(u)), _sigmoid(chunk.of(v))
        torch.add(chunk.of(v), 0.5, out=h_c)
        torch.maximum(h_c, below, out=h_c).mul_(z)
        a = torch.rsub(z, 1)
        enter_at_resets(chunk, a, h_c)
        run_steps(a, h_c, entering)
        entering = h_c[-1]
    if not is_finite_at(h, resets - reset.shape[1]):
        return linear_recurrence.scan_by_select(*mix_coefficients(u, v), start, reset)
    return h


def backward(
    grad: Tensor, p: Tensor, h: Tensor, start: Tensor, reset: Tensor, wants_start: bool
) -> tuple[Tensor, Tensor]:
    r"""Return the gradients of ``p`` and, if it is wanted, of ``start`` (else an empty tensor).

    With :math:`d_t` as in ``linear_recurrence.scan_backward``,

    .. math:: \nabla u_t = d_t z_t a_t (g(v_t) - h_{t-1}), \quad
        \nabla v_t = d_t z_t g'(v_t)
    """
    resets = find_resets(reset)
    d_p, d_start = _backward_in_chunks(grad, None, p, h, start, resets, wants_start)
    if not is_finite_at(d_p, resets):
        a = torch.sigmoid(-p.chunk(2, -1)[0])
        d = linear_recurrence.backward_states_by_select(a, grad, reset)
        return _backward_in_chunks(grad, d, p, h, start, resets, wants_start)
    return d_p, d_start


def _backward_in_chunks(
    grad: Tensor,
    d: Tensor | None,
    p: Tensor,
    h: Tensor,
    start: Tensor,
    resets: Tensor,
    wants_start: bool,
) -> tuple[Tensor, Tensor]:
    """Run time backwards; ``d`` are the gradients of states, None if they are to be computed."""
    u, v = p.chunk(2, -1)
    d_p, d_start = p.new_empty(p.shape), start.new_zeros(start.shape if wants_start else 0)
    d_u, d_v = d_p.chunk(2, -1)
    entering, following = None, torch.zeros_like(h[0])
    for chunk in reversed(cut_chunks(start, resets)):
        z = _sigmoid(chunk.of(u))
        if d is None:
            d_c = linear_recurrence.copy(chunk.of(grad))
            a = z.new_empty(len(z) + 1, *z.shape[1:])
            torch.sub(z.new_ones(()), z, out=a[:-1])
            following = run_chunk_back(chunk, a, d_c, entering, following)
            entering = d_c[0].clone()
        else:
            d_c = linear_recurrence.copy(chunk.of(d))
        if wants_start:
            linear_recurrence.write_start_grads(chunk, torch.rsub(z, 1), d_c, d_start)
        _write_input_grads(chunk, z, d_c, v, h, start, d_u, d_v)
    return d_p, d_start


def _write_input_grads(
    chunk: Chunk,
    z: Tensor,
    d: Tensor,
    v: Tensor,
    h: Tensor,
    start: Tensor,
    d_u: Tensor,
    d_v: Tensor,
) -> None:
    """Write the gradients of ``u`` and ``v`` of a chunk; ``d [C, N, F]`` is overwritten."""
    above = chunk.of(v).clamp(min=0)
    below = chunk.of(v).clamp(max=0).sigmoid_()
    difference = above + below
    _subtract_previous(chunk, difference, h, start)
    aten.sigmoid_backward.grad_input(difference.mul_(d), z, grad_input=chunk.of(d_u))
    # The slope of g is 1 above zero, where that of sigmoid(min(v, 0)) counts as 1/4.
    inflow = d.mul_(z)
    by_above = aten.threshold_backward(inflow, above, 0)
    by_below = aten.sigmoid_backward.grad_input(inflow, below, grad_input=difference)
    torch.add(by_below, by_above, alpha=0.75, out=chunk.of(d_v))


def _sigmoid(x: Tensor) -> Tensor:
    """Return the sigmoid of a view; of contiguous memory it is several times as fast."""
    return linear_recurrence.copy(x).sigmoid_()


def _subtract_previous(chunk: Chunk, g: Tensor, h: Tensor, start: Tensor) -> None:
    """Subtract from ``g [C, N, F]`` the state that enters each step."""
    rows = None
    if chunk.has_resets:
        # Apart from the others, so that nothing of the segment before gets in.
        rows = chunk.rows_of(g)
        if chunk.entering is not None:
            rows -= chunk.entering
    g[0] -= h[chunk.first - 1] if chunk.first else start[0]
    g[1:] -= h[chunk.first : chunk.until - 1]
    if rows is not None:
        chunk.write_rows(g, rows)
