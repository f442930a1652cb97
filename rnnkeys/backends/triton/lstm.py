"""Triton kernels of the LSTM's recurrence; :mod:`.products` computes the projections around it.

Tensors are contiguous and batch-major. ``gates [B, T, 4H]`` holds the projected inputs with both
biases, in the order i, f, g, o. :mod:`.config` chooses one of two forms:

- *resident* (:func:`forward`, :func:`backward`): each row of the product is one segment,
  longest first, from anywhere in the batch, so that short episodes run in parallel and no step
  checks for a reset. A program keeps its columns of the recurrent weights on the chip for all
  segments and time steps. With ``SPLIT`` several programs divide the columns of a group of rows,
  exchange ``h`` through memory and synchronize after every step; all of them must run at once.
- *stepwise* (:func:`forward_step`, :func:`backward_step`): one launch per step over all rows of the
  batch and all columns. Each launch reads the weights again; its end is the barrier.

The equations are those of :mod:`rnnkeys.cells`. Stored states are loaded only for the rows that
start a segment; others are never read. Arithmetic is float32; the operands of products have the
dtype of the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import (
    four,
    group_of,
    in_chunks,
    inner,
    is_first,
    is_last,
    load,
    load_four,
    product,
    rows_of_program,
    side_by_side,
    spread,
    store,
    store_four,
    synchronize,
    tanh,
    weight,
    weights_of_columns,
    weights_of_rows,
)


@triton.jit
def _step_forward(a_i, a_f, a_g, a_o, c_tm1):
    """Return the activated gates, ``h`` and ``c`` from the gates' arguments."""
    i = tl.sigmoid(a_i)
    f = tl.sigmoid(a_f)
    g = tanh(a_g)
    o = tl.sigmoid(a_o)
    c = f * c_tm1 + i * g
    return i, f, g, o, o * tanh(c), c


@triton.jit
def _step_backward(i, f, g, o, c_tm1, c, dh, dc):
    """Return gradients of the gates' arguments and of ``c_tm1`` from those of ``h`` and ``c``."""
    tanh_c = tanh(c)
    dc += dh * o * (1 - tanh_c * tanh_c)
    d_i = dc * g * i * (1 - i)
    d_f = dc * c_tm1 * f * (1 - f)
    d_g = dc * i * (1 - g * g)
    d_o = dh * tanh_c * o * (1 - o)
    return d_i, d_f, d_g, d_o, dc * f


