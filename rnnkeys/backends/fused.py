"""LSTM and GRU over time with hand-written backward passes, on flat time-major rows.

Data is laid out as ``[N, F]``: the rows of step 0, then those of step 1, and so on. ``sizes[t]``
counts the rows of step ``t`` and never grows; row ``j`` of a step goes on in row ``j`` of the next.
A dense ``[T, B]`` batch is the case of constant sizes. Optionally the state is replaced before a
step by a given one (``reset``, dense batches only).

What does not depend on the state is done outside for all time at once: the input projection before,
weight gradients after. The loops hold one matmul and a few in-place pointwise operations on
preallocated buffers, and the factors of the backward pass that do not depend on the incoming
gradient are computed for many steps at once. The equations are those of ``cells.py``, against which
these functions are tested. None of them is seen by autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Rows x gates handled at once in the backward pass: large enough to amortise calls, small enough
# for the cache.
_CHUNK_ELEMENTS = 1 << 17


class Resets(NamedTuple):
    """Where a state is replaced before a step (bool ``[T, B]``), by what (each ``[T, B, H]``)."""

    where: Tensor
    state: tuple[Tensor, ...]


class LSTMGrads(NamedTuple):
    """Gradients of :func:`lstm_forward`'s inputs; those of the resets are None unless asked for."""

    gates: Tensor
    w_hh: Tensor
    h0: Tensor
    c0: Tensor
    reset_h: Tensor | None
    reset_c: Tensor | None


class GRUGrads(NamedTuple):
    """Gradients of :func:`gru_forward`'s inputs; that of the resets is None unless asked for."""

    gates: Tensor
    w_hh: Tensor
    bias_n: Tensor
    h0: Tensor
    reset_h: Tensor | None


