"""Launches of the scan's kernels: the functions of ``linear_recurrence`` on a GPU.

The host never waits for the GPU: resets are selected in the kernels, and no value is checked.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...cells.linear import candidate, mix_coefficients
from . import why_not_machine
from .config import FUSED_MULTIPLY_ADD, on_device

# Columns per program, and steps per chunk at least.
_BLOCK = 128
_SHORTEST_CHUNK = 64
# Programs that a processor should have to run.
_PROGRAMS_PER_PROCESSOR = 4


def can_run(x: Tensor) -> bool:
    """Return whether the kernels can run on the device of ``x``."""
    return x.is_cuda and _is_supported(x.device)


@functools.cache
def _is_supported(device: torch.device) -> bool:
    return why_not_machine(device) is None


def scan(a: Tensor, b: Tensor, start: Tensor, reset: Tensor, paired: bool = False) -> Tensor:
    """Run ``linear_recurrence.scan`` in kernels.

    Args:
        a: ``[T, N, F]``, or ``[F]`` for one decay at every step.
        b: ``[T, N, F]``.
        start: ``[T, N, F]``, any strides, read at the first step and where ``reset``.
        reset: bool ``[T, N]``.
        paired: whether tensors hold complex numbers, in pairs of real and imaginary part.

    Returns:
        ``h [T, N, F]``.
    """
    dtype = b.dtype
    a, b, start = (_widen(x) for x in (a, b, start))
    problem = _Problem(b, start, reset, a.ndim == 1, paired)
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    tensors = (a.contiguous(), b.contiguous(), start, reset.contiguous(), h)
    problem.launch("forward", tensors)
    return h.to(dtype)


def scan_backward(
    grad: Tensor,
    a: Tensor,
    h: Tensor,
    start: Tensor,
    reset: Tensor,
    wants_start: bool,
    paired: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``linear_recurrence.scan_backward`` in kernels; arguments are those of :func:`scan`."""
    dtype = h.dtype
    constant = a.ndim == 1
    grad, a, h, start = (_widen(x) for x in (grad, a, h, start))
    problem = _Problem(h, start, reset, constant, paired)
    d_b = torch.empty_like(h, memory_format=torch.contiguous_format)
    d_a = h.new_empty(problem.count, *h.shape[1:]) if constant else torch.empty_like(d_b)
    d_start = torch.zeros_like(d_b) if wants_start else h.new_empty(0)
    tensors = (grad.contiguous(), a.contiguous(), h.contiguous(), start, reset.contiguous())
    problem.launch("backward", (*tensors, d_a, d_b, d_start), WANT_START=wants_start)
    if constant:
        d_a = d_a.sum((0, 1))
    return d_a.to(dtype), d_b.to(dtype), d_start.to(dtype)


def gated_scan(p: Tensor, start: Tensor, reset: Tensor) -> Tensor:
    """Run ``gated_recurrence.forward`` in kernels."""
    a, b = mix_coefficients(*p.chunk(2, -1))
    return scan(a, b, start, reset)


def gated_scan_backward(
    grad: Tensor, p: Tensor, h: Tensor, start: Tensor, reset: Tensor, wants_start: bool
) -> tuple[Tensor, Tensor]:
    """Run ``gated_recurrence.backward`` in kernels."""
    u, v = p.chunk(2, -1)
    z, a = u.sigmoid(), torch.sigmoid(-u)
    d_a, d, d_start = scan_backward(grad, a, h, start, reset, wants_start)
    d_u = (d * candidate(v) - d_a) * z * a
    below = v.clamp(max=0).sigmoid()
    d_v = d * z * (below * (1 - below) + 0.75 * (v > 0))
    return torch.cat([d_u, d_v], -1), d_start


class _Problem:
    """Sizes of a scan and its chunks.

    Args:
        states: ``[T, N, F]``, real; ``F`` counts both parts if paired.
        start: ``[T, N, F]``.
        reset: bool ``[T, N]``.
        constant: whether the decay is ``[F]``.
        paired: whether tensors hold complex numbers in pairs.
    """

    def __init__(
        self, states: Tensor, start: Tensor, reset: Tensor, constant: bool, paired: bool
    ) -> None:
        self.steps, self.rows, width = states.shape
        self.features = width // 2 if paired else width
        self.columns = self.rows * self.features
        self.states = states
        self.strides = start.stride()
        self.options: dict[str, Any] = {
            "CONSTANT": constant, "PAIRED": paired, "BLOCK": _BLOCK, **FUSED_MULTIPLY_ADD
        }  # fmt: skip
        self.blocks = -(-self.columns // _BLOCK)
        self.length = _chunk_length(self.steps, self.blocks, states.device)
        self.count = -(-self.steps // self.length)

    def launch(self, direction: str, tensors: tuple[Tensor, ...], **options: Any) -> None:
        """Run all chunks: at once where there is one, else in three launches."""
        from . import linear

        kernel: Any = getattr(linear, direction)
        carry: Any = linear.carry
        paired = self.options["PAIRED"]
        shape = (self.count, self.columns * (2 if paired else 1))
        entering = self.states.new_zeros(shape)
        several = self.count > 1
        ends, products = (self.states.new_empty(shape if several else 0) for _ in range(2))
        cuts = ends.new_empty(shape[0], self.columns if several else 0, dtype=torch.bool)
        sizes = (self.steps, self.rows, self.features, self.length, *self.strides)
        arguments = (*tensors, ends, products, cuts, entering, *sizes)
        options |= self.options
        with on_device(self.states.device):
            if several:
                kernel[(self.blocks, self.count)](*arguments, LOCAL=True, **options)
                carry[(self.blocks,)](
                    ends, products, cuts, entering, self.count, self.columns,
                    PAIRED=paired, BACKWARDS=direction == "backward", BLOCK=_BLOCK,
                    **FUSED_MULTIPLY_ADD,
                )  # fmt: skip
            kernel[(self.blocks, self.count)](*arguments, LOCAL=False, **options)


def _chunk_length(steps: int, blocks: int, device: torch.device) -> int:
    """Return the steps of a chunk: all of them where the columns alone fill the GPU."""
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    chunks = max(1, processors * _PROGRAMS_PER_PROCESSOR // blocks)
    return steps if chunks == 1 else max(_SHORTEST_CHUNK, -(-steps // chunks))


def _widen(x: Tensor) -> Tensor:
    """Return float32 for narrower dtypes, whose states would lose digits at every step."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