@triton.jit(do_not_specialize=["N", "T", "reset_b", "reset_t"])
def forward(
    gates, h_out, c_out, reset_h, reset_c, order, w_hh, tickets,
    N, T, H, reset_b, reset_t,
    KEEP: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run all steps; with ``KEEP`` the activated gates replace ``gates``."""
    lane = tl.program_id(0)
    segments = tl.load(order + N + N)
    if lane * BLOCK_B >= segments:
        return
    first_n = tl.program_id(1) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)[None, :]
    wide = tl.arange(0, 4 * BLOCK_N)[None, :]
    n_wide = first_n + wide % BLOCK_N
    k = inner(CHUNKS, BLOCK_K)
    w = weights_of_columns(w_hh, 4, first_n, H, CHUNKS, BLOCK_N, BLOCK_K)
    arrivals = 0
    for group in range(lane, tl.cdiv(segments, BLOCK_B), tl.num_programs(0)):
        at, length, reset_at, longest = group_of(
            order, N, segments, group, T, reset_b, reset_t, BLOCK_B
        )
        live_k = (length[None, :, None] > 0) & (k[:, None, :] < H)
        operand = load(reset_h + reset_at[None, :, None] + k[:, None, :], live_k)
        at, length, reset_at = at[:, None], length[:, None], reset_at[:, None]
        c = load(reset_c + reset_at + n, (length > 0) & (n < H))
        x = gates + (wide // BLOCK_N) * H + n_wide
        # Loaded one step ahead, to hide the latency.
        x_t = load(x + at * (4 * H), (length > 0) & (n_wide < H))
        for t in range(longest):
            x_next = load(x + (at + t + 1) * (4 * H), (length > t + 1) & (n_wide < H))
            a = product(operand.to(w.dtype), w, x_t, PRECISION)
            a_i, a_f, a_g, a_o = four(a, BLOCK_B, BLOCK_N)
            i, f, g, o, h, c = _step_forward(a_i, a_f, a_g, a_o, c)
            live = (length > t) & (n < H)
            here = (at + t) * H + n
            store(h_out + here, h, live)
            if SPLIT > 1:
                arrivals += SPLIT
                synchronize(tickets + lane, arrivals)
                h_at = tl.trans(at + t)[:, :, None] * H + k[:, None, :]
                live_k = (tl.trans(length)[:, :, None] > t + 1) & (k[:, None, :] < H)
                operand = load(h_out + h_at, live_k)
            else:
                operand = in_chunks(h, CHUNKS, BLOCK_B, BLOCK_K)
            store(c_out + here, c, live)
            if KEEP:
                store_four(gates + (at + t) * (4 * H) + n, H, i, f, g, o, live)
            x_t = x_next


@triton.jit(do_not_specialize=["N", "T", "reset_b", "reset_t"])
def backward(
    grad_h, grad_c, act, c_out, reset_c, order, w_hh, d_gates, d_reset_c, tickets,
    N, T, H, reset_b, reset_t,
    HAS_DC: tl.constexpr, WANT_RESET: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run all steps backward and write the gradients of the gates' arguments.

    The gradient of ``reset_c`` is written where a segment starts; that of ``reset_h`` is computed
    outside, from the gates' gradients.
    """
    lane = tl.program_id(0)
    segments = tl.load(order + N + N)
    if lane * BLOCK_B >= segments:
        return
    first_n = tl.program_id(1) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)[None, :]
    q = inner(CHUNKS, 4 * BLOCK_K)
    k = q % BLOCK_K
    w = weights_of_rows(w_hh, 0, first_n, H, CHUNKS, BLOCK_N, BLOCK_K)
    arrivals = 0
    for group in range(lane, tl.cdiv(segments, BLOCK_B), tl.num_programs(0)):
        at, length, reset_at, longest = group_of(
            order, N, segments, group, T, reset_b, reset_t, BLOCK_B
        )
        at, length, reset_at = at[:, None], length[:, None], reset_at[:, None]
        initial = load(reset_c + reset_at + n, (length > 0) & (n < H))
        c = load(c_out + (at + longest - 1) * H + n, (length == longest) & (n < H))
        dh = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        dc = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        for s in range(longest):
            t = longest - 1 - s
            live = (length > t) & (n < H)
            here = (at + t) * H + n
            i, f, g, o = load_four(act + (at + t) * (4 * H) + n, H, live)
            # Rows whose last step is t - 1 read its c here.
            before = load(c_out + here - H, (length >= t) & (n < H) & (spread(t, n) > 0))
            c_tm1 = tl.where(t > 0, before, initial)
            dh += load(grad_h + here, live)
            if HAS_DC:
                dc += load(grad_c + here, live)
            d_i, d_f, d_g, d_o, dc = _step_backward(i, f, g, o, c_tm1, c, dh, dc)
            c = before
            store_four(d_gates + (at + t) * (4 * H) + n, H, d_i, d_f, d_g, d_o, live)
            if SPLIT > 1:
                arrivals += SPLIT
                synchronize(tickets + lane, arrivals)
                d_at = tl.trans(at + t)[:, :, None] * (4 * H) + (q // BLOCK_K * H + k)[:, None, :]
                live_k = (tl.trans(length)[:, :, None] > t) & (k[:, None, :] < H)
                d = load(d_gates + d_at, live_k)
            else:
                d = in_chunks(side_by_side(d_i, d_f, d_g, d_o), CHUNKS, BLOCK_B, 4 * BLOCK_K)
            dh = product(d.to(w.dtype), w, tl.zeros([BLOCK_B, BLOCK_N], tl.float32), PRECISION)
        if WANT_RESET:
            store(d_reset_c + at * H + n, dc, (length > 0) & (n < H))


@triton.jit(do_not_specialize=["B", "T", "reset_b", "reset_t", "t"])
def forward_step(
    gates, h_out, c_out, reset_h, reset_c, is_init, w_hh, B, T, H, reset_b, reset_t, t,
    KEEP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run step ``t`` of all rows, one tile of rows and columns per program."""
    b = rows_of_program(BLOCK_B)
    live_b = (b < B)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    step = b * T + t
    reset_at = (b * reset_b + reset_t.to(tl.int64) * t)[:, None]
    first = is_first(is_init, step, t, b < B)[:, None]
    a_i = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    a_f = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    a_g = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    a_o = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for block in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        k = block + tl.arange(0, BLOCK_K)
        at = step[:, None] * H + k[None, :]
        live_k = live_b & (k < H)[None, :]
        h_initial = tl.load(reset_h + reset_at + k[None, :], mask=live_k & first, other=0.0)
        h_before = tl.load(h_out + at - H, mask=live_k & ~first, other=0.0)
        operand = tl.where(first, h_initial, h_before).to(w_hh.dtype.element_ty)
        w_i = weight(w_hh, 0, n, k[:, None], H)
        w_f = weight(w_hh, 1, n, k[:, None], H)
        w_g = weight(w_hh, 2, n, k[:, None], H)
        w_o = weight(w_hh, 3, n, k[:, None], H)
        a_i = tl.dot(operand, w_i, a_i, input_precision=PRECISION)
        a_f = tl.dot(operand, w_f, a_f, input_precision=PRECISION)
        a_g = tl.dot(operand, w_g, a_g, input_precision=PRECISION)
        a_o = tl.dot(operand, w_o, a_o, input_precision=PRECISION)
    live = live_b & (n < H)
    here = step[:, None] * H + n
    c_initial = load(reset_c + reset_at + n, live & first)
    c_before = load(c_out + here - H, live & ~first)
    x = gates + step[:, None] * (4 * H) + n
    x_i, x_f, x_g, x_o = load_four(x, H, live)
    c_tm1 = tl.where(first, c_initial, c_before)
    i, f, g, o, h, c = _step_forward(a_i + x_i, a_f + x_f, a_g + x_g, a_o + x_o, c_tm1)
    store(h_out + here, h, live)
    store(c_out + here, c, live)
    if KEEP:
        store_four(x, H, i, f, g, o, live)


@triton.jit(do_not_specialize=["B", "T", "reset_b", "reset_t", "t"])
def backward_step(
    grad_h, grad_c, act, c_out, reset_c, is_init, w_hh, d_gates, d_reset_c, carry,
    B, T, H, reset_b, reset_t, t,
    HAS_DC: tl.constexpr, WANT_RESET: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run step ``t`` backward; ``carry [B, H]`` holds the gradient of ``c``."""
    b = rows_of_program(BLOCK_B)
    live_b = (b < B)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    step = b * T + t
    reset_at = (b * reset_b + reset_t.to(tl.int64) * t)[:, None]
    first = is_first(is_init, step, t, b < B)[:, None]
    last = is_last(is_init, step, t, T, b < B)[:, None]
    dh = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for block in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        k = block + tl.arange(0, BLOCK_K)
        d = d_gates + (step[:, None] + 1) * (4 * H) + k[None, :]
        continues = live_b & ~last & (k < H)[None, :]
        d_i = tl.load(d, mask=continues, other=0.0)
        d_f = tl.load(d + H, mask=continues, other=0.0)
        d_g = tl.load(d + 2 * H, mask=continues, other=0.0)
        d_o = tl.load(d + 3 * H, mask=continues, other=0.0)
        w_i = weight(w_hh, 0, k[:, None], n, H)
        w_f = weight(w_hh, 1, k[:, None], n, H)
        w_g = weight(w_hh, 2, k[:, None], n, H)
        w_o = weight(w_hh, 3, k[:, None], n, H)
        dh = tl.dot(d_i, w_i, dh, input_precision=PRECISION)
        dh = tl.dot(d_f, w_f, dh, input_precision=PRECISION)
        dh = tl.dot(d_g, w_g, dh, input_precision=PRECISION)
        dh = tl.dot(d_o, w_o, dh, input_precision=PRECISION)
    live = live_b & (n < H)
    here = step[:, None] * H + n
    c_initial = load(reset_c + reset_at + n, live & first)
    c_before = load(c_out + here - H, live & ~first)
    c_tm1 = tl.where(first, c_initial, c_before)
    dh += load(grad_h + here, live)
    past = carry + b[:, None] * H + n
    dc = load(past, live & ~last)
    if HAS_DC:
        dc += load(grad_c + here, live)
    c = load(c_out + here, live)
    i, f, g, o = load_four(act + step[:, None] * (4 * H) + n, H, live)
    d_i, d_f, d_g, d_o, dc = _step_backward(i, f, g, o, c_tm1, c, dh, dc)
    store_four(d_gates + step[:, None] * (4 * H) + n, H, d_i, d_f, d_g, d_o, live)
    if WANT_RESET:
        store(d_reset_c + here, dc, live & first)
    store(past, dc, live)
