"""Which form of a kernel runs, and how large its tiles are: a pure function of the problem.

The rules come from what the compiler reports for Hopper (registers, spills and shared memory of
every shape that can be chosen, see ``tests/test_triton.py``) and from arithmetic on weights and
bandwidth. No GPU has timed them yet: ``benchmarks/bench_gpu.py`` is there to correct them.
"""

from __future__ import annotations

from dataclasses import dataclass

# Beyond this the offsets into W_hh no longer fit the kernels' 32-bit arithmetic.
MAX_HIDDEN = 16384
# A launch per step costs the host about as much as streaming this much from the L2 cache.
_STREAMED_BYTES = 512 * 1024
_MIN_DOT = 16
# Float32 rows of H that a resident kernel keeps in shared memory per batch row, at most: loads
# ahead, and what changes its layout. The backward kernel of the LSTM needs the most.
_ROW_BUFFERS = 13


@dataclass(frozen=True)
class Device:
    """What the choice needs to know of a GPU; the defaults are an H100's.

    Attributes:
        processors: streaming multiprocessors.
        shared_memory: bytes that one program may use.
    """

    processors: int = 132
    shared_memory: int = 232448


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        resident: weights and state stay on the chip; otherwise the tiled form.
        stepwise: one launch per step, whose programs share out the columns.
        block_b: batch rows per program.
        block_n: columns per tile, all of them (a power of two) if resident.
        block_k: inner dimension per tile.
        num_warps: of 32 threads, per program.
        stages: depth of the software pipeline that loads ahead.
    """

    resident: bool
    stepwise: bool
    block_b: int
    block_n: int
    block_k: int
    num_warps: int
    stages: int


def choose_config(
    batch: int,
    hidden: int,
    gates: int,
    itemsize: int,
    precision: str,
    device: Device | None = None,
) -> Config:
    """Choose a launch.

    Args:
        batch: rows ``B``.
        hidden: columns ``H``.
        gates: ``G``, 4 or 3.
        itemsize: bytes of an operand of the recurrent product, 4 or 2.
        precision: resolved mode; matters with ``itemsize`` 4 only.
        device: an H100 by default.

    Returns:
        The configuration; the same for the forward and the backward kernel.

    Examples:
        >>> choose_config(16, 64, 4, 4, "tf32").resident
        True
        >>> choose_config(16, 512, 4, 4, "tf32").stepwise
        True
    """
    device = device or Device()
    scalar = itemsize == 4 and precision == "ieee"
    split = itemsize == 4 and precision == "tf32x3"
    # Without tensor cores a product takes any number of rows, and fewer leave more programs.
    smallest, largest = (1, 16) if scalar else (16, 16 if split else 32)
    rows = _power_of_two(-(-batch // device.processors))
    block_b = min(max(rows, smallest), largest)
    block_h = max(_power_of_two(hidden), _MIN_DOT)
    # The compiler keeps tf32x3's high and low parts apart.
    weights = gates * block_h * block_h * itemsize * (2 if split else 1)
    for fewer in _halves(block_b, smallest):
        if weights + _ROW_BUFFERS * fewer * block_h * 4 <= device.shared_memory:
            warps = 4 if block_h <= 32 else 8
            return Config(True, False, fewer, block_h, block_h, warps, stages=2)
    if gates * hidden * hidden * itemsize <= _STREAMED_BYTES:
        return _tiled(False, block_b, 64, scalar, device)
    block_b = min(max(_power_of_two(batch), 4 if scalar else 16), 32 if scalar or split else 64)
    if -(-batch // block_b) * -(-hidden // 64) >= device.processors:
        return _tiled(True, block_b, 64, scalar, device)
    return _tiled(True, min(block_b, 16) if split else block_b, 32, scalar, device)


def _tiled(stepwise: bool, block_b: int, block_n: int, scalar: bool, device: Device) -> Config:
    block_k = 32
    stage = (block_b + 4 * block_n) * block_k * 4
    stages = 1 if scalar else min(3, max(1, (device.shared_memory - 16384) // stage))
    warps = 8 if block_n == 64 or block_b == 64 else 4
    return Config(False, stepwise, block_b, block_n, block_k, warps, stages)


def _halves(block: int, smallest: int) -> list[int]:
    return [block >> i for i in range(block.bit_length()) if block >> i >= smallest]


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
