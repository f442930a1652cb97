"""From ``is_init`` flags to segments, and from segments to packed rows without resets.

A segment is a maximal run of time steps of one batch row with no ``is_init`` after its first step.
Segments do not depend on each other, so they need not run one after the other: sorted by falling
length and laid side by side, a ``[8, 1024]`` batch of short episodes becomes some 60 steps of some
800 rows or fewer. Step ``t`` contains the segments longer than ``t``. Each segment has one row in
every step, so neither a value nor a NaN passes from one segment to another.
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

# Batches whose segments are kept, and plans for each.
_MOST_BATCHES = 16
_MOST_PLANS = 4
_MOST_BLOCK_CANDIDATES = 48


class Plan:
    """The position of every time step of a batch ``[B, T]`` in time-major packed rows ``[N, F]``.

    Args:
        segments: of the batch.
        block_rows: see :meth:`Segments.plan`.

    Attributes:
        shape: ``(B, T)``.
        sizes: number of rows of every packed step, never growing.
        blocks: ``(steps, rows)`` of runs of packed steps with the same number of rows.
        source: ``[N]`` long, the flat position ``b * T + t`` that each row is copied from.
        position: ``[B * T]`` long, the row of each flat position.
        padding: long, the rows that only fill blocks; they repeat the last step of a segment.
        starts: ``[S]`` long, flat positions of the first steps of segments, in the order of rows.
        is_dense: whether no batch row is cut, so that packed rows are those of the batch.
    """

    def __init__(self, segments: Segments, block_rows: int) -> None:
        order = np.argsort(-segments.lengths, kind="stable")
        starts = segments.starts[order]
        lengths = segments.lengths[order]
        sizes = _rows_per_step(lengths)
        if block_rows:
            sizes = _round_to_blocks(sizes, block_rows)
        step = np.repeat(np.arange(len(sizes)), sizes)
        row = np.arange(len(step)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        is_padding = step >= lengths[row]
        source = starts[row] + np.minimum(step, lengths[row] - 1)
        position = np.empty(lengths.sum(), dtype=np.int64)
        position[source[~is_padding]] = np.flatnonzero(~is_padding)
        device = segments.device
        self.shape = segments.shape
        self.is_dense = segments.are_rows
        self.sizes: list[int] = sizes.tolist()
        self.source = _to(source, device)
        self.position = _to(position, device)
        self.padding = _to(np.flatnonzero(is_padding), device)
        self.starts = _to(starts, device)

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
        """Return the entries of ``state [B, T, ...]`` at segment starts, ``[S, ...]``."""
        if self.is_dense:
            return state[:, 0]
        steps = state.shape[1]
        if state.stride(0) == steps * state.stride(1):
            return state.flatten(0, 1).index_select(0, self.starts)
        # Flattening would copy the whole state.
        return state[self.starts // steps, self.starts % steps]


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

    def plan(self, block_rows: int = 0) -> Plan:
        """Plan the packing, or return the plan made before.

        Args:
            block_rows: if not 0, the numbers of rows are rounded up so that steps form few blocks
                of one size. A block costs about as much time as this many rows of one step.

        Returns:
            The plan, with its indices on the device of the flags.

        Examples:
            >>> read_segments(torch.tensor([[True, False, True, False, False]])).plan().sizes
            [2, 2, 1]
        """
        return _recall(self._plans, _MOST_PLANS, block_rows, lambda: Plan(self, block_rows))


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


def _rows_per_step(lengths: np.ndarray) -> np.ndarray:
    """Count the segments longer than ``t`` for every ``t``; ``lengths`` fall."""
    return len(lengths) - np.searchsorted(lengths[::-1], np.arange(lengths[0]), side="right")


def _round_to_blocks(sizes: np.ndarray, block_rows: int) -> np.ndarray:
    """Round sizes up to few values, until one more block would cost more than it saves.

    Dynamic programming over the steps at which the size falls: ``best[j]`` is the least cost of all
    steps before candidate ``j`` if a block ends there.
    """
    falls = np.flatnonzero(np.diff(sizes)) + 1
    if len(falls) > _MOST_BLOCK_CANDIDATES:
        # Candidates with equal shares of all rows between them.
        share = np.searchsorted(
            np.cumsum(sizes)[falls - 1],
            np.linspace(0, sizes.sum(), _MOST_BLOCK_CANDIDATES, endpoint=False)[1:],
        )
        falls = falls[np.unique(np.minimum(share, len(falls) - 1))]
    cuts = np.concatenate([[0], falls, [len(sizes)]])
    best = np.zeros(len(cuts))
    choice = np.zeros(len(cuts), dtype=np.int64)
    for j in range(1, len(cuts)):
        cost = best[:j] + block_rows + (cuts[j] - cuts[:j]) * sizes[cuts[:j]]
        choice[j] = int(cost.argmin())
        best[j] = cost[choice[j]]
    rounded = np.empty_like(sizes)
    j = len(cuts) - 1
    while j:
        i = choice[j]
        rounded[cuts[i] : cuts[j]] = sizes[cuts[i]]
        j = i
    return rounded


def _to(index: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(index.astype(np.int64)).to(device)
