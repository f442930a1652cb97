"""Device functions that the kernels of all cells share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Hyperbolic tangent, to 1e-7 absolute: the language has none, the interpreter no libdevice."""
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def load(ptr, mask):
    """Load as float32, zero where masked."""
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, value, mask):
    """Store in the pointer's dtype."""
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight(w, gate: tl.constexpr, row, column, H):
    """Load ``w[gate * H + row, column]`` of ``w [G*H, H]``, zero outside of the gate's block."""
    at = w + gate * H * H + row * H + column
    return tl.load(at, mask=(row < H) & (column < H), other=0.0)


@triton.jit
def is_first(is_init, step, t, mask):
    """Whether a segment starts at time ``t``; ``step`` is the flat position ``b * T + t``."""
    return (tl.load(is_init + step, mask=mask, other=0) != 0) | (t == 0)


@triton.jit
def is_last(is_init, step, t, T, mask):
    """Whether a segment ends at time ``t``: nothing flows back into it from ``t + 1``."""
    return (tl.load(is_init + step + 1, mask=mask & (t + 1 < T), other=1) != 0) | (t + 1 == T)
