"""Triton kernels of the GRU's recurrence; forms, layout and rules are those of :mod:`.lstm`.

``gates [B, T, 4H]`` holds in its first three quarters the projected inputs r, z, n, with ``b_ih``
and the r and z parts of ``b_hh``. ``bias_n [H]`` is the n part, which stands inside the reset gate.
The backward pass needs the activated r, z, n, and ``h_n = W_hn h + bias_n``, the last quarter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import is_first, is_last, load, store, tanh, weight


@triton.jit
def _advance(a_r, a_z, x_n, h_n, h_tm1):
    """Return the activated gates and ``h`` from the gates' arguments."""
    r = tl.sigmoid(a_r)
    z = tl.sigmoid(a_z)
    n = tanh(x_n + r * h_n)
    return r, z, n, n + z * (h_tm1 - n)


@triton.jit
def _retreat(act, H, h_tm1, dh, mask):
    """Return gradients of n, r, z before activation, of ``h_n``, and of ``h_tm1`` through z."""
    r = load(act, mask)
    z = load(act + H, mask)
    n = load(act + 2 * H, mask)
    d_n = dh * (1 - z) * (1 - n * n)
    d_r = d_n * load(act + 3 * H, mask) * r * (1 - r)
    d_z = dh * (h_tm1 - n) * z * (1 - z)
    return d_n, d_r, d_z, d_n * r, dh * z


@triton.jit
def _store_four(ptr, H, first, second, third, fourth, mask):
    store(ptr, first, mask)
    store(ptr + H, second, mask)
    store(ptr + 2 * H, third, mask)
    store(ptr + 3 * H, fourth, mask)


