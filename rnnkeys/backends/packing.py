"""From ``is_init`` to segments, and from segments to rows that need no resets.

A segment is a maximal run of steps of one row with no reset after its first step. Segments do not
depend on each other, so they need not run one after the other: sorted by falling length and laid
side by side, a ``[8, 1024]`` batch of short episodes becomes some 60 steps of some 800 rows that
only get fewer. Step ``t`` holds the segments longer than ``t``; each occupies the same row in every
step, so neither a value nor a NaN can pass from one to another. A kernel that is fastest with all
steps of one size gets rows that segments share, with gaps in which it clears the state.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .layouts import Layout, lay_out

# Batches whose segments are kept, and plans for each.
_MOST_BATCHES, _MOST_PLANS = 16, 4
# Steps of segments, on average, below which gaps between them are too many.
_SHORT_SEGMENT = 2


class Plan:
    """Where every step of a ``[B, T]`` batch goes in flat time-major rows ``[N, F]``, and back.

    Attributes:
        sizes: rows of every step, never growing.
        blocks: ``(first step, number of steps, rows)`` of runs of steps with one size.
        source: ``[N]`` long, the flat position ``b * T + t`` that fills each row.
        position: ``[B * T]`` long, the row of each flat position.
        padding: long, rows that repeat the segment before them, in gaps and at ends.
        clears: whether segments share rows, so that the state must be cleared in padding.
        gaps: rows of padding that another segment follows.
        starts: ``[S]`` long, flat positions of the segments' first steps, in the order of their
            rows, so that those that begin at the first packed step come first.
        start_rows: ``[S]`` long, the rows of these.
        start_rows_on_host: the same as an array.
        is_dense: whether no row is cut, so that rows are those of the batch.
    """

    def __init__(self, of: Segments, block_rows: int, carried: np.ndarray | None = None) -> None:
        starts, lengths, device = of.starts, of.lengths, of.device
        layout = lay_out(lengths, block_rows, carried)
        offsets = np.cumsum(layout.sizes) - layout.sizes
        segment = np.repeat(np.arange(len(starts)), lengths)
        steps = np.arange(len(segment))
        position = offsets[steps - starts[segment] + layout.first[segment]] + layout.row[segment]
        source = np.full(layout.sizes.sum(), -1)
        source[position] = steps
        padding = np.flatnonzero(source < 0)
        source[padding] = _before_padding(layout, offsets, padding, starts + lengths - 1)
        start_rows = position[starts]
        order = np.argsort(start_rows)
        self.sizes: list[int] = layout.sizes.tolist()
        self.shape = of.shape
        self.source = _to(source, device)
        self.position = _to(position, device)
        self.starts = _to(starts[order], device)
        self.start_rows_on_host = start_rows[order]
        self.start_rows = _to(self.start_rows_on_host, device)
        self.is_dense = of.are_rows
        self.padding = _to(padding, device)
        self.clears = layout.clears
        begins = np.zeros(len(source) + self.sizes[0], dtype=bool)
        begins[start_rows] = layout.clears
        self.gaps = _to(padding[begins[padding + self.sizes[0]]], device)

    @cached_property
    def blocks(self) -> list[tuple[int, int, int]]:
        """Runs of steps with one size."""
        first = [t for t, n in enumerate(self.sizes) if t == 0 or n != self.sizes[t - 1]]
        ends = [*first[1:], len(self.sizes)]
        return [(t, end - t, self.sizes[t]) for t, end in zip(first, ends, strict=True)]

    @cached_property
    def is_padding(self) -> Tensor:
        """Float ``[N, 1]``, 1 in rows of padding and 0 in others."""
        rows = torch.zeros(len(self.source), 1, dtype=torch.float32, device=self.source.device)
        return rows.index_fill_(0, self.padding, 1)

    def pack(self, x: Tensor) -> Tensor:
        """Lay ``x [B, T, F]`` out in rows ``[N, F]``."""
        if self.is_dense:
            return x.transpose(0, 1).flatten(0, 1)
        return _gather(x.flatten(0, 1), self.source, self.position, None)

    def pack_blank(self, x: Tensor) -> Tensor:
        """Lay ``x [B, T, F]`` out in rows as :meth:`pack` does, but with zeros in padding.

        For use where no gradient is recorded.
        """
        rows = self.pack(x)
        return rows if self.is_dense else rows.index_fill_(0, self.padding, 0.0)

    def unpack(self, rows: Tensor) -> Tensor:
        """Take ``[B, T, F]`` out of rows ``[N, F]``: a view if the plan is dense."""
        if self.is_dense:
            return rows.view(*self.shape[::-1], -1).transpose(0, 1)
        flat = _gather(rows, self.position, self.source, self.padding)
        return flat.view(*self.shape, -1)

    def at_starts(self, state: Tensor) -> Tensor:
        """Take of ``state [B, T, ...]`` what enters the first packed step, ``[sizes[0], ...]``."""
        return state[:, 0] if self.is_dense else _take(state, self.starts[: self.sizes[0]])

    def at_first_steps(self, rows: Tensor) -> Tensor:
        """Take ``[S, H]`` of the segments' first steps out of rows ``[N, H]`` or ``[B, T, H]``.

        ``[S, H]`` are these already.
        """
        if rows.ndim == 3:
            return rows[:, 0] if self.is_dense else _take(rows, self.starts)
        count = self.starts.numel()
        return rows[self.start_rows] if self.clears and len(rows) > count else rows[:count]

    def put_at_starts(self, rows: Tensor) -> Tensor:
        """Put ``rows [S, ...]`` where segments start in ``[B, T, ...]``, and NaN elsewhere."""
        batch, steps = self.shape
        if self.is_dense:
            out = rows.new_full((batch, steps, *rows.shape[1:]), float("nan"))
            out[:, 0] = rows
            return out
        flat = rows.new_full((batch * steps, *rows.shape[1:]), float("nan"))
        return flat.index_copy_(0, self.starts, rows).view(batch, steps, *rows.shape[1:])


def _gather(rows: Tensor, index: Tensor, inverse: Tensor, unused: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        return _Gather.apply(rows, index, inverse, unused)
    return rows.index_select(0, index)


class _Gather(torch.autograd.Function):
    """Gather rows; backward gathers too: every real row is taken once, ``unused`` ones never."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, unused: Tensor | None):
        ctx.inverse, ctx.unused = inverse, unused
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        grad = grads[0].index_select(0, ctx.inverse)
        if ctx.unused is not None and ctx.unused.numel():
            grad.index_fill_(0, ctx.unused, 0.0)
        return grad, None, None, None


