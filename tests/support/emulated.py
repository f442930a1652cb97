"""Products of Triton's interpreter, rounded as tensor cores round their operands.

The interpreter multiplies whatever it is given in float32 and takes no notice of
``input_precision``. Here the operands of ``"tf32"`` lose the 13 bits that TF32 has not: tensor
cores take no notice of them, and Triton rounds nothing first (``tests/backends/test_triton.py``
checks it). For ``"tf32x3"`` it rounds high and low parts, and three products of them are added up.
bfloat16, which NumPy lacks, is widened first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Round float32 to 10 bits of mantissa, ties to even.

    Examples:
        >>> to_tf32(np.float32([1 + 2**-10, 1 + 2**-12])) - 1
        array([0.00097656, 0.        ], dtype=float32)
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFFE000)).view(np.float32)


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """Cut float32 to 10 bits of mantissa, towards zero.

    Examples:
        >>> cut_to_tf32(np.float32([1 + 2**-10, 1 + 2**-11])) - 1
        array([0.00097656, 0.        ], dtype=float32)
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def multiply(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    """Multiply float32 matrices in a mode.

    Args:
        a: ``[..., M, K]``.
        b: ``[..., K, N]``.
        mode: ``"ieee"``, ``"tf32"`` or ``"tf32x3"``.
    """
    if mode == "ieee":
        return a @ b
    if mode == "tf32":
        return cut_to_tf32(a) @ cut_to_tf32(b)
    high_a, high_b = to_tf32(a), to_tf32(b)
    low_a, low_b = to_tf32(a - high_a), to_tf32(b - high_b)
    return high_a @ low_b + low_a @ high_b + high_a @ high_b


@contextmanager
def tensor_cores() -> Iterator[set[str]]:
    """Let interpreted products round as a GPU's do; yields the modes that were asked for."""
    from triton.runtime import interpreter

    builder: Any = interpreter.interpreter_builder
    modes: set[str] = set()
    before = builder.create_dot

    def create_dot(a: Any, b: Any, start: Any, input_precision: Any, _: Any) -> Any:
        mode = str(input_precision).rpartition(".")[2].lower()
        modes.add(mode)
        half = a.dtype.primitive_bitwidth == 16
        product = multiply(_float32(a), _float32(b), "ieee" if half else mode)
        return interpreter.TensorHandle(product + start.data, start.dtype.scalar)

    builder.create_dot = create_dot
    try:
        yield modes
    finally:
        builder.create_dot = before


def _float32(handle: Any) -> np.ndarray:
    if handle.dtype.is_bf16():
        return (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return handle.data.astype(np.float32)
