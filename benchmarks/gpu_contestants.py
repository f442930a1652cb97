"""The contestants on a GPU, and how their time and memory are measured there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from .cases import Batch, Case
from .contestants import (
    NATIVE,
    PAD,
    SCAN,
    TORCHRL_PAD,
    TORCHRL_SCAN,
    TORCHRL_TRITON,
    TRITON,
    Contestant,
)
from .timing import Budget, interleave

TORCHRL = (TORCHRL_TRITON, TORCHRL_SCAN, TORCHRL_PAD)
ALL = (TRITON, PAD, SCAN, *TORCHRL, NATIVE)
# Contestants that take no CPU tensors, and so have no part in a dry run.
NEEDS_GPU = (TORCHRL_TRITON,)


def make_contestant(name: str, case: Case, batch: Batch, mode: str) -> Contestant:
    """Make a contestant whose recurrent products have a mode."""
    if mode == "bfloat16":
        return Contestant(name, case, batch, recurrent_compute_dtype=torch.bfloat16)
    return Contestant(name, case, batch, recurrent_matmul_precision=mode)


def set_library(mode: str) -> None:
    """Let cuDNN and cuBLAS compute at the precision of a run.

    A library has no ``"tf32x3"``; it runs float32 then, as TorchRL's modules do.
    """
    allow = mode == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


def seconds(
    calls: Mapping[str, Callable[[], object]], device: str, budget: float
) -> dict[str, float]:
    """Return the median time of every call; all take turns.

    Args:
        calls: to time, by name; each has run before, so that what it compiles is compiled.
        device: ``"cuda"`` or ``"cpu"``.
        budget: seconds of samples of each.
    """

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    timings = interleave(calls, Budget(budget, 1, 50), clock)
    return {name: timing.median for name, timing in timings.items()}


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the memory that a call takes at most beyond what was there, on the GPU.

    What it compiles must be compiled: tuning a kernel takes memory of its own.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
