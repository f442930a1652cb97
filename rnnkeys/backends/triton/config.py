"""Which form of a kernel runs, and how large its tiles are: a pure function of the problem.

The rules come from what the compiler reports for Hopper (registers, spills and shared memory of
every shape that can be chosen, see ``scripts/triton_resources.py``) and from arithmetic on
weights and bandwidth. No GPU has timed them yet: ``benchmarks/bench_gpu.py`` is there to correct
them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Beyond this the offsets into W_hh no longer fit the kernels' 32-bit arithmetic.
MAX_HIDDEN = 16384
_MIN_DOT = 16
_WARPS = 8
# Columns up to which a program holds all of them.
_ALONE = 64
# Columns of a program, by the bytes of a column up to which they fit a Hopper GPU.
_COLUMNS = {
    "forward": {32: 512, 16: 2048, 8: 4096},
    "backward": {32: 512, 16: 1024, 8: 2048},
}
# Without tensor cores, where groups of four rows leave more room.
_COLUMNS_OF_SCALARS = {
    "forward": {16: 2048, 8: 4096},
    "backward": {16: 1024, 8: 4096},
}
_SHARED_MEMORY = 232448
# Steps of an episode, for want of a look at the marks: larger groups pay where there are many.
_EXPECTED_LENGTH = 128
# Times that all groups that run at once are run, beyond which a launch per step is as fast.
_MOST_SWEEPS = 4


@dataclass(frozen=True)
class Device:
    """What the choice needs to know of a GPU; the defaults are an H100's.

    Attributes:
        processors: streaming multiprocessors.
        shared_memory: bytes that one program may use.
    """

    processors: int = 132
    shared_memory: int = _SHARED_MEMORY

    @property
    def is_large(self) -> bool:
        """Whether it has a Hopper GPU's memory on the chip."""
        return self.shared_memory >= _SHARED_MEMORY


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        resident: weights stay on the chip; otherwise there is one launch per step.
        block_b: rows per program.
        block_n: columns per program.
        block_k: inner dimension per program, all of it (a power of two) if resident.
        num_warps: of 32 threads, per program.
        split: programs that share the columns of a row, if resident.
        chunks: parts of the inner dimension that different warps multiply, if resident.
        stages: depth of the software pipeline that loads ahead, if not resident.
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
        """How many groups of rows run at once, if resident."""
        # Programs that wait for others must all run at once; two others fit a processor.
        return device.processors // self.split if self.split > 1 else 2 * device.processors


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

    Weights stay on the chip wherever they fit: up to 64 columns in every program, which then waits
    for no other; above, spread over up to all processors, where a step costs a meeting (about a
    microsecond and a half) in place of a launch or of a pass over the weights. What does not fit,
    and batches so large that one launch per step is well filled, run stepwise.

    Args:
        direction: ``"forward"`` or ``"backward"``, which needs more room.
        batch: rows ``B``.
        steps: ``T``.
        hidden: columns ``H``.
        itemsize: bytes of an operand of the recurrent product, 4 or 2.
        precision: resolved mode; matters with ``itemsize`` 4 only.
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
    # What the compiler keeps of a column of one gate: tf32x3's high and low parts are kept apart.
    kept = block_h * itemsize * (2 if mode == "tf32x3" else 1)
    column = kept if device.is_large else 2 * kept
    alone = block_h <= (_ALONE if itemsize == 2 or device.is_large else _ALONE // 2)
    if alone:
        block_n, sizes, chunks = block_h, (1, 4) if mode == "ieee" else (16,), 1
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
    """Sizes of groups of rows that fit, if programs share columns."""
    if mode == "ieee":
        return (4, 16) if column <= 2048 else (4,)
    small = block_h <= 512 if direction == "forward" else column <= 1024
    return (16, 32) if small and mode != "tf32x3" else (16,)


def _shared_bytes(direction: str, block_b: int, block_n: int, column: int) -> int:
    """Return at least what a program that shares columns takes of shared memory, on Hopper.

    Its weights, the operand that it multiplies by them, and what the product starts from.
    """
    weights = 4 * block_n * column
    if direction == "backward":
        return weights + 4 * block_b * column
    return weights + block_b * column + 16 * block_b * block_n


def _stepwise(batch: int, hidden: int, mode: str, device: Device) -> Config:
    scalar, split = mode == "ieee", mode == "tf32x3"
    # Tensor cores before Hopper's take operands from registers, which 64 rows of float32 exceed.
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
