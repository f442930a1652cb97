"""The loop of a linear recurrence over time, in place, and chunks of steps that fit the cache.

Tensors are time-major, ``[T, N, F]``, real or complex. Time runs as a plain loop where a step has
much to compute, and in blocks, side by side, where it has little: blocks compute three times as
much in a small fraction of the calls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._compat import run_in_order

# Elements of a step above which a plain loop is faster than blocks.
_MOST_IN_BLOCKS = 1024
# Steps below which blocks are not worth their passes.
_FEWEST_STEPS = 32
# Elements of a chunk: a dozen tensors of this size are read and written together.
_CHUNK = 1 << 17


class Chunk(NamedTuple):
    """Some steps and the resets among them.

    Attributes:
        first: the first step.
        until: the step after the last.
        resets: where segments start inside, as flat positions from ``first`` on, int64 ``[R]``.
        entering: ``[R, F]``, the stored states there, or None for zeros.
    """

    first: int
    until: int
    resets: Tensor
    entering: Tensor | None

    @property
    def has_resets(self) -> bool:
        """Whether segments start inside."""
        return bool(self.resets.numel())

    def of(self, x: Tensor) -> Tensor:
        """Return the chunk's steps of ``x [T, ...]``."""
        return x[self.first : self.until]

    def rows_of(self, steps: Tensor) -> Tensor:
        """Return the rows ``[R, F]`` of the chunk's own ``steps [C, N, F]`` at its resets."""
        return steps.flatten(0, 1).index_select(0, self.resets)

    def write_rows(self, steps: Tensor, rows: Tensor | None) -> None:
        """Write rows ``[R, F]``, or zeros, into the chunk's own ``steps`` at its resets."""
        if rows is not None:
            steps.flatten(0, 1).index_copy_(0, self.resets, rows)
        elif self.has_resets:
            steps.flatten(0, 1).index_fill_(0, self.resets, 0)


def find_resets(reset: Tensor) -> Tensor:
    """Return where ``reset [T, N]`` is True after the first step, as flat positions ``[R]``.

    The first step always starts a segment and is left out.

    Examples:
        >>> find_resets(torch.tensor([[True, False], [False, True]]))
        tensor([3])
    """
    rows = reset.shape[1]
    return reset[1:].flatten().nonzero().squeeze(1) + rows


