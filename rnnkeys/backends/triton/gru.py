"""Triton kernels of the GRU's recurrence; forms, layout and rules are those of :mod:`.lstm`.

``gates [B, T, 4H]`` holds in its first three quarters the projected inputs r, z, n, with ``b_ih``
and the r and z parts of ``b_hh``. ``bias_n [H]`` is the n part, which the reset gate multiplies.
The backward pass reads the activated r, z, n, and ``h_n = W_hn h + bias_n``, the last quarter.
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
def _step_forward(a_r, a_z, x_n, h_n, h_tm1):
    """Return the activated gates and ``h`` from the gates' arguments."""
    r = tl.sigmoid(a_r)
    z = tl.sigmoid(a_z)
    n = tanh(x_n + r * h_n)
    return r, z, n, n + z * (h_tm1 - n)


@triton.jit
def _step_backward(r, z, n, h_n, h_tm1, dh):
    """Return gradients of n, r, z before activation, of ``h_n``, and of ``h_tm1`` through z."""
    d_n = dh * (1 - z) * (1 - n * n)
    d_r = d_n * h_n * r * (1 - r)
    d_z = dh * (h_tm1 - n) * z * (1 - z)
    return d_n, d_r, d_z, d_n * r, dh * z


@triton.jit
def _load_addends(x, bias_n, H, n_wide, quarter, live):
    """Load the addends of the products of r, z and ``h_n``; n has no product."""
    is_bias = quarter == 2
    gate = tl.where(quarter == 3, 2, quarter)
    x_t = load(x + gate * H + n_wide, live & ~is_bias)
    return x_t + load(bias_n + n_wide, live & is_bias)


