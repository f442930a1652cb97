"""Triton kernels of linear recurrences, ``h_t = a_t * h_{t-1} + b_t``, as a scan in chunks.

Tensors are time-major, ``[T, M]`` with the ``M = N * F`` columns of all rows side by side; paired
ones hold ``2 M`` numbers, pairs of real and imaginary part. A program runs one chunk of steps of
some columns. Where there are several chunks, a first launch runs each from zeros and keeps how its
end depends on its beginning (``ends + products * entering``), a second carries states from chunk to
chunk, and a third runs each from the state that enters it. Resets are selects, in every launch, so
that nothing of the segment before passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import spread


@triton.jit
def _columns(BLOCK: tl.constexpr):
    """Return the columns of a program."""
    return tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _load(ptr, at, mask, PAIRED: tl.constexpr):
    """Load numbers ``at`` positions; the imaginary part stands for nothing if not paired."""
    if PAIRED:
        re = tl.load(ptr + 2 * at, mask=mask, other=0.0)
        im = tl.load(ptr + 2 * at + 1, mask=mask, other=0.0)
    else:
        re = tl.load(ptr + at, mask=mask, other=0.0)
        im = re
    return re, im


@triton.jit
def _store(ptr, at, re, im, mask, PAIRED: tl.constexpr):
    if PAIRED:
        tl.store(ptr + 2 * at, re, mask=mask)
        tl.store(ptr + 2 * at + 1, im, mask=mask)
    else:
        tl.store(ptr + at, re, mask=mask)


@triton.jit
def _multiply(a_re, a_im, b_re, b_im, PAIRED: tl.constexpr):
    if PAIRED:
        re = a_re * b_re - a_im * b_im
        im = a_re * b_im + a_im * b_re
    else:
        re = a_re * b_re
        im = re
    return re, im


@triton.jit
def _load_start(start, at, stride_f, f, mask, PAIRED: tl.constexpr):
    """Load stored states of a step's rows ``at``, of any strides."""
    if PAIRED:
        re = tl.load(start + at + stride_f * 2 * f, mask=mask, other=0.0)
        im = tl.load(start + at + stride_f * (2 * f + 1), mask=mask, other=0.0)
    else:
        re = tl.load(start + at + stride_f * f, mask=mask, other=0.0)
        im = re
    return re, im


@triton.jit
def _is_start(reset, t, n, N, live):
    return (tl.load(reset + N.to(tl.int64) * t + n, mask=live, other=0) != 0) | (spread(t, n) == 0)


_SIZES = ["T", "N", "F", "length", "stride_t", "stride_n", "stride_f"]


