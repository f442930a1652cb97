"""Choice of a kernel's form and tile sizes: a pure function of the problem.

The rules follow from the compiler's reports for Hopper (registers, spills and shared memory of
every possible shape, see ``scripts/triton_resources.py``) and from arithmetic on weights and
bandwidth. They have not been timed on a GPU yet; ``benchmarks/bench_gpu.py`` can do that.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

# Above this size offsets into W_hh overflow the kernels' 32-bit arithmetic.
MAX_HIDDEN = 16384
_MIN_DOT = 16
_WARPS = 8
# Largest number of columns of which one program holds all.
_ALONE = 64
# Columns per program -> largest number of bytes per column that fits a Hopper GPU.
_COLUMNS = {
    "forward": {32: 512, 16: 2048, 8: 4096},
    "backward": {32: 512, 16: 1024, 8: 2048},
}
# The same without tensor cores: groups of four rows leave more room.
_COLUMNS_OF_SCALARS = {
    "forward": {16: 2048, 8: 4096},
    "backward": {16: 1024, 8: 4096},
}
_SHARED_MEMORY = 232448
# Options of every launch. Triton 3.9 warns where fusion is not chosen, because later versions will
# not fuse by themselves.
FUSED_MULTIPLY_ADD: dict[str, Any] = {"enable_fp_fusion": True}
# Assumed steps per segment (reading `is_init` would wait for the GPU): larger groups of rows are
# faster if there are many segments.
_EXPECTED_LENGTH = 128
# Number of rounds of concurrent groups above which one launch per step is as fast.
_MOST_SWEEPS = 4


@dataclass(frozen=True)
class Device:
    """Properties of a GPU that the choice depends on; the defaults are an H100's.

    Attributes:
        processors: streaming multiprocessors.
        shared_memory: maximum bytes per program.
    """

    processors: int = 132
    shared_memory: int = _SHARED_MEMORY

    @property
    def is_large(self) -> bool:
        """Whether the shared memory is at least that of a Hopper GPU."""
        return self.shared_memory >= _SHARED_MEMORY


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        resident: whether weights stay on the chip; otherwise each step is a launch.
        block_b: rows per program.
        block_n: columns per program.
        block_k: inner dimension per program; if resident all of it, rounded to a power of two.
        num_warps: warps of 32 threads per program.
        split: programs that share the columns of a row, if resident.
        chunks: parts of the inner dimension that different warps multiply, if resident.
        stages: depth of the software pipeline of loads, if not resident.
    """

    resident: bool
    block_b: int
    block_n: int
    block_k: int
    num_warps: int
    split: int = 1
    chunks: int = 1
    stages: int = 1

    def lanes(self, device: Device) -> int:
        """Return the number of groups of rows that run at once, if resident."""
        # Programs that wait for each other must all run at once; otherwise two fit a processor.
        return device.processors // self.split if self.split > 1 else 2 * device.processors


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current, because Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def choose_config(
    direction: str,
    batch: int,
    steps: int,
    hidden: int,
    itemsize: int,
    precision: str,
    device: Device | None = None,
) -> Config:
    """Choose a launch.

    Weights stay on the chip if they fit. Up to 64 columns, every program holds all of them and
    does not wait for other programs. Above, the columns are divided among up to all processors,
    and each step costs a synchronization (about 1.5 microseconds) instead of a launch or a pass
    over the weights. Larger weights, and batches large enough to fill the GPU in one step, use one
    launch per step.

    Args:
        direction: ``"forward"`` or ``"backward"``, which needs more memory.
        batch: rows ``B``.
        steps: ``T``.
        hidden: columns ``H``.
        itemsize: bytes of an operand of the recurrent product, 4 or 2.
        precision: resolved mode; used with ``itemsize`` 4 only.
        device: an H100 by default.

    Returns:
        The configuration.

    Examples:
        >>> choose_config("forward", 16, 64, 64, 4, "tf32").split
        1
        >>> choose_config("forward", 16, 64, 512, 4, "tf32").split
        32
        >>> choose_config("forward", 16, 64, 4096, 4, "tf32").resident
        False
    """
    device = device or Device()
    mode = precision if itemsize == 4 else "half"
    found = _resident(direction, batch, steps, hidden, itemsize, mode, device)
    return found or _stepwise(batch, hidden, mode, device)