@triton.jit(do_not_specialize=["N", "T", "reset_b", "reset_t"])
def forward(
    gates, h_out, reset_h, order, w_hh, bias_n, tickets,
    N, T, H, reset_b, reset_t,
    KEEP: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run all steps; with ``KEEP`` the activated gates and ``h_n`` replace ``gates``."""
    lane = tl.program_id(0)
    segments = tl.load(order + N + N)
    if lane * BLOCK_B >= segments:
        return
    first_n = tl.program_id(1) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)[None, :]
    wide = tl.arange(0, 4 * BLOCK_N)[None, :]
    n_wide = first_n + wide % BLOCK_N
    quarter = wide // BLOCK_N
    k = inner(CHUNKS, BLOCK_K)
    w = weights_of_columns(w_hh, 3, first_n, H, CHUNKS, BLOCK_N, BLOCK_K)
    arrivals = 0
    for group in range(lane, tl.cdiv(segments, BLOCK_B), tl.num_programs(0)):
        at, length, reset_at, longest = group_of(
            order, N, segments, group, T, reset_b, reset_t, BLOCK_B
        )
        live_k = (length[None, :, None] > 0) & (k[:, None, :] < H)
        operand = load(reset_h + reset_at[None, :, None] + k[:, None, :], live_k)
        at, length, reset_at = at[:, None], length[:, None], reset_at[:, None]
        h = load(reset_h + reset_at + n, (length > 0) & (n < H))
        x = gates + at * (4 * H)
        # Loaded one step ahead, to hide the latency.
        x_t = _load_addends(x, bias_n, H, n_wide, quarter, (length > 0) & (n_wide < H))
        for t in range(longest):
            live_next = (length > t + 1) & (n_wide < H)
            x_next = _load_addends(x + (t + 1) * (4 * H), bias_n, H, n_wide, quarter, live_next)
            a = product(operand.to(w.dtype), w, x_t, PRECISION)
            a_r, a_z, h_n, x_n = four(a, BLOCK_B, BLOCK_N)
            r, z, new, h = _step_forward(a_r, a_z, x_n, h_n, h)
            live = (length > t) & (n < H)
            store(h_out + (at + t) * H + n, h, live)
            if SPLIT > 1:
                arrivals += SPLIT
                synchronize(tickets + lane, arrivals)
                h_at = tl.trans(at + t)[:, :, None] * H + k[:, None, :]
                live_k = (tl.trans(length)[:, :, None] > t + 1) & (k[:, None, :] < H)
                operand = load(h_out + h_at, live_k)
            else:
                operand = in_chunks(h, CHUNKS, BLOCK_B, BLOCK_K)
            if KEEP:
                store_four(x + t * (4 * H) + n, H, r, z, new, h_n, live)
            x_t = x_next


@triton.jit(do_not_specialize=["N", "T", "reset_b", "reset_t"])
def backward(
    grad_h, act, h_out, reset_h, order, w_hh, d_gates, d_reset_h, tickets,
    N, T, H, reset_b, reset_t,
    WANT_RESET: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run all steps backward and write ``d_gates [B, T, 4H]`` in the order n, r, z, ``h_n``.

    The first three are the gradients of the input projection, the last three those of the recurrent
    product, so that each is one strided view. Where a segment starts, ``d_reset_h`` receives the
    gradient of ``reset_h`` through z; the rest is computed outside, from the gates' gradients.
    """
    lane = tl.program_id(0)
    segments = tl.load(order + N + N)
    if lane * BLOCK_B >= segments:
        return
    first_n = tl.program_id(1) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)[None, :]
    q = inner(CHUNKS, 4 * BLOCK_K)
    k = q % BLOCK_K
    w = weights_of_rows(w_hh, 1, first_n, H, CHUNKS, BLOCK_N, BLOCK_K)
    arrivals = 0
    for group in range(lane, tl.cdiv(segments, BLOCK_B), tl.num_programs(0)):
        at, length, reset_at, longest = group_of(
            order, N, segments, group, T, reset_b, reset_t, BLOCK_B
        )
        at, length, reset_at = at[:, None], length[:, None], reset_at[:, None]
        initial = load(reset_h + reset_at + n, (length > 0) & (n < H))
        through_gates = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        through_z = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        for s in range(longest):
            t = longest - 1 - s
            live = (length > t) & (n < H)
            here = (at + t) * H + n
            r, z, new, h_n = load_four(act + (at + t) * (4 * H) + n, H, live)
            h_tm1 = tl.where(t > 0, load(h_out + here - H, live & (spread(t, n) > 0)), initial)
            dh = through_gates + through_z + load(grad_h + here, live)
            d_n, d_r, d_z, d_hn, through_z = _step_backward(r, z, new, h_n, h_tm1, dh)
            store_four(d_gates + (at + t) * (4 * H) + n, H, d_n, d_r, d_z, d_hn, live)
            if SPLIT > 1:
                arrivals += SPLIT
                synchronize(tickets + lane, arrivals)
                d_at = tl.trans(at + t)[:, :, None] * (4 * H) + (q // BLOCK_K * H + k)[:, None, :]
                live_k = (tl.trans(length)[:, :, None] > t) & (k[:, None, :] < H)
                d = load(d_gates + d_at, live_k)
            else:
                d = in_chunks(side_by_side(d_n, d_r, d_z, d_hn), CHUNKS, BLOCK_B, 4 * BLOCK_K)
            zero = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
            through_gates = product(d.to(w.dtype), w, zero, PRECISION)
        if WANT_RESET:
            store(d_reset_h + at * H + n, through_z, (length > 0) & (n < H))


@triton.jit(do_not_specialize=["B", "T", "reset_b", "reset_t", "t"])
def forward_step(
    gates, h_out, reset_h, is_init, w_hh, bias_n, B, T, H, reset_b, reset_t, t,
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
    a_r = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    a_z = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    h_n = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for block in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        k = block + tl.arange(0, BLOCK_K)
        at = step[:, None] * H + k[None, :]
        live_k = live_b & (k < H)[None, :]
        h_initial = tl.load(reset_h + reset_at + k[None, :], mask=live_k & first, other=0.0)
        h_before = tl.load(h_out + at - H, mask=live_k & ~first, other=0.0)
        operand = tl.where(first, h_initial, h_before).to(w_hh.dtype.element_ty)
        w_r = weight(w_hh, 0, n, k[:, None], H)
        w_z = weight(w_hh, 1, n, k[:, None], H)
        w_n = weight(w_hh, 2, n, k[:, None], H)
        a_r = tl.dot(operand, w_r, a_r, input_precision=PRECISION)
        a_z = tl.dot(operand, w_z, a_z, input_precision=PRECISION)
        h_n = tl.dot(operand, w_n, h_n, input_precision=PRECISION)
    live = live_b & (n < H)
    here = step[:, None] * H + n
    initial = load(reset_h + reset_at + n, live & first)
    before = load(h_out + here - H, live & ~first)
    h_tm1 = tl.where(first, initial, before)
    x = gates + step[:, None] * (4 * H) + n
    a_r += load(x, live)
    a_z += load(x + H, live)
    h_n += load(bias_n + n, n < H)
    r, z, new, h = _step_forward(a_r, a_z, load(x + 2 * H, live), h_n, h_tm1)
    store(h_out + here, h, live)
    if KEEP:
        store_four(x, H, r, z, new, h_n, live)


@triton.jit(do_not_specialize=["B", "T", "reset_b", "reset_t", "t"])
def backward_step(
    grad_h, act, h_out, reset_h, is_init, w_hh, d_gates, d_reset_h, carry,
    B, T, H, reset_b, reset_t, t,
    WANT_RESET: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run step ``t`` backward; ``carry [B, H]`` holds the gradient of ``h`` through z."""
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
        d_r = tl.load(d + H, mask=continues, other=0.0)
        d_z = tl.load(d + 2 * H, mask=continues, other=0.0)
        d_hn = tl.load(d + 3 * H, mask=continues, other=0.0)
        w_r = weight(w_hh, 0, k[:, None], n, H)
        w_z = weight(w_hh, 1, k[:, None], n, H)
        w_n = weight(w_hh, 2, k[:, None], n, H)
        dh = tl.dot(d_r, w_r, dh, input_precision=PRECISION)
        dh = tl.dot(d_z, w_z, dh, input_precision=PRECISION)
        dh = tl.dot(d_hn, w_n, dh, input_precision=PRECISION)
    live = live_b & (n < H)
    here = step[:, None] * H + n
    initial = load(reset_h + reset_at + n, live & first)
    before = load(h_out + here - H, live & ~first)
    h_tm1 = tl.where(first, initial, before)
    past = carry + b[:, None] * H + n
    dh += load(grad_h + here, live) + load(past, live & ~last)
    at = step[:, None] * (4 * H) + n
    r, z, new, h_n = load_four(act + at, H, live)
    d_n, d_r, d_z, d_hn, dh = _step_backward(r, z, new, h_n, h_tm1, dh)
    store_four(d_gates + at, H, d_n, d_r, d_z, d_hn, live)
    if WANT_RESET:
        store(d_reset_h + here, dh, live & first)
    store(past, dh, live)