@triton.jit(do_not_specialize=_SIZES)
def forward(
    a, b, start, reset, h, ends, products, cuts, entering,
    T, N, F, length, stride_t, stride_n, stride_f,
    CONSTANT: tl.constexpr, PAIRED: tl.constexpr, LOCAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Run a chunk from zeros, and write its end (``LOCAL``), or from ``entering``, and write ``h``.

    ``ends``, ``products`` and ``entering`` are ``[K, M]`` for ``K`` chunks, and ``cuts [K, M]``
    indicates whether a segment starts inside.
    """
    M = N.to(tl.int64) * F
    col = _columns(BLOCK)
    chunk = tl.program_id(1)
    live = col < M
    n, f = col // F, col % F
    first = chunk * length
    of_chunk = M * chunk + col
    # Zeros, until `carry` has run.
    state_re, state_im = _load(entering, of_chunk, live, PAIRED)
    zero = tl.zeros([BLOCK], h.dtype.element_ty)
    p_re = zero + 1
    p_im = zero
    cut = zero != 0
    a_re, a_im = _load(a, f, live, PAIRED)
    for t in range(first, tl.minimum(first + length, T)):
        at = M * t + col
        is_start = _is_start(reset, t, n, N, live)
        start_at = stride_t.to(tl.int64) * t + stride_n.to(tl.int64) * n
        s_re, s_im = _load_start(start, start_at, stride_f, f, live & is_start, PAIRED)
        if not CONSTANT:
            a_re, a_im = _load(a, at, live, PAIRED)
        b_re, b_im = _load(b, at, live, PAIRED)
        state_re = tl.where(is_start, s_re, state_re)
        state_im = tl.where(is_start, s_im, state_im)
        state_re, state_im = _multiply(a_re, a_im, state_re, state_im, PAIRED)
        state_re += b_re
        state_im += b_im
        if LOCAL:
            p_re, p_im = _multiply(a_re, a_im, p_re, p_im, PAIRED)
            cut = cut | is_start
        else:
            _store(h, at, state_re, state_im, live, PAIRED)
    if LOCAL:
        _store(ends, of_chunk, state_re, state_im, live, PAIRED)
        _store(products, of_chunk, p_re, p_im, live, PAIRED)
        tl.store(cuts + of_chunk, cut, mask=live)


@triton.jit(do_not_specialize=_SIZES)
def backward(
    grad, a, h, start, reset, d_a, d_b, d_start, ends, products, cuts, entering,
    T, N, F, length, stride_t, stride_n, stride_f,
    CONSTANT: tl.constexpr, PAIRED: tl.constexpr, LOCAL: tl.constexpr, WANT_START: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Run a chunk backwards; a step passes ``conj(a_t) * d_t`` on, and nothing at a start.

    ``d_a`` is ``[T, M]``, or with ``CONSTANT`` the sums over the steps of each chunk, ``[K, M]``.
    """
    M = N.to(tl.int64) * F
    col = _columns(BLOCK)
    chunk = tl.program_id(1)
    live = col < M
    n, f = col // F, col % F
    first = chunk * length
    until = tl.minimum(first + length, T)
    of_chunk = M * chunk + col
    passed_re, passed_im = _load(entering, of_chunk, live, PAIRED)
    zero = tl.zeros([BLOCK], h.dtype.element_ty)
    sum_re = zero
    sum_im = zero
    p_re = zero + 1
    p_im = zero
    cut = zero != 0
    a_re, a_im = _load(a, f, live, PAIRED)
    for i in range(until - first):
        t = until - 1 - i
        at = M * t + col
        is_start = _is_start(reset, t, n, N, live)
        if not CONSTANT:
            a_re, a_im = _load(a, at, live, PAIRED)
        d_re, d_im = _load(grad, at, live, PAIRED)
        d_re += passed_re
        d_im += passed_im
        to_re, to_im = _multiply(a_re, -a_im, d_re, d_im, PAIRED)
        passed_re = tl.where(is_start, 0.0, to_re)
        passed_im = tl.where(is_start, 0.0, to_im)
        if LOCAL:
            p_re, p_im = _multiply(a_re, -a_im, p_re, p_im, PAIRED)
            cut = cut | is_start
        else:
            start_at = stride_t.to(tl.int64) * t + stride_n.to(tl.int64) * n
            s_re, s_im = _load_start(start, start_at, stride_f, f, live & is_start, PAIRED)
            before_re, before_im = _load(h, at - M, live & (spread(t, n) > 0), PAIRED)
            before_re = tl.where(is_start, s_re, before_re)
            before_im = tl.where(is_start, s_im, before_im)
            by_re, by_im = _multiply(d_re, d_im, before_re, -before_im, PAIRED)
            if CONSTANT:
                sum_re += by_re
                sum_im += by_im
            else:
                _store(d_a, at, by_re, by_im, live, PAIRED)
            _store(d_b, at, d_re, d_im, live, PAIRED)
            if WANT_START:
                _store(d_start, at, to_re, to_im, live & is_start, PAIRED)
    if LOCAL:
        _store(ends, of_chunk, passed_re, passed_im, live, PAIRED)
        _store(products, of_chunk, p_re, p_im, live, PAIRED)
        tl.store(cuts + of_chunk, cut, mask=live)
    elif CONSTANT:
        _store(d_a, of_chunk, sum_re, sum_im, live, PAIRED)


@triton.jit(do_not_specialize=["K", "M"])
def carry(
    ends, products, cuts, entering, K, M,
    PAIRED: tl.constexpr, BACKWARDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what enters each chunk; where a segment starts inside, nothing passes through it."""
    col = _columns(BLOCK)
    live = col < M
    re = tl.zeros([BLOCK], ends.dtype.element_ty)
    im = re
    for i in range(K):
        chunk = K - 1 - i if BACKWARDS else i
        at = M.to(tl.int64) * chunk + col
        _store(entering, at, re, im, live, PAIRED)
        end_re, end_im = _load(ends, at, live, PAIRED)
        p_re, p_im = _load(products, at, live, PAIRED)
        cut = tl.load(cuts + at, mask=live, other=0) != 0
        re, im = _multiply(p_re, p_im, re, im, PAIRED)
        re = end_re + tl.where(cut, 0.0, re)
        im = end_im + tl.where(cut, 0.0, im)