class Segments:
    """The segments of a batch, read from its marks.

    Args:
        is_init: bool ``[B, T]``, True where a segment starts; the first column counts as True.
        device: of the marks.

    Attributes:
        starts: ``[S]``, flat positions ``b * T + t`` of first steps, in the order of the batch.
        lengths: ``[S]``.
        are_rows: whether no row is cut.
    """

    def __init__(self, is_init: np.ndarray, device: torch.device) -> None:
        marks = is_init.copy()
        marks[:, 0] = True
        self.shape, self.device = marks.shape, device
        self.starts = np.flatnonzero(marks)
        self.lengths = np.diff(self.starts, append=marks.size)
        self.are_rows = len(self.starts) == len(marks)
        self._plans: OrderedDict[Any, Plan] = OrderedDict()

    @cached_property
    def _index(self) -> Tensor:
        """``starts`` on the device."""
        return _to(self.starts, self.device)

    def plan(self, block_rows: int = 0, carried: np.ndarray | None = None) -> Plan:
        """Plan the packing, or return the plan made before.

        Args:
            block_rows: if not 0, step sizes are rounded up so that they form few blocks of one
                size, each of which costs about as much as this many rows of one step.
            carried: bool ``[S]``, which segments do not start from zeros; given where segments may
                share rows.

        Returns:
            The plan, with its indices on the device of the marks.

        Examples:
            >>> read_segments(torch.tensor([[True, False, True, False, False]])).plan().sizes
            [2, 2, 1]
        """
        key = block_rows, None if carried is None else carried.tobytes()
        return _recall(self._plans, _MOST_PLANS, key, lambda: Plan(self, block_rows, carried))

    def find_carried(self, states: Sequence[Tensor]) -> np.ndarray | None:
        """Find the segments that do not start from zeros, or whose start gets a gradient.

        Args:
            states: each ``[B, T, ...]``, on the CPU, read where segments start.

        Returns:
            Bool ``[S]``; None if no row is cut, or if there are so many segments that gaps between
            them would cost more than they save.

        Examples:
            >>> segments = read_segments(torch.tensor([[True, False, True, False]]))
            >>> segments.find_carried([torch.tensor([[[2.0], [7.0], [0.0], [7.0]]])])
            array([ True, False])
        """
        count = len(self.starts)
        if self.are_rows or count * _SHORT_SEGMENT > self.shape[0] * self.shape[1]:
            return None
        if torch.is_grad_enabled() and any(state.requires_grad for state in states):
            return np.ones(count, dtype=bool)
        carried = np.zeros(count, dtype=bool)
        for state in states:
            carried |= _take(state.detach(), self._index).numpy().reshape(count, -1).any(1)
        return carried


_read: OrderedDict[Any, Segments] = OrderedDict()
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    # A child has no other thread that could release a lock it was born with.
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


def read_segments(is_init: Tensor) -> Segments:
    """Read the segments of a batch, or return those read before from the same marks.

    They are kept by content, since losses pass clones and views: all layers, all modules and both
    passes of a training step share them, and their plans. Reading synchronises with the device.

    Args:
        is_init: bool ``[B, T]``, True where a segment starts; the first column counts as True.

    Examples:
        >>> read_segments(torch.tensor([[True, False, True, False, False]])).lengths
        array([2, 3])
    """
    marks = is_init.numpy(force=True)
    key = marks.shape, marks.tobytes(), is_init.device
    return _recall(_read, _MOST_BATCHES, key, lambda: Segments(marks, is_init.device))


def _recall(kept: OrderedDict[Any, Any], most: int, key: Any, make: Callable[[], Any]) -> Any:
    """Return what is kept under a key, or make it; the least lately used is dropped."""
    with _lock:
        found = kept.get(key)
        if found is not None:
            kept.move_to_end(key)
            return found
    # What is made while evaluating in inference mode must serve the training that follows.
    with torch.inference_mode(False):
        made = make()
    with _lock:
        kept[key] = made
        while len(kept) > most:
            kept.popitem(last=False)
    return made


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Take entries of ``x [B, T, ...]`` at flat positions, without a copy of all of it."""
    steps = x.shape[1]
    if x.stride(0) == steps * x.stride(1):
        return x.flatten(0, 1).index_select(0, index)
    return x[index // steps, index % steps]


def _before_padding(
    layout: Layout, offsets: np.ndarray, padding: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """Flat positions of the last steps before rows of padding; ``ends`` are those of segments."""
    steps = len(layout.sizes)
    step = np.searchsorted(offsets, padding, side="right") - 1
    row = padding - offsets[step]
    # Down one row after the other.
    begins = layout.row * steps + layout.first
    order = np.argsort(begins)
    return ends[order[np.searchsorted(begins[order], row * steps + step) - 1]]


def _to(index: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(index.astype(np.int64)).to(device)
