"""Triton kernels of the LSTM's recurrence; the projections around it are made in :mod:`.ops`.

Every tensor is contiguous and batch-major. ``gates [B, T, 4H]`` holds the projected inputs with
both biases, in the order i, f, g, o. A program owns ``BLOCK_B`` rows of the batch and walks their
time alone, so no program waits for another. There are two forms; :mod:`.config` chooses:

- *resident*: a program holds all columns of its rows; the recurrent weights and the state stay on
  the chip for the whole sequence.
- *tiled*: columns and the inner dimension of the product are cut into tiles, weights stream through
  the caches, and the state passes through the output tensors. One launch runs a range of steps; if
  several programs share out the columns (the grid's second axis), a launch runs one step, and the
  end of the launch is their barrier.

The equations are those of :mod:`rnnkeys.cells`. A state is replaced by select, with loads that are
masked to the rows they are for: what is stale is not even read. Arithmetic is float32; the operands
of products have the dtype of the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import is_first, is_last, load, store, tanh, weight


@triton.jit
def _advance(a_i, a_f, a_g, a_o, c_tm1):
    """Return the activated gates, ``h`` and ``c`` from the gates' arguments."""
    i = tl.sigmoid(a_i)
    f = tl.sigmoid(a_f)
    g = tanh(a_g)
    o = tl.sigmoid(a_o)
    c = f * c_tm1 + i * g
    return i, f, g, o, o * tanh(c), c


@triton.jit
def _retreat(act, H, c_tm1, c, dh, dc, mask):
    """Return gradients of the gates' arguments and of ``c_tm1`` from those of ``h`` and ``c``."""
    i = load(act, mask)
    f = load(act + H, mask)
    g = load(act + 2 * H, mask)
    o = load(act + 3 * H, mask)
    tanh_c = tanh(c)
    dc += dh * o * (1 - tanh_c * tanh_c)
    d_i = dc * g * i * (1 - i)
    d_f = dc * c_tm1 * f * (1 - f)
    d_g = dc * i * (1 - g * g)
    d_o = dh * tanh_c * o * (1 - o)
    return d_i, d_f, d_g, d_o, dc * f


@triton.jit
def _store_gates(ptr, H, i, f, g, o, mask):
    store(ptr, i, mask)
    store(ptr + H, f, mask)
    store(ptr + 2 * H, g, mask)
    store(ptr + 3 * H, o, mask)


