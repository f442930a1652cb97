"""The contestants on a GPU: ways to run one recurrent layer over a batch with resets."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
import torchrl.modules
from tensordict import TensorDict
from torch import Tensor

import rnnkeys

from .cases import Batch, Case
from .contestants import make_layers, make_module

OURS, OURS_PAD = "triton", "pad"
PLAIN = "hand-written op"
THEIRS_TRITON, THEIRS_SCAN, THEIRS_PAD = "TorchRL triton", "TorchRL scan", "TorchRL pad"
CUDNN = "cuDNN, no resets"
THEIRS = (THEIRS_TRITON, THEIRS_SCAN, THEIRS_PAD)
ALL = (OURS, OURS_PAD, PLAIN, *THEIRS, CUDNN)
# Contestants that take no CPU tensors, and so have no part in a dry run.
NEEDS_GPU = (THEIRS_TRITON,)

_MODULES: dict[str, tuple[Any, dict[str, Any]]] = {
    OURS: (rnnkeys, {"recurrent_backend": "triton"}),
    OURS_PAD: (rnnkeys, {"recurrent_backend": "pad"}),
    PLAIN: (rnnkeys, {"recurrent_backend": "scan"}),
    THEIRS_TRITON: (torchrl.modules, {"recurrent_backend": "triton"}),
    THEIRS_SCAN: (torchrl.modules, {"recurrent_backend": "scan"}),
    THEIRS_PAD: (torchrl.modules, {"recurrent_backend": "pad"}),
}
# Calls slower than this (s) are timed once.
_SLOW = 1.0


class Contestant:
    """One way to run one case; all that it holds beside the batch are its parameters.

    Args:
        name: one of ``ALL``.
        case: to run.
        batch: its data, where the case is to run; others may share it.
        precision: ``recurrent_matmul_precision``, or ``"bfloat16"`` for that compute dtype.
    """

    def __init__(self, name: str, case: Case, batch: Batch, precision: str) -> None:
        layers = make_layers(case).to(batch.x.device)
        self._leaves = [batch.x, *layers.parameters()]
        self._grad = batch.grad
        if name == CUDNN:
            first = [state[:, 0].transpose(0, 1).contiguous() for state in batch.states.values()]
            state = tuple(first) if len(first) == 2 else first[0]
            self._run: Callable[[], Tensor] = lambda: layers(batch.x, state)[0]
            return
        library, arguments = _MODULES[name]
        modes: dict[str, Any] = {"recurrent_matmul_precision": precision}
        if precision == "bfloat16":
            modes = {"recurrent_compute_dtype": torch.bfloat16}
        arguments = arguments | modes | {"default_recurrent_mode": True}
        module = make_module(library, case.cell, layers, **arguments)
        entries = {"x": batch.x, "is_init": batch.is_init.unsqueeze(-1), **batch.states}
        data = TensorDict(entries, batch.is_init.shape)
        self._run = lambda: module(data.copy())["y"]

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Return the outputs, prepared for no backward pass."""
        return self._run()

    def both(self) -> tuple[Tensor, ...]:
        """Run forward and backward; return outputs and gradients."""
        y = self._run()
        return (y, *torch.autograd.grad(y, self._leaves, self._grad))


def set_library(precision: str) -> None:
    """Let cuDNN and cuBLAS compute at the precision of a run.

    A library has no ``"tf32x3"``; it runs float32 then, as TorchRL's modules do.
    """
    allow = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


def seconds(
    calls: Mapping[str, Callable[[], object]], device: str, budget: float
) -> dict[str, float]:
    """Return the median time of every call, by the device's own clock.

    Calls take turns, in an order of its own every round: each comes after any other, and all see
    the same drift of a clock that heat slows down.

    Args:
        calls: to time, by name; each has run before, so that what it compiles is compiled.
        device: ``"cuda"`` or ``"cpu"``.
        budget: seconds of samples of each. Calls longer than a second get one.
    """
    order, shuffle = list(calls), random.Random(0).shuffle
    shuffle(order)
    samples = {name: [_sample(calls[name], device)] for name in order}
    rounds = {name: _rounds(taken[0], budget) for name, taken in samples.items()}
    turns = max(rounds.values(), default=0)
    for turn in range(turns):
        shuffle(order)
        for name in order:
            # The few rounds of a slow one are spread over all.
            if (turn + 1) * rounds[name] // turns > turn * rounds[name] // turns:
                samples[name].append(_sample(calls[name], device))
    return {name: median(samples[name][rounds[name] > 0 :]) for name in calls}


def _rounds(first: float, budget: float) -> int:
    return 0 if first >= _SLOW else min(50, max(3, int(budget / first)))


def _sample(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


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
