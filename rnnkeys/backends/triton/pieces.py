"""Device functions that the kernels of all cells share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Hyperbolic tangent, to 4e-7 relative.

    Triton's language has no tanh, and its interpreter no libdevice. Near zero, where a difference
    of two numbers near 1 would lose all digits, this uses a Taylor polynomial.
    """
    x2 = x * x
    tail = -1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))
    return tl.where(tl.abs(x) < 0.3, x + x * x2 * tail, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def spread(value, like):
    """Spread a number over the shape of ``like``, so that a comparison with it is a mask.

    The interpreter of Triton 3.9 gives two numbers' comparison the type of the numbers.
    """
    return tl.zeros_like(like) + value


@triton.jit
def load(ptr, mask):
    """Load as float32, zero where masked."""
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, value, mask):
    """Store in the pointer's dtype."""
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_four(ptr, H, mask):
    """Load the four quarters of a row of ``4H``."""
    return (
        load(ptr, mask),
        load(ptr + H, mask),
        load(ptr + 2 * H, mask),
        load(ptr + 3 * H, mask),
    )


@triton.jit
def store_four(ptr, H, first, second, third, fourth, mask):
    """Store the four quarters of a row of ``4H``."""
    store(ptr, first, mask)
    store(ptr + H, second, mask)
    store(ptr + 2 * H, third, mask)
    store(ptr + 3 * H, fourth, mask)


@triton.jit
def four(tile, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """Split ``[BLOCK_B, 4 * BLOCK_N]`` into its four quarters."""
    apart = tile.reshape(BLOCK_B, 2, 2, BLOCK_N).permute(0, 3, 1, 2)
    even, odd = tl.split(apart)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def inner(CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Indices ``[CHUNKS, BLOCK_K // CHUNKS]`` of a product's inner dimension."""
    width: tl.constexpr = BLOCK_K // CHUNKS
    return tl.arange(0, CHUNKS)[:, None] * width + tl.arange(0, width)[None, :]


@triton.jit
def in_chunks(tile, CHUNKS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):
    """Cut ``[BLOCK_B, BLOCK_K]`` into ``[CHUNKS, BLOCK_B, BLOCK_K // CHUNKS]``."""
    return tile.reshape(BLOCK_B, CHUNKS, BLOCK_K // CHUNKS).permute(1, 0, 2)


@triton.jit
def product(a, w, start, PRECISION: tl.constexpr):
    """Return ``start + a w`` of ``a [CHUNKS, M, K]`` and ``w [CHUNKS, K, N]``.

    Each warp multiplies a chunk of the inner dimension, which shortens chains of dependent
    instructions and avoids repeated work.
    """
    if a.shape[0] == 1:
        a_2 = a.reshape(a.shape[1], a.shape[2])
        w_2 = w.reshape(w.shape[1], w.shape[2])
        return tl.dot(a_2, w_2, start, input_precision=PRECISION)
    return start + tl.sum(tl.dot(a, w, input_precision=PRECISION), 0)


@triton.jit
def side_by_side(first, second, third, fourth):
    """Lay four tiles ``[M, K]`` out as ``[M, 4 * K]``."""
    apart = tl.join(tl.join(first, third), tl.join(second, fourth))
    return apart.permute(0, 2, 3, 1).reshape(first.shape[0], 4 * first.shape[1])


@triton.jit
def weights_of_columns(
    w, GATES: tl.constexpr, first_n, H, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load the weights of ``BLOCK_N`` output columns of all gates, from ``w [G*H, H]``.

    Returns:
        ``[CHUNKS, BLOCK_K // CHUNKS, 4 * BLOCK_N]``, gate after gate, zero beyond ``H`` and beyond
        the last gate.
    """
    wide = tl.arange(0, 4 * BLOCK_N)[None, None, :]
    gate, n = wide // BLOCK_N, first_n + wide % BLOCK_N
    k = inner(CHUNKS, BLOCK_K)[:, :, None]
    live = (gate < GATES) & (n < H) & (k < H)
    return tl.load(w + (gate * H + n) * H + k, mask=live, other=0.0)


@triton.jit
def weights_of_rows(
    w, SKIP: tl.constexpr, first_n, H, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load the weights that map gradients of four quarters back to ``BLOCK_N`` columns.

    Returns:
        ``[CHUNKS, 4 * BLOCK_K // CHUNKS, BLOCK_N]``, quarter after quarter, zero beyond ``H``. The
        first ``SKIP`` quarters are zero; the others are the gates, in their order.
    """
    q = inner(CHUNKS, 4 * BLOCK_K)[:, :, None]
    gate, k = q // BLOCK_K - SKIP, q % BLOCK_K
    n = first_n + tl.arange(0, BLOCK_N)[None, None, :]
    live = (gate >= 0) & (n < H) & (k < H)
    return tl.load(w + (gate * H + k) * H + n, mask=live, other=0.0)


@triton.jit
def weight(w, gate: tl.constexpr, row, column, H):
    """Load ``w[gate * H + row, column]`` of ``w [G*H, H]``, zero outside of the gate's block."""
    at = w + gate * H * H + row * H + column
    return tl.load(at, mask=(row < H) & (column < H), other=0.0)


@triton.jit
def group_of(order, N, segments, group, T, reset_b, reset_t, BLOCK_B: tl.constexpr):
    """Read the segments of a group of ``BLOCK_B`` rows.

    ``order [2 N + 1]`` holds the segments' first steps, then their lengths, then their number.

    Returns:
        The flat position of each segment's first step, its length (0 for an unused row),
        the offset of its stored state, and the length of the longest.
    """
    row = group * BLOCK_B + tl.arange(0, BLOCK_B)
    at = tl.load(order + row, mask=row < segments, other=0).to(tl.int64)
    length = tl.load(order + N + row, mask=row < segments, other=0)
    reset_at = (at // T) * reset_b + (at % T) * reset_t
    return at, length, reset_at, tl.load(order + N + group * BLOCK_B)


@triton.jit
def synchronize(ticket, target):
    """Wait until ``ticket``, shared by several programs, has counted ``target`` arrivals.

    Afterwards each program sees what the others wrote before: the barrier synchronizes a program's
    threads, and release and acquire make their writes visible across the GPU.
    """
    tl.debug_barrier()
    tl.atomic_add(ticket, 1, sem="release", scope="gpu")
    while tl.atomic_add(ticket, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def rows_of_program(BLOCK_B: tl.constexpr):
    """Return the rows of a program, as int64: offsets into large batches exceed 32 bits."""
    return (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)


@triton.jit
def is_first(is_init, step, t, mask):
    """Return whether a segment starts at time ``t``, flat position ``step = b * T + t``."""
    return (tl.load(is_init + step, mask=mask, other=0) != 0) | (spread(t, step) == 0)


@triton.jit
def is_last(is_init, step, t, T, mask):
    """Return whether a segment ends at time ``t``: it gets no gradient from ``t + 1``."""
    after = spread(t + 1, step)
    return (tl.load(is_init + step + 1, mask=mask & (after < T), other=1) != 0) | (after == T)