@triton.jit
def forward_resident(
    gates, h_out, c_out, reset_h, reset_c, is_init, w_hh, B, T, H, reset_b, reset_t,
    KEEP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run all steps; with ``KEEP`` the activated gates replace ``gates``."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.arange(0, BLOCK_H)[None, :]
    k = tl.arange(0, BLOCK_H)[:, None]
    live = (b < B)[:, None] & (n < H)
    w_i = weight(w_hh, 0, n, k, H)
    w_f = weight(w_hh, 1, n, k, H)
    w_g = weight(w_hh, 2, n, k, H)
    w_o = weight(w_hh, 3, n, k, H)
    h = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    c = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for t in tl.range(0, T, num_stages=STAGES):
        step = b.to(tl.int64) * T + t
        reset_at = (b.to(tl.int64) * reset_b + t * reset_t)[:, None]
        first = is_first(is_init, step, t, b < B)[:, None]
        here = step[:, None] * H + n
        fresh_at = reset_at + n
        h = tl.where(first, load(reset_h + fresh_at, live & first), h)
        c = tl.where(first, load(reset_c + fresh_at, live & first), c)
        x = gates + step[:, None] * (4 * H) + n
        operand = h.to(w_i.dtype)
        a_i = load(x, live) + tl.dot(operand, w_i, input_precision=PRECISION)
        a_f = load(x + H, live) + tl.dot(operand, w_f, input_precision=PRECISION)
        a_g = load(x + 2 * H, live) + tl.dot(operand, w_g, input_precision=PRECISION)
        a_o = load(x + 3 * H, live) + tl.dot(operand, w_o, input_precision=PRECISION)
        i, f, g, o, h, c = _advance(a_i, a_f, a_g, a_o, c)
        store(h_out + here, h, live)
        store(c_out + here, c, live)
        if KEEP:
            _store_gates(x, H, i, f, g, o, live)


@triton.jit(do_not_specialize=["t_begin", "t_end"])
def forward_tiled(
    gates, h_out, c_out, reset_h, reset_c, is_init, w_hh, B, T, H,
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
            a_i = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
            a_f = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
            a_g = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
            a_o = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
            for inner in tl.range(0, H, BLOCK_K, num_stages=STAGES):
                k = inner + tl.arange(0, BLOCK_K)
                at = step[:, None] * H + k[None, :]
                live_k = live_b & (k < H)[None, :]
                h_fresh = tl.load(reset_h + reset_at + k[None, :], mask=live_k & first, other=0.0)
                h_going = tl.load(h_out + at - H, mask=live_k & ~first, other=0.0)
                operand = tl.where(first, h_fresh, h_going).to(w_hh.dtype.element_ty)
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
            fresh_at = reset_at + n
            c_fresh = load(reset_c + fresh_at, live & first)
            c_going = load(c_out + here - H, live & ~first)
            x = gates + step[:, None] * (4 * H) + n
            a_i += load(x, live)
            a_f += load(x + H, live)
            a_g += load(x + 2 * H, live)
            a_o += load(x + 3 * H, live)
            i, f, g, o, h, c = _advance(a_i, a_f, a_g, a_o, tl.where(first, c_fresh, c_going))
            store(h_out + here, h, live)
            store(c_out + here, c, live)
            if KEEP:
                _store_gates(x, H, i, f, g, o, live)
        tl.debug_barrier()  # the next step reads what other threads of this program wrote


@triton.jit
def backward_resident(
    grad_h, grad_c, act, c_out, reset_c, is_init, w_hh, d_gates, d_reset_c, B, T, H,
    reset_b, reset_t,
    HAS_DC: tl.constexpr, WANT_RESET: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk back from the last step; writes the gradients of the gates' arguments.

    The gradient of ``reset_c`` is written where a segment starts; that of ``reset_h`` follows from
    the gates' outside.
    """
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.arange(0, BLOCK_H)[None, :]
    k = tl.arange(0, BLOCK_H)[:, None]
    live = (b < B)[:, None] & (n < H)
    w_i = weight(w_hh, 0, k, n, H)
    w_f = weight(w_hh, 1, k, n, H)
    w_g = weight(w_hh, 2, k, n, H)
    w_o = weight(w_hh, 3, k, n, H)
    dh = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    dc = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for s in tl.range(0, T, num_stages=STAGES):
        t = T - 1 - s
        step = b.to(tl.int64) * T + t
        reset_at = (b.to(tl.int64) * reset_b + t * reset_t)[:, None]
        first = is_first(is_init, step, t, b < B)[:, None]
        here = step[:, None] * H + n
        fresh_at = reset_at + n
        c_fresh = load(reset_c + fresh_at, live & first)
        c_going = load(c_out + here - H, live & ~first)
        c_tm1 = tl.where(first, c_fresh, c_going)
        dh += load(grad_h + here, live)
        if HAS_DC:
            dc += load(grad_c + here, live)
        at = step[:, None] * (4 * H) + n
        c = load(c_out + here, live)
        d_i, d_f, d_g, d_o, dc = _retreat(act + at, H, c_tm1, c, dh, dc, live)
        _store_gates(d_gates + at, H, d_i, d_f, d_g, d_o, live)
        if WANT_RESET:
            store(d_reset_c + here, dc, live & first)
        dh = tl.dot(d_i.to(w_i.dtype), w_i, input_precision=PRECISION)
        dh = tl.dot(d_f.to(w_i.dtype), w_f, dh, input_precision=PRECISION)
        dh = tl.dot(d_g.to(w_i.dtype), w_g, dh, input_precision=PRECISION)
        dh = tl.dot(d_o.to(w_i.dtype), w_o, dh, input_precision=PRECISION)
        dh = tl.where(first, 0.0, dh)
        dc = tl.where(first, 0.0, dc)


@triton.jit(do_not_specialize=["t_begin", "t_end"])
def backward_tiled(
    grad_h, grad_c, act, c_out, reset_c, is_init, w_hh, d_gates, d_reset_c, carry, B, T, H,
    reset_b, reset_t, t_begin, t_end, columns,
    HAS_DC: tl.constexpr, WANT_RESET: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk back from ``t_end - 1`` to ``t_begin``; otherwise as the resident form.

    ``carry [B, H]`` brings the gradient of ``c`` from one step to the one before.
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
                d_i = tl.load(d, mask=going, other=0.0)
                d_f = tl.load(d + H, mask=going, other=0.0)
                d_g = tl.load(d + 2 * H, mask=going, other=0.0)
                d_o = tl.load(d + 3 * H, mask=going, other=0.0)
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
            fresh_at = reset_at + n
            c_fresh = load(reset_c + fresh_at, live & first)
            c_going = load(c_out + here - H, live & ~first)
            c_tm1 = tl.where(first, c_fresh, c_going)
            dh += load(grad_h + here, live)
            past = carry + b[:, None] * H + n
            dc = load(past, live & ~last)
            if HAS_DC:
                dc += load(grad_c + here, live)
            at = step[:, None] * (4 * H) + n
            c = load(c_out + here, live)
            d_i, d_f, d_g, d_o, dc = _retreat(act + at, H, c_tm1, c, dh, dc, live)
            _store_gates(d_gates + at, H, d_i, d_f, d_g, d_o, live)
            if WANT_RESET:
                store(d_reset_c + here, dc, live & first)
            store(past, dc, live)
        tl.debug_barrier()  # the next step reads what other threads of this program wrote
