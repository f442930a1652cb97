"""GRU over time with a hand-written backward pass; ``rnnkeys.cells`` holds the equations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import fused
from .fused import Grads, Resets
from .products import linear


def gru_forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    state: tuple[Tensor, ...],
    sizes: Sequence[int],
    resets: Resets | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a GRU layer.

    Args:
        x: inputs ``[N, I]``.
        w_ih: ``[3H, I]``.
        w_hh: ``[3H, H]``.
        b_ih: ``[3H]`` or None.
        b_hh: ``[3H]`` or None.
        state: ``(h,)`` before the first step, ``[sizes[0], H]``.
        sizes: rows of every step.
        resets: replaced states, see :class:`.fused.Resets`.
        keep: whether to return the activations, which the backward pass reads.

    Returns:
        ``h [N, H]`` and the activated gates ``[r, z]``, ``[N, 2H]``, and ``n``, ``[N, H]`` (empty
        without ``keep``).
    """
    hidden = w_hh.shape[1]
    parts = [2 * hidden, hidden]
    h = x.new_empty(x.shape[0], hidden)
    previous = state
    w_rz, w_n = w_ih.split(parts)
    b_rz, b_n = (None, None) if b_ih is None else b_ih.split(parts)
    r_z, n = x.new_empty(0, 2 * hidden), x.new_empty(0, hidden)
    for chunk in fused.split_time_forward(sizes, 4 * hidden, keep):
        inputs = x[chunk.rows]
        steps = list(sizes[chunk.steps])
        r_z, n = linear(inputs, w_rz, b_rz), linear(inputs, w_n, b_n)
        views = zip(*(plane.split(steps) for plane in (r_z, n, h[chunk.rows])), strict=True)
        for t, (gates, n_t, h_t) in enumerate(views, chunk.first):
            (h_tm1,) = fused.select_entering_state(previous, t, sizes[t], resets)
            of_h, n_of_h = linear(h_tm1, w_hh, b_hh).split(parts, 1)
            r, z = gates.add_(of_h).sigmoid_().chunk(2, 1)
            torch.lerp(n_t.addcmul_(r, n_of_h).tanh_(), h_tm1, z, out=h_t)
            previous = (h_t,)
    return (h, r_z, n) if keep else (h, x.new_empty(0, 2 * hidden), x.new_empty(0, hidden))


def gru_backward(
    grads: tuple[Tensor | None, ...],
    weights: tuple[Tensor, Tensor, Tensor | None],
    x: Tensor,
    state: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    sizes: Sequence[int],
    resets: Resets | None,
    want_x_grad: bool,
    want_reset_grad: bool,
) -> Grads:
    """Compute gradients of :func:`gru_forward` from that of ``h`` (None means zero).

    ``weights`` are ``w_ih``, ``w_hh`` and ``b_hh``.
    """
    (grad_h,), (h0,) = grads, state
    h, r_z, n = outputs
    w_ih, w_hh, b_hh = weights
    hidden = h.shape[1]
    w_n, b_n = w_hh[2 * hidden :], None if b_hh is None else b_hh[2 * hidden :]
    # Columns of gradients: W_hn h, r, z, W_in x. The first three belong to the recurrent product,
    # the last three to the input projection.
    of_state, of_input = slice(3 * hidden), slice(hidden, None)
    w = torch.cat([w_n, w_hh[: 2 * hidden]]).t()
    d_x = torch.empty_like(x) if want_x_grad else None
    d_w_ih, d_w_hh = w_ih.new_zeros(w_ih.shape), w_hh.new_zeros(w_hh.shape)
    d_bias = h.new_zeros(4 * hidden)
    dh = torch.zeros_like(h0)
    reset_grads = fused.make_reset_grads(resets, want_reset_grad)
    for chunk in fused.split_time(sizes, 4 * hidden):
        h_tm1 = fused.gather_entering_states(h0, h, sizes, chunk, resets, 0)
        z = r_z[chunk.rows, hidden:]
        d = _factors(r_z[chunk.rows], n[chunk.rows], linear(h_tm1, w_n, b_n), h_tm1)
        row = chunk.end
        for t in range(chunk.last - 1, chunk.first - 1, -1):
            rows, row = sizes[t], row - sizes[t]
            k = slice(row - chunk.begin, row - chunk.begin + rows)
            dh_t = dh[:rows]
            if grad_h is not None:
                dh_t.add_(grad_h[row : row + rows])
            d_k = d[k].mul_(dh_t.unsqueeze(1)).flatten(1)
            dh_t.mul_(z[k]).add_(linear(d_k[:, of_state], w))
            fused.cut_gradient((dh,), t, resets, reset_grads)
        d = d.flatten(1)
        # oneDNN multiplies a contiguous copy faster than a transposed view.
        d_t = d.t().contiguous()
        d_w_hh.add_(linear(d_t[of_state], h_tm1.t()))
        d_w_ih.add_(linear(d_t[of_input], x[chunk.rows].t()))
        d_bias.add_(d_t.sum(1))
        if d_x is not None:
            d_x[chunk.rows] = linear(d[:, of_input], w_ih.t())
    d_w_hh, d_b_hh = (g.roll(-hidden, 0) for g in (d_w_hh, d_bias[of_state]))
    d_b_ih = d_bias[of_input].clone()
    return Grads(d_x, d_w_ih, d_w_hh, d_b_ih, d_b_hh, (dh,), reset_grads)


def _factors(r_z: Tensor, n: Tensor, h_n: Tensor, h_tm1: Tensor) -> Tensor:
    """Compute the derivatives of the new state by ``W_hn h``, ``r``, ``z`` and ``W_in x``.

    Derivatives by gates are by their pre-activations; ``h_n`` is ``W_hn h + b_hn``.

    Returns:
        ``[rows, 4, H]``.
    """
    aten = torch.ops.aten
    r, z = r_z.chunk(2, 1)
    factor = n.new_empty(n.shape[0], 4, n.shape[1])
    by_h_n, by_r, by_z, by_n = factor.unbind(1)
    aten.tanh_backward.grad_input(1 - z, n, grad_input=by_n)
    torch.mul(by_n, r, out=by_h_n)
    aten.sigmoid_backward.grad_input(h_n.mul_(by_n), r, grad_input=by_r)
    aten.sigmoid_backward.grad_input(h_tm1 - n, z, grad_input=by_z)
    return factor