def lstm_forward(
    gates: Tensor,
    w_hh: Tensor,
    state: tuple[Tensor, Tensor],
    sizes: Sequence[int],
    resets: Resets | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an LSTM layer.

    Args:
        gates: projected inputs with both biases, ``[N, 4H]``.
        w_hh: ``[4H, H]``.
        state: ``(h, c)`` before the first step, each ``[sizes[0], H]``.
        sizes: rows of every step.
        resets: see the module.
        keep: whether to return the activations, which the backward pass needs.

    Returns:
        ``h [N, H]``, ``c [N, H]`` and the activated gates ``[N, 4H]`` (``[0, 4H]`` without
        ``keep``).
    """
    rows, hidden = gates.shape[0], w_hh.shape[1]
    h, c = gates.new_empty(rows, hidden), gates.new_empty(rows, hidden)
    act = torch.empty_like(gates, memory_format=torch.contiguous_format) if keep else None
    buffer = gates.new_empty(sizes[0], 4 * hidden) if act is None else None
    steps = act.split(list(sizes)) if act is not None else [buffer[:n] for n in sizes]  # pyright: ignore[reportOptionalSubscript]
    gates_t, h_t, c_t = gates.split(list(sizes)), h.split(list(sizes)), c.split(list(sizes))
    w = w_hh.t()
    previous: tuple[Tensor, ...] = state
    for t, a in enumerate(steps):
        h_tm1, c_tm1 = _enter(previous, t, a.shape[0], resets)
        torch.addmm(gates_t[t], h_tm1, w, out=a)
        i_f, g, o = a[:, : 2 * hidden], a[:, 2 * hidden : 3 * hidden], a[:, 3 * hidden :]
        i_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(i_f[:, hidden:], c_tm1, out=c_t[t]).addcmul_(i_f[:, :hidden], g)
        torch.tanh(c_t[t], out=h_t[t]).mul_(o)
        previous = (h_t[t], c_t[t])
    return h, c, gates.new_empty(0, 4 * hidden) if act is None else act


def lstm_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    w_hh: Tensor,
    state: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor, Tensor],
    sizes: Sequence[int],
    resets: Resets | None,
    want_reset_grad: bool,
) -> LSTMGrads:
    """Gradients of :func:`lstm_forward` from those of ``h`` and ``c`` (None means zero)."""
    h, c, act = outputs
    hidden = h.shape[1]
    h_tm1 = _entering(state[0], h, sizes, resets, 0)
    c_tm1 = _entering(state[1], c, sizes, resets, 1)
    grads = torch.empty_like(act)
    dh, dc = torch.zeros_like(state[0]), torch.zeros_like(state[1])
    reset_grads = _reset_grads(resets, want_reset_grad)
    for first, last, begin, end in _chunks(sizes, 4 * hidden):
        i, f, g, o = act[begin:end].chunk(4, 1)
        tanh_c = c[begin:end].tanh()
        factor = act.new_empty(end - begin, 4, hidden)
        torch.mul(g * i, 1 - i, out=factor[:, 0])
        torch.mul(c_tm1[begin:end] * f, 1 - f, out=factor[:, 1])
        torch.mul(i, 1 - g * g, out=factor[:, 2])
        torch.mul(tanh_c * o, 1 - o, out=factor[:, 3])
        c_from_h = o * (1 - tanh_c * tanh_c)
        row = end
        for t in range(last - 1, first - 1, -1):
            n = sizes[t]
            row -= n
            k = slice(row - begin, row - begin + n)
            d, dh_t, dc_t = grads[row : row + n].view(n, 4, hidden), dh[:n], dc[:n]
            if grad_h is not None:
                dh_t.add_(grad_h[row : row + n])
            if grad_c is not None:
                dc_t.add_(grad_c[row : row + n])
            dc_t.addcmul_(dh_t, c_from_h[k])
            torch.mul(factor[k, :3], dc_t.unsqueeze(1), out=d[:, :3])
            torch.mul(factor[k, 3], dh_t, out=d[:, 3])
            dc_t.mul_(f[k])
            torch.mm(d.view(n, -1), w_hh, out=dh_t)
            _leave((dh, dc), t, resets, reset_grads)
    reset_h, reset_c = reset_grads or (None, None)
    return LSTMGrads(grads, grads.t() @ h_tm1, dh, dc, reset_h, reset_c)


def gru_forward(
    gates: Tensor,
    w_hh: Tensor,
    bias_n: Tensor,
    h0: Tensor,
    sizes: Sequence[int],
    resets: Resets | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Run a GRU layer.

    Args:
        gates: projected inputs with ``b_ih`` and the r and z parts of ``b_hh``, ``[N, 3H]``.
        w_hh: ``[3H, H]``.
        bias_n: the n part of ``b_hh``, ``[H]``, which the reset gate scales.
        h0: before the first step, ``[sizes[0], H]``.
        sizes: rows of every step.
        resets: see the module.
        keep: whether to return what the backward pass needs.

    Returns:
        ``h [N, H]`` and ``[r, z, n, W_hn h + b_hn]``, ``[N, 4H]`` (``[0, 4H]`` without ``keep``).
    """
    rows, hidden = gates.shape[0], w_hh.shape[1]
    steps = list(sizes)
    h = gates.new_empty(rows, hidden)
    act = gates.new_empty(rows if keep else sizes[0], 4 * hidden)
    views = [p.split(steps) if keep else [p[:n] for n in steps] for p in _gru_planes(act)]
    gates_rz, gates_n = gates[:, : 2 * hidden].split(steps), gates[:, 2 * hidden :].split(steps)
    gates_h, w = gates.new_empty(sizes[0], 3 * hidden), w_hh.t()
    of_rz, of_n = gates_h.split([2 * hidden, hidden], 1)
    previous: tuple[Tensor, ...] = (h0,)
    for t, (h_t, r_z, r, z, candidate, h_n) in enumerate(zip(h.split(steps), *views, strict=True)):
        (h_tm1,) = _enter(previous, t, steps[t], resets)
        if steps[t] != gates_h.shape[0]:
            gates_h, of_rz, of_n = (b[: steps[t]] for b in (gates_h, of_rz, of_n))
        torch.mm(h_tm1, w, out=gates_h)
        torch.add(gates_rz[t], of_rz, out=r_z).sigmoid_()
        torch.add(of_n, bias_n, out=h_n)
        torch.addcmul(gates_n[t], r, h_n, out=candidate).tanh_()
        torch.lerp(candidate, h_tm1, z, out=h_t)
        previous = (h_t,)
    return h, act if keep else gates.new_empty(0, 4 * hidden)


def _gru_planes(act: Tensor) -> tuple[Tensor, ...]:
    """View what :func:`gru_forward` keeps: ``[r, z]``, ``r``, ``z``, ``n``, ``W_hn h + b_hn``.

    The parts lie one after the other, each contiguous, since pointwise functions of torch are
    vectorised and parallel only over contiguous memory.
    """
    rows, hidden = act.shape[0], act.shape[1] // 4
    r_z, n, h_n = act.view(-1).split([2 * rows * hidden, rows * hidden, rows * hidden])
    r_z = r_z.view(rows, 2 * hidden)
    return r_z, r_z[:, :hidden], r_z[:, hidden:], n.view(rows, hidden), h_n.view(rows, hidden)


def gru_backward(
    grad_h: Tensor,
    w_hh: Tensor,
    h0: Tensor,
    outputs: tuple[Tensor, Tensor],
    sizes: Sequence[int],
    resets: Resets | None,
    want_reset_grad: bool,
) -> GRUGrads:
    """Gradients of :func:`gru_forward` from that of ``h``."""
    h, act = outputs
    hidden, steps = h.shape[1], list(sizes)
    h_tm1 = _entering(h0, h, sizes, resets, 0)
    # Columns W_hn h, r, z, W_in x: the state's gates are the first three, the input's the last
    # three.
    grads = torch.empty_like(act)
    of_state = grads[:, : 3 * hidden]
    grad_t, d_t = grad_h.split(steps), grads.view(-1, 4, hidden).split(steps)
    of_state_t = of_state.split(steps)
    w = torch.cat([w_hh[2 * hidden :], w_hh[: 2 * hidden]])
    dh = torch.zeros_like(h0)
    reset_grads = _reset_grads(resets, want_reset_grad)
    for first, last, begin, end in _chunks(sizes, 4 * hidden):
        _, r, z, n, h_n = (plane[begin:end] for plane in _gru_planes(act))
        factor = _gru_factors(r, z, n, h_n, h_tm1[begin:end]).split(steps[first:last])
        z_t = z.split(steps[first:last])
        for t in range(last - 1, first - 1, -1):
            dh_t = dh if steps[t] == steps[0] else dh[: steps[t]]
            dh_t.add_(grad_t[t])
            torch.mul(factor[t - first], dh_t.unsqueeze(1), out=d_t[t])
            dh_t.mul_(z_t[t - first]).addmm_(of_state_t[t], w)
            _leave((dh,), t, resets, reset_grads)
    w_grad = of_state.t() @ h_tm1
    w_grad = torch.cat([w_grad[hidden:], w_grad[:hidden]])
    bias_grad = grads[:, :hidden].sum(0)
    reset_h = reset_grads[0] if reset_grads else None
    return GRUGrads(grads[:, hidden:], w_grad, bias_grad, dh, reset_h)


def _gru_factors(r: Tensor, z: Tensor, n: Tensor, h_n: Tensor, h_tm1: Tensor) -> Tensor:
    """Derivatives of the new state by ``W_hn h``, ``r``, ``z`` and ``W_in x``, ``[rows, 4, H]``.

    Those by gates are by what goes into their sigmoid or tanh.
    """
    factor = n.new_empty(n.shape[0], 4, n.shape[1])
    by_h_n, by_r, by_z, by_n = factor.unbind(1)
    not_z = 1 - z
    torch.addcmul(not_z, not_z * n, n, value=-1, out=by_n)
    torch.mul(by_n, r, out=by_h_n)
    through_r = by_h_n * h_n
    torch.addcmul(through_r, through_r, r, value=-1, out=by_r)
    torch.mul((h_tm1 - n).mul_(z), not_z, out=by_z)
    return factor


def _enter(
    state: tuple[Tensor, ...], t: int, rows: int, resets: Resets | None
) -> tuple[Tensor, ...]:
    """State entering step ``t``: the rows that go on, replaced where there is a reset."""
    if resets is not None and t:
        where = resets.where[t].unsqueeze(1)
        return tuple(torch.where(where, r[t], s) for r, s in zip(resets.state, state, strict=True))
    return state if state[0].shape[0] == rows else tuple(s[:rows] for s in state)


def _entering(
    first: Tensor, after: Tensor, sizes: Sequence[int], resets: Resets | None, entry: int
) -> Tensor:
    """States entering every step, ``[N, H]``, from those after every step."""
    if sizes[0] == sizes[-1]:
        before = torch.cat([first, after[: after.shape[0] - sizes[0]]])
    else:
        steps = after.split(list(sizes))
        going_on = [s[:n] for s, n in zip(steps[:-1], sizes[1:], strict=True)]
        before = torch.cat([first, *going_on])
    if resets is None:
        return before
    where = resets.where.clone()
    where[0] = False
    steps_rows = before.view(*where.shape, -1)
    return torch.where(where.unsqueeze(-1), resets.state[entry], steps_rows).flatten(0, 1)


def _reset_grads(resets: Resets | None, wanted: bool) -> tuple[Tensor, ...] | None:
    if resets is None or not wanted:
        return None
    return tuple(torch.zeros(s.shape, dtype=s.dtype, device=s.device) for s in resets.state)


def _leave(
    grads: tuple[Tensor, ...],
    t: int,
    resets: Resets | None,
    reset_grads: tuple[Tensor, ...] | None,
) -> None:
    """Stop the gradient towards the past at a reset before step ``t``; a NaN does not pass."""
    if resets is None or t == 0:
        return
    where = resets.where[t].unsqueeze(1)
    for i, grad in enumerate(grads):
        if reset_grads is not None:
            torch.where(where, grad, grad.new_zeros(()), out=reset_grads[i][t])
        grad.masked_fill_(where, 0)


def _chunks(sizes: Sequence[int], width: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut time into chunks, from its end: first step, end step, first row, end row."""
    limit = max(1, _CHUNK_ELEMENTS // width)
    last, end = len(sizes), sum(sizes)
    while last:
        first, begin = last, end
        while first and (first == last or end - begin + sizes[first - 1] <= limit):
            first -= 1
            begin -= sizes[first]
        yield first, last, begin, end
        last, end = first, begin