def cut_chunks(start: Tensor, resets: Tensor) -> list[Chunk]:
    """Cut time into chunks: all steps at once where time runs in blocks.

    Args:
        start: ``[T, N, F]``, the stored states, any strides.
        resets: flat positions ``[R]``, from :func:`find_resets`.
    """
    steps, rows, features = start.shape
    size = steps if prefers_blocks(start) else max(1, _CHUNK // max(1, rows * features))
    firsts = range(0, steps, size)
    bounds = torch.tensor([*firsts, steps], device=resets.device) * rows
    ends = torch.searchsorted(resets, bounds).tolist()
    stored = _read_rows(start, resets)
    # Episodes start from zeros: then nothing enters.
    entering = stored if stored.any() else None
    chunks = []
    for k, first in enumerate(firsts):
        inside = slice(ends[k], ends[k + 1])
        chunk = Chunk(
            first,
            min(first + size, steps),
            resets[inside] - first * rows,
            None if entering is None else entering[inside],
        )
        chunks.append(chunk)
    return chunks


def _read_rows(start: Tensor, resets: Tensor) -> Tensor:
    """Return the rows ``[R, F]`` of ``start [T, N, F]`` at flat positions, without a copy of it."""
    steps, rows = start.shape[:2]
    step, row = resets // rows, resets % rows
    if start.stride(1) == steps * start.stride(0):  # laid out as [N, T, F]
        return start.transpose(0, 1).flatten(0, 1).index_select(0, row * steps + step)
    return start[step, row]


def prefers_blocks(states: Tensor) -> bool:
    """Return whether blocks are faster than a loop for ``[T, N, F]``."""
    return len(states) >= _FEWEST_STEPS and states[0].numel() <= _MOST_IN_BLOCKS


def run_steps(a: Tensor, h: Tensor, entering: Tensor | None, backwards: bool = False) -> None:
    """Run ``h_t += a_t * h_{t-1}`` in place, or ``h_t += a_t * h_{t+1}`` backwards.

    Args:
        a: ``[C, N, F]``; overwritten.
        h: ``[C, N, F]``.
        entering: ``[N, F]``, the state before the first step, or None for zeros.
        backwards: whether time runs from the last step to the first.
    """
    first = -1 if backwards else 0
    if entering is not None:
        h[first].addcmul_(a[first], entering)
    if prefers_blocks(h):
        _run_blocks(a, h, backwards)
    else:
        _run_loop(a, h, backwards)


def run_chunk_back(
    chunk: Chunk, a: Tensor, d: Tensor, entering: Tensor | None, following: Tensor
) -> Tensor:
    """Run ``d_t += a_{t+1} * d_{t+1}`` in place, nothing passing a segment start backwards.

    Args:
        chunk: the steps.
        a: ``[C + 1, N, F]``, the decays of the chunk in the first ``C``; overwritten.
        d: ``[C, N, F]``.
        entering: ``[N, F]``, the ``d`` of the step after the chunk, or None for zeros.
        following: ``[N, F]``, the decay of that step, zero where a segment starts.

    Returns:
        The decay of the chunk's first step, zero where a segment starts.
    """
    a[-1] = following
    chunk.write_rows(a[:-1], None)
    first = a[0].clone()
    run_steps(a[1:], d, entering, backwards=True)
    return first


def _run_loop(a: Tensor, h: Tensor, backwards: bool) -> None:
    decays, states = _in_order(a, 0, backwards), _in_order(h, 0, backwards)
    run_in_order("addcmul_", states[1:], decays[1:], states[:-1])


def _in_order(x: Tensor, dim: int, backwards: bool) -> tuple[Tensor, ...]:
    parts = x.unbind(dim)
    return parts[::-1] if backwards else parts


def _run_blocks(a: Tensor, h: Tensor, backwards: bool) -> None:
    """Run blocks of about ``sqrt(T)`` steps side by side, then carry states from block to block.

    The states inside a block that starts from zeros, and the products of decays up to each step,
    need nothing of the blocks before; ``h = local + product * carried`` joins them. Steps that fill
    no block run as a loop, after the others.
    """
    steps = len(h)
    length = 1 << max(2, round(steps**0.5).bit_length() - 1)
    count = steps // length
    rest = steps - count * length
    whole = slice(rest, steps) if backwards else slice(0, count * length)
    blocks = h[whole].view(count, length, *h.shape[1:])
    products = a[whole].view(count, length, *h.shape[1:])
    local, powers = _in_order(blocks, 1, backwards), _in_order(products, 1, backwards)
    run_in_order("addcmul_", local[1:], powers[1:], local[:-1])
    run_in_order("mul_", powers[1:], powers[:-1])
    ends, through = _in_order(local[-1], 0, backwards), _in_order(powers[-1], 0, backwards)
    run_in_order("addcmul_", ends[1:], through[1:], ends[:-1])
    if backwards:
        blocks[:-1, 1:].addcmul_(products[:-1, 1:], blocks[1:, :1])
    else:
        blocks[1:, :-1].addcmul_(products[1:, :-1], blocks[:-1, -1:])
    if rest:
        left = slice(0, rest + 1) if backwards else slice(steps - rest - 1, steps)
        _run_loop(a[left], h[left], backwards)


def enter_at_resets(chunk: Chunk, a: Tensor, h: Tensor) -> None:
    """Add ``a_t * start_t`` to ``h`` at a chunk's resets, and zero out ``a`` there.

    Args:
        chunk: the steps.
        a: ``[C, N, F]``, their decays.
        h: ``[C, N, F]``, before time runs.
    """
    if chunk.entering is not None:
        h.flatten(0, 1).index_add_(0, chunk.resets, chunk.rows_of(a).mul_(chunk.entering))
    chunk.write_rows(a, None)


def is_finite_at(values: Tensor, positions: Tensor) -> bool:
    """Return whether the rows of ``values [T, N, F]`` at flat positions ``[R]`` are finite.

    A sum is finite if its terms are, unless it overflows, which costs time alone.
    """
    if not positions.numel():
        return True
    return bool(values.flatten(0, 1).index_select(0, positions).sum().isfinite())
