"""The least time that a GPU can take: by the bytes that have to move and the sums to be made."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .cases import GATES, STATES, Case

# Multiplications that one product of a mode takes on the unit that makes them.
_PRODUCTS = {"tf32x3": 3}


class Rates(NamedTuple):
    """Throughputs of a GPU.

    Attributes:
        bytes: that it moves in a second, read and written.
        flops: floating point operations in a second, by mode of the products.
    """

    bytes: float
    flops: dict[str, float]


# Of an H100 SXM, by its maker. A run measures its own GPU's and divides by those.
H100 = Rates(3.35e12, {"ieee": 67e12, "tf32": 494e12, "tf32x3": 494e12, "bfloat16": 989e12})


def least_bytes(case: Case, phase: str) -> int:
    """Return the bytes that have to move: every input read once, every output written once.

    With a backward pass also the activations that it needs, written and read, and the gradients.
    Weights are small beside that, but for short batches they are not: they count once a pass.
    """
    B, T, I, H, _ = case.shape
    gates, states = GATES[case.cell], len(STATES[case.cell])
    weights = gates * H * (I + H + 2)
    forward = B * T * (I + states * H) + weights
    if phase == "forward":
        return 4 * forward + B * T
    activations = B * T * 4 * H
    # Read: x, states, the gradient of y. Written: the gradients of x and of the parameters.
    backward = B * T * (I + states * H + H + I) + 2 * weights
    return 4 * (forward + 2 * activations + backward) + 2 * B * T


def least_seconds(case: Case, phase: str, mode: str, rates: Rates) -> float:
    """Return the larger of what memory traffic and matmul throughput allow.

    Steps that wait for each other are left out: a batch of few rows stays far above this bound.
    """
    share = 1 if phase == "forward" else 3
    flops = case.matmul_flops / 3 * share * _PRODUCTS.get(mode, 1)
    return max(least_bytes(case, phase) / rates.bytes, flops / rates.flops[mode])


def measure_rates(time: Callable[[Callable[[], object]], float]) -> Rates:
    """Measure a GPU by a large copy and by large products of cuBLAS.

    Args:
        time: returns the seconds of a call.
    """

    def warm(call: Callable[[], object]) -> float:
        call()
        return time(call)

    source, target = torch.randn(2, 2**28, device="cuda")
    moved = 2 * source.nbytes / warm(lambda: target.copy_(source))
    size = 8192
    a, b = torch.randn(2, size, size, device="cuda")
    flops = {}
    for mode in ("ieee", "tf32"):
        torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
        flops[mode] = 2 * size**3 / warm(lambda: torch.mm(a, b))
    half_a, half_b = a.bfloat16(), b.bfloat16()
    flops["bfloat16"] = 2 * size**3 / warm(lambda: torch.mm(half_a, half_b))
    return Rates(moved, flops | {"tf32x3": flops["tf32"]})
