"""From ``is_init`` flags to segments, and from segments to packed rows without resets.

A segment is a maximal run of time steps of one batch row with no ``is_init`` after its first step.
Segments do not depend on each other, so they need not run one after the other: sorted by falling
length and laid side by side, a ``[8, 1024]`` batch of short episodes becomes some 60 steps of some
800 rows or fewer. Step ``t`` contains the segments longer than ``t``. Each segment has one row in
every step, so neither a value nor a NaN passes from one segment to another. A kernel that can clear
the state between two segments may run several in one row (``shared_rows``).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .layouts import choose_layout

# Batches whose segments are kept, and plans for each.
_MOST_BATCHES = 16
_MOST_PLANS = 4


class Plan:
    """The position of every time step of a batch ``[B, T]`` in time-major packed rows ``[N, F]``.

    Args:
        segments: of the batch.
        block_rows: see :meth:`Segments.plan`.
        nonzero: see :meth:`Segments.plan`.

    Attributes:
        shape: ``(B, T)``.
        sizes: number of rows of every packed step, never growing.
        blocks: ``(steps, rows)`` of runs of packed steps with the same number of rows.
        source: ``[N]`` long, the flat position ``b * T + t`` that each row is copied from.
        position: ``[B * T]`` long, the row of each flat position.
        padding: long, the rows that only fill blocks or gaps; they repeat a step of their row.
        starts: ``[sizes[0]]`` long, flat positions of the first packed step.
        is_dense: whether no batch row is cut, so that packed rows are those of the batch.
        is_shared: whether segments share rows, with padding between them.
    """

    def __init__(
        self, segments: Segments, block_rows: int, nonzero: np.ndarray | None = None
    ) -> None:
        starts, lengths = segments.starts, segments.lengths
        layout = choose_layout(lengths, block_rows, nonzero)
        sizes = layout.sizes
        offsets = np.cumsum(sizes) - sizes
        steps = np.arange(lengths.sum()) + np.repeat(layout.step - starts, lengths)
        position = offsets[steps] + np.repeat(layout.row, lengths)
        source = np.full(sizes.sum(), -1)
        source[position] = np.arange(len(position))
        padding = np.flatnonzero(source < 0)
        last = np.empty(sizes[0], dtype=np.int64)
        last[layout.row] = starts + lengths - 1
        row = padding - offsets[np.searchsorted(offsets, padding, side="right") - 1]
        source[padding] = last[row]
        device = segments.device
        self.shape = segments.shape
        self.is_dense = segments.are_rows
        self.is_shared = bool(layout.step.any())
        self.sizes: list[int] = sizes.tolist()
        self.source = _to(source, device)
        self.position = _to(position, device)
        self.padding = _to(padding, device)
        self.starts = _to(source[: sizes[0]], device)

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """Runs of packed steps with the same number of rows."""
        sizes, counts = np.unique(self.sizes, return_counts=True)
        return list(zip(counts[::-1].tolist(), sizes[::-1].tolist(), strict=True))

    def pack(self, x: Tensor) -> Tensor:
        """Copy ``x [B, T, F]`` to rows ``[N, F]``."""
        if self.is_dense:
            return x.transpose(0, 1).flatten(0, 1)
        return _gather(x.flatten(0, 1), self.source, self.position, None)

    def unpack(self, rows: Tensor) -> Tensor:
        """Copy rows ``[N, F]`` to ``[B, T, F]``; if the plan is dense, the result is a view."""
        if self.is_dense:
            return rows.view(*self.shape[::-1], -1).transpose(0, 1)
        flat = _gather(rows, self.position, self.source, self.padding)
        return flat.view(*self.shape, -1)

    def at_starts(self, state: Tensor) -> Tensor:
        """Return the entries of ``state [B, T, ...]`` at the first packed step, ``[S, ...]``."""
        return state[:, 0] if self.is_dense else _take(state, self.starts)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Return the entries of ``x [B, T, ...]`` at flat positions."""
    steps = x.shape[1]
    if x.stride(0) == steps * x.stride(1):
        return x.flatten(0, 1).index_select(0, index)
    # Flattening would copy the whole of it.
    return x[index // steps, index % steps]


def _gather(rows: Tensor, index: Tensor, inverse: Tensor, unused: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        return _Gather.apply(rows, index, inverse, unused)
    return rows.index_select(0, index)


class _Gather(torch.autograd.Function):
    """Gather rows; the backward pass gathers too, since a row is read once, or never (padding)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, unused: Tensor | None):
        ctx.inverse = inverse
        ctx.unused = unused
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        grad = grads[0].index_select(0, ctx.inverse)
        if ctx.unused is not None and ctx.unused.numel():
            grad.index_fill_(0, ctx.unused, 0.0)
        return grad, None, None, None


class Segments:
    """The segments of a batch.

    Args:
        is_init: bool ``[B, T]``, True where a segment starts; the first column counts as True.
        device: of the flags.

    Attributes:
        starts: ``[S]``, flat positions ``b * T + t`` of first steps, in the order of the batch.
        lengths: ``[S]``.
        are_rows: whether no batch row is cut.
    """

    def __init__(self, is_init: np.ndarray, device: torch.device) -> None:
        is_start = is_init.copy()
        is_start[:, 0] = True
        self.shape = is_start.shape
        self.device = device
        self.starts = np.flatnonzero(is_start)
        self.lengths = np.diff(self.starts, append=is_start.size)
        self.are_rows = len(self.starts) == len(is_start)
        self._plans: OrderedDict[Any, Plan] = OrderedDict()

    def plan(self, block_rows: int = 0, nonzero: np.ndarray | None = None) -> Plan:
        """Plan the packing, or return the plan made before.

        Args:
            block_rows: if not 0, the numbers of rows are rounded up so that steps form few blocks
                of one size. A block costs about as much time as this many rows of one step.
            nonzero: see :meth:`find_nonzero_starts`; None if segments may not share rows.

        Returns:
            The plan, with its indices on the device of the flags.

        Examples:
            >>> read_segments(torch.tensor([[True, False, True, False, False]])).plan().sizes
            [2, 2, 1]
        """
        key = block_rows, None if nonzero is None else nonzero.tobytes()
        return _recall(self._plans, _MOST_PLANS, key, lambda: Plan(self, block_rows, nonzero))

    def find_nonzero_starts(self, states: tuple[Tensor, ...]) -> np.ndarray:
        """Find the segments that do not start from zeros, or whose initial state has a gradient.

        Args:
            states: each ``[B, T, ...]``, on the CPU, read at segment starts.

        Returns:
            Bool ``[S]``, in the order of the batch.

        Examples:
            >>> segments = read_segments(torch.tensor([[True, False, True, False]]))
            >>> segments.find_nonzero_starts((torch.tensor([[[2.0], [7.0], [0.0], [7.0]]]),))
            array([ True, False])
        """
        if torch.is_grad_enabled() and any(state.requires_grad for state in states):
            return np.ones(len(self.starts), dtype=bool)
        index = torch.from_numpy(self.starts)
        taken = [_take(state.detach(), index).flatten(1).numpy().any(1) for state in states]
        return np.logical_or.reduce(taken)


_read: OrderedDict[Any, Segments] = OrderedDict()
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    # A child process has no other thread that could release a lock held at the fork.
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


def read_segments(is_init: Tensor) -> Segments:
    """Find the segments of a batch, or return those found before for equal flags.

    Flags are compared by content, since losses pass clones and views: all layers, all modules and
    both passes of a training step share segments and plans. Reading synchronizes with the device.

    Args:
        is_init: bool ``[B, T]``, True where a segment starts; the first column counts as True.

    Examples:
        >>> read_segments(torch.tensor([[True, False, True, False, False]])).lengths
        array([2, 3])
    """
    flags = is_init.numpy(force=True)
    key = flags.shape, flags.tobytes(), is_init.device
    return _recall(_read, _MOST_BATCHES, key, lambda: Segments(flags, is_init.device))


def _recall(kept: OrderedDict[Any, Any], most: int, key: Any, make: Callable[[], Any]) -> Any:
    """Return the value kept under a key, or make it; the least recently used one is dropped."""
    with _lock:
        found = kept.get(key)
        if found is not None:
            kept.move_to_end(key)
            return found
    # Indices made during evaluation in inference mode must serve the training that follows.
    with torch.inference_mode(False):
        made = make()
    with _lock:
        kept[key] = made
        while len(kept) > most:
            kept.popitem(last=False)
    return made


def _to(index: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(index.astype(np.int64)).to(device)