@triton.jit
def forward_resident(
    gates, h_out, reset_h, is_init, w_hh, bias_n, B, T, H, reset_b, reset_t,
    KEEP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run all steps; with ``KEEP`` the activated gates and ``h_n`` replace ``gates``."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.arange(0, BLOCK_H)[None, :]
    k = tl.arange(0, BLOCK_H)[:, None]
    live = (b < B)[:, None] & (n < H)
    w_r = weight(w_hh, 0, n, k, H)
    w_z = weight(w_hh, 1, n, k, H)
    w_n = weight(w_hh, 2, n, k, H)
    b_n = load(bias_n + n, n < H)
    h = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for t in tl.range(0, T, num_stages=STAGES):
        step = b.to(tl.int64) * T + t
        reset_at = (b.to(tl.int64) * reset_b + t * reset_t)[:, None]
        first = is_first(is_init, step, t, b < B)[:, None]
        here = step[:, None] * H + n
        fresh_at = reset_at + n
        h = tl.where(first, load(reset_h + fresh_at, live & first), h)
        x = gates + step[:, None] * (4 * H) + n
        operand = h.to(w_r.dtype)
        a_r = load(x, live) + tl.dot(operand, w_r, input_precision=PRECISION)
        a_z = load(x + H, live) + tl.dot(operand, w_z, input_precision=PRECISION)
        h_n = b_n + tl.dot(operand, w_n, input_precision=PRECISION)
        r, z, new, h = _advance(a_r, a_z, load(x + 2 * H, live), h_n, h)
        store(h_out + here, h, live)
        if KEEP:
            _store_four(x, H, r, z, new, h_n, live)


@triton.jit(do_not_specialize=["t_begin", "t_end"])
def forward_tiled(
    gates, h_out, reset_h, is_init, w_hh, bias_n, B, T, H,
    reset_b, reset_t, t_begin, t_end, columns,
    KEEP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run steps ``t_begin`` to ``t_end`` of ``columns`` columns; otherwise as the resident form."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live_b = (b < B)[:, None]
    begin = tl.program_id(1) * columns
    for t in range(t_begin, t_end):
        step = b.to(tl.int64) * T + t
        reset_at = (b.to(tl.int64) * reset_b + t * reset_t)[:, None]
        first = is_first(is_init, step, t, b < B)[:, None]
        for tile in range(begin, tl.minimum(begin + columns, H), BLOCK_N):
            n = tile + tl.arange(0, BLOCK_N)[None, :]
            a_r = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
            a_z = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
            h_n = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
            for inner in tl.range(0, H, BLOCK_K, num_stages=STAGES):
                k = inner + tl.arange(0, BLOCK_K)
                at = step[:, None] * H + k[None, :]
                live_k = live_b & (k < H)[None, :]
                h_fresh = tl.load(reset_h + reset_at + k[None, :], mask=live_k & first, other=0.0)
                h_going = tl.load(h_out + at - H, mask=live_k & ~first, other=0.0)
                operand = tl.where(first, h_fresh, h_going).to(w_hh.dtype.element_ty)
                w_r = weight(w_hh, 0, n, k[:, None], H)
                w_z = weight(w_hh, 1, n, k[:, None], H)
                w_n = weight(w_hh, 2, n, k[:, None], H)
                a_r = tl.dot(operand, w_r, a_r, input_precision=PRECISION)
                a_z = tl.dot(operand, w_z, a_z, input_precision=PRECISION)
                h_n = tl.dot(operand, w_n, h_n, input_precision=PRECISION)
            live = live_b & (n < H)
            here = step[:, None] * H + n
            fresh_at = reset_at + n
            fresh = load(reset_h + fresh_at, live & first)
            going = load(h_out + here - H, live & ~first)
            x = gates + step[:, None] * (4 * H) + n
            a_r += load(x, live)
            a_z += load(x + H, live)
            h_n += load(bias_n + n, n < H)
            h_tm1 = tl.where(first, fresh, going)
            r, z, new, h = _advance(a_r, a_z, load(x + 2 * H, live), h_n, h_tm1)
            store(h_out + here, h, live)
            if KEEP:
                _store_four(x, H, r, z, new, h_n, live)
        tl.debug_barrier()  # the next step reads what other threads of this program wrote


@triton.jit
def backward_resident(
    grad_h, act, h_out, reset_h, is_init, w_hh, d_gates, d_reset_h, B, T, H,
    reset_b, reset_t,
    WANT_RESET: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk back from the last step; writes ``d_gates [B, T, 4H]`` in the order n, r, z, ``h_n``.

    The first three are the gradients of the input's gates, the last three those of the state's, so
    that both are one strided view. Where a segment starts, ``d_reset_h`` gets what reaches
    ``reset_h`` through z; the rest follows from the gates' gradients outside.
    """
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.arange(0, BLOCK_H)[None, :]
    k = tl.arange(0, BLOCK_H)[:, None]
    live = (b < B)[:, None] & (n < H)
    w_r = weight(w_hh, 0, k, n, H)
    w_z = weight(w_hh, 1, k, n, H)
    w_n = weight(w_hh, 2, k, n, H)
    dh = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for s in tl.range(0, T, num_stages=STAGES):
        t = T - 1 - s
        step = b.to(tl.int64) * T + t
        reset_at = (b.to(tl.int64) * reset_b + t * reset_t)[:, None]
        first = is_first(is_init, step, t, b < B)[:, None]
        here = step[:, None] * H + n
        fresh_at = reset_at + n
        fresh = load(reset_h + fresh_at, live & first)
        going = load(h_out + here - H, live & ~first)
        h_tm1 = tl.where(first, fresh, going)
        dh += load(grad_h + here, live)
        at = step[:, None] * (4 * H) + n
        d_n, d_r, d_z, d_hn, dh = _retreat(act + at, H, h_tm1, dh, live)
        _store_four(d_gates + at, H, d_n, d_r, d_z, d_hn, live)
        if WANT_RESET:
            store(d_reset_h + here, dh, live & first)
        dh = tl.dot(d_r.to(w_r.dtype), w_r, dh, input_precision=PRECISION)
        dh = tl.dot(d_z.to(w_r.dtype), w_z, dh, input_precision=PRECISION)
        dh = tl.dot(d_hn.to(w_r.dtype), w_n, dh, input_precision=PRECISION)
        dh = tl.where(first, 0.0, dh)


@triton.jit(do_not_specialize=["t_begin", "t_end"])
def backward_tiled(
    grad_h, act, h_out, reset_h, is_init, w_hh, d_gates, d_reset_h, carry, B, T, H,
    reset_b, reset_t, t_begin, t_end, columns,
    WANT_RESET: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk back from ``t_end - 1`` to ``t_begin``; otherwise as the resident form.

    ``carry [B, H]`` brings what reaches ``h`` through z from one step to the one before.
    """
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live_b = (b < B)[:, None]
    begin = tl.program_id(1) * columns
    for s in range(t_begin, t_end):
        t = t_end - 1 - (s - t_begin)
        step = b.to(tl.int64) * T + t
        reset_at = (b.to(tl.int64) * reset_b + t * reset_t)[:, None]
        first = is_first(is_init, step, t, b < B)[:, None]
        last = is_last(is_init, step, t, T, b < B)[:, None]
        for tile in range(begin, tl.minimum(begin + columns, H), BLOCK_N):
            n = tile + tl.arange(0, BLOCK_N)[None, :]
            dh = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
            for inner in tl.range(0, H, BLOCK_K, num_stages=STAGES):
                k = inner + tl.arange(0, BLOCK_K)
                d = d_gates + (step[:, None] + 1) * (4 * H) + k[None, :]
                going = live_b & ~last & (k < H)[None, :]
                d_r = tl.load(d + H, mask=going, other=0.0)
                d_z = tl.load(d + 2 * H, mask=going, other=0.0)
                d_hn = tl.load(d + 3 * H, mask=going, other=0.0)
                w_r = weight(w_hh, 0, k[:, None], n, H)
                w_z = weight(w_hh, 1, k[:, None], n, H)
                w_n = weight(w_hh, 2, k[:, None], n, H)
                dh = tl.dot(d_r, w_r, dh, input_precision=PRECISION)
                dh = tl.dot(d_z, w_z, dh, input_precision=PRECISION)
                dh = tl.dot(d_hn, w_n, dh, input_precision=PRECISION)
            live = live_b & (n < H)
            here = step[:, None] * H + n
            fresh_at = reset_at + n
            fresh = load(reset_h + fresh_at, live & first)
            kept = load(h_out + here - H, live & ~first)
            h_tm1 = tl.where(first, fresh, kept)
            past = carry + b[:, None] * H + n
            dh += load(grad_h + here, live) + load(past, live & ~last)
            at = step[:, None] * (4 * H) + n
            d_n, d_r, d_z, d_hn, dh = _retreat(act + at, H, h_tm1, dh, live)
            _store_four(d_gates + at, H, d_n, d_r, d_z, d_hn, live)
            if WANT_RESET:
                store(d_reset_h + here, dh, live & first)
            store(past, dh, live)
        tl.debug_barrier()  # the next step reads what other threads of this program wrote
