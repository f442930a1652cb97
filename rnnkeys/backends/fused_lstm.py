"""LSTM over time with a hand-written backward pass; ``rnnkeys.cells`` holds the equations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import fused
from .fused import Grads, Resets
from .products import linear


def lstm_forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    state: tuple[Tensor, ...],
    sizes: Sequence[int],
    resets: Resets | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run an LSTM layer.

    Args:
        x: inputs ``[N, I]``.
        w_ih: ``[4H, I]``.
        w_hh: ``[4H, H]``.
        b_ih: ``[4H]`` or None.
        b_hh: ``[4H]`` or None.
        state: ``(h, c)`` before the first step, each ``[sizes[0], H]``.
        sizes: rows of every step.
        resets: replaced states, see :class:`.fused.Resets`.
        keep: whether to return the activations, which the backward pass reads.

    Returns:
        ``h [N, H]``, ``c [N, H]`` and the activated gates ``[i, f, o]``, ``[N, 3H]``, and ``g``,
        ``[N, H]`` (empty without ``keep``).
    """
    rows, hidden = x.shape[0], w_hh.shape[1]
    h, c = x.new_empty(rows, hidden), x.new_empty(rows, hidden)
    # The sigmoid gates are adjacent: pointwise functions are faster on contiguous memory.
    w_ifo, w_g = _split_gates(w_ih)
    b_ifo, b_g = (None, None) if b_ih is None or b_hh is None else _split_gates(b_ih + b_hh)
    w = torch.cat(_split_gates(w_hh))
    i_f_o, g, previous = x.new_empty(0, 3 * hidden), x.new_empty(0, hidden), state
    for chunk in fused.split_time_forward(sizes, 4 * hidden, keep):
        inputs = x[chunk.rows]
        steps = list(sizes[chunk.steps])
        i_f_o, g = linear(inputs, w_ifo, b_ifo), linear(inputs, w_g, b_g)
        of_steps = (i_f_o, g, h[chunk.rows], c[chunk.rows])
        views = zip(*(plane.split(steps) for plane in of_steps), strict=True)
        for t, (gates, g_t, h_t, c_t) in enumerate(views, chunk.first):
            h_tm1, c_tm1 = fused.select_entering_state(previous, t, sizes[t], resets)
            of_h, g_of_h = linear(h_tm1, w).split([3 * hidden, hidden], 1)
            i, f, o = gates.add_(of_h).sigmoid_().chunk(3, 1)
            torch.mul(f, c_tm1, out=c_t).addcmul_(i, g_t.add_(g_of_h).tanh_())
            torch.tanh(c_t, out=h_t).mul_(o)
            previous = (h_t, c_t)
    return (
        (h, c, i_f_o, g) if keep else (h, c, i_f_o.new_empty(0, 3 * hidden), g.new_empty(0, hidden))
    )


def _split_gates(w: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows in the gate order ``i, f, g, o`` into those of ``i, f, o`` and those of ``g``."""
    i, f, g, o = w.chunk(4)
    return torch.cat([i, f, o]), g


def lstm_backward(
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
    """Compute gradients of :func:`lstm_forward` from those of ``h`` and ``c`` (None means zero).

    ``weights`` are ``w_ih``, ``w_hh`` and ``b_hh``, which is not read.
    """
    h, c, i_f_o, g = outputs
    w_ih, w_hh, _ = weights
    hidden = h.shape[1]
    d_x = torch.empty_like(x) if want_x_grad else None
    d_w_ih, d_w_hh = (w.new_zeros(w.shape) for w in (w_ih, w_hh))
    d_bias = h.new_zeros(4 * hidden)
    w = w_hh.t()
    dh, dc = torch.zeros_like(state[0]), torch.zeros_like(state[1])
    reset_grads = fused.make_reset_grads(resets, want_reset_grad)
    for chunk in fused.split_time(sizes, 4 * hidden):
        h_tm1, c_tm1 = (
            fused.gather_entering_states(state[k], after, sizes, chunk, resets, k)
            for k, after in enumerate((h, c))
        )
        gates = i_f_o[chunk.rows]
        d, c_from_h = _factors(gates, g[chunk.rows], c[chunk.rows], c_tm1)
        f = gates[:, hidden : 2 * hidden]
        row = chunk.end
        for t in range(chunk.last - 1, chunk.first - 1, -1):
            n, row = sizes[t], row - sizes[t]
            k = slice(row - chunk.begin, row - chunk.begin + n)
            dh_t, dc_t = dh[:n], dc[:n]
            for grad, sum_t in zip(grads, (dh_t, dc_t), strict=True):
                if grad is not None:
                    sum_t.add_(grad[row : row + n])
            dc_t.addcmul_(dh_t, c_from_h[k])
            d[k, :3].mul_(dc_t.unsqueeze(1))
            d[k, 3].mul_(dh_t)
            dc_t.mul_(f[k])
            dh_t.copy_(linear(d[k].flatten(1), w))
            fused.cut_gradient((dh, dc), t, resets, reset_grads)
        d = d.flatten(1)
        # oneDNN multiplies a contiguous copy faster than a transposed view.
        d_t = d.t().contiguous()
        d_w_hh.add_(linear(d_t, h_tm1.t()))
        d_w_ih.add_(linear(d_t, x[chunk.rows].t()))
        d_bias.add_(d_t.sum(1))
        if d_x is not None:
            d_x[chunk.rows] = linear(d, w_ih.t())
    # A copy: changing the gradient of one bias in place must not change the other.
    return Grads(d_x, d_w_ih, d_w_hh, d_bias, d_bias.clone(), (dh, dc), reset_grads)


def _factors(i_f_o: Tensor, g: Tensor, c: Tensor, c_tm1: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the pointwise derivatives of one step.

    Returns:
        ``[rows, 4, H]``: derivatives of ``c`` by the pre-activations of ``i, f, g``, and of ``h``
        by that of ``o``; and the derivative of ``h`` by ``c``, ``[rows, H]``.
    """
    aten = torch.ops.aten
    i, f, o = i_f_o.chunk(3, 1)
    tanh_c = c.tanh()
    factor = g.new_empty(g.shape[0], 4, g.shape[1])
    by_i, by_f, by_g, by_o = factor.unbind(1)
    aten.sigmoid_backward.grad_input(g, i, grad_input=by_i)
    aten.sigmoid_backward.grad_input(c_tm1, f, grad_input=by_f)
    aten.tanh_backward.grad_input(i, g, grad_input=by_g)
    aten.sigmoid_backward.grad_input(tanh_c, o, grad_input=by_o)
    return factor, aten.tanh_backward(o, tanh_c)