def _resident(
    direction: str, batch: int, steps: int, hidden: int, itemsize: int, mode: str, device: Device
) -> Config | None:
    block_h = max(_power_of_two(hidden), _MIN_DOT)
    # Bytes that the compiler keeps per column of a gate: tf32x3 has a high and a low part.
    kept = block_h * itemsize * (2 if mode == "tf32x3" else 1)
    column = kept if device.is_large else 2 * kept
    alone = block_h <= (_ALONE if itemsize == 2 or device.is_large else _ALONE // 2)
    if alone:
        block_n = block_h
        sizes = (1, 4) if mode == "ieee" else (16,)
        chunks = 1
    else:
        limits = _COLUMNS_OF_SCALARS if mode == "ieee" else _COLUMNS
        block_n = next((n for n, limit in limits[direction].items() if column <= limit), None)
        if block_n is None or (mode == "tf32x3" and column > 2048):
            return None
        sizes = _rows(direction, block_h, column, mode)
        most = device.shared_memory
        sizes = tuple(b for b in sizes if _shared_bytes(direction, b, block_n, kept) <= most)
        if not sizes:
            return None
        chunks = 1 if direction == "forward" or block_n == 32 else _WARPS
    split = -(-hidden // block_n)
    if split > device.processors:
        return None
    config = Config(True, sizes[0], block_n, block_h, _WARPS, split, chunks)
    lanes = config.lanes(device)
    expected = batch * (1 + steps // _EXPECTED_LENGTH)
    block_b = next((b for b in sizes if b * lanes >= expected), sizes[-1])
    if split > 1 and batch > _MOST_SWEEPS * lanes * sizes[-1]:
        return None
    return replace(config, block_b=block_b)


def _rows(direction: str, block_h: int, column: int, mode: str) -> tuple[int, ...]:
    """Return the sizes of groups of rows that fit, if programs share columns."""
    if mode == "ieee":
        return (4, 16) if column <= 2048 else (4,)
    small = block_h <= 512 if direction == "forward" else column <= 1024
    return (16, 32) if small and mode != "tf32x3" else (16,)


def _shared_bytes(direction: str, block_b: int, block_n: int, column: int) -> int:
    """Return a lower bound of a program's shared memory on Hopper, if programs share columns.

    It holds the weights, the other operand of the product, and the accumulator's initial value.
    """
    weights = 4 * block_n * column
    if direction == "backward":
        return weights + 4 * block_b * column
    return weights + block_b * column + 16 * block_b * block_n


def _stepwise(batch: int, hidden: int, mode: str, device: Device) -> Config:
    scalar, split = mode == "ieee", mode == "tf32x3"
    # Before Hopper, tensor cores read operands from registers, which 64 rows of float32 exceed.
    few = scalar or split or (mode == "tf32" and not device.is_large)
    block_b = min(max(_power_of_two(batch), 4 if scalar else 16), 32 if few else 64)
    if -(-batch // block_b) * -(-hidden // 64) >= device.processors:
        return _tiled(block_b, 64, scalar, device)
    return _tiled(min(block_b, 16) if split else block_b, 32, scalar, device)


def _tiled(block_b: int, block_n: int, scalar: bool, device: Device) -> Config:
    block_k = 32
    stage = (block_b + 4 * block_n) * block_k * 4
    stages = 1 if scalar else min(3, max(1, (device.shared_memory - 16384) // stage))
    warps = 8 if block_n == 64 or block_b == 64 else 4
    return Config(False, block_b, block_n, block_k, warps, stages=stages)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
