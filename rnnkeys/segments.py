"""From ``is_init`` to segments, and from segments to rows that need no resets.

A segment is a maximal run of steps of one row with no reset after its first step. Segments do not
depend on each other, so they need not run one after the other: sorted by falling length and laid
side by side, a ``[8, 1024]`` batch of short episodes becomes some 60 steps of some 800 rows that
only get fewer. Step ``t`` holds the segments longer than ``t``; each occupies the same row in every
step, so neither a value nor a NaN can pass from one to another.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAX_BLOCK_CANDIDATES = 48
_CACHE_ENTRIES = 16


class Plan:
    """Where every step of a ``[B, T]`` batch goes in flat time-major rows ``[N, F]``, and back.

    Attributes:
        sizes: rows of every step, never growing.
        blocks: ``(first step, number of steps, rows)`` of runs of steps with one size.
        source: ``[N]`` long, the flat position ``b * T + t`` that fills each row.
        position: ``[B * T]`` long, the row of each flat position.
        padding: rows that repeat a segment's last step to fill a block, or None.
        starts: ``[S]`` long, flat positions of the segments' first steps, in row order.
        is_dense: whether no row is cut, so that rows are those of the batch.
    """

    def __init__(self, is_init: np.ndarray, block_rows: int, device: torch.device) -> None:
        starts, lengths = _segments(is_init)
        order = np.argsort(-lengths, kind="stable")
        starts, lengths = starts[order], lengths[order]
        exact = _rows_per_step(lengths)
        sizes = _pad_to_blocks(exact, block_rows) if block_rows else exact
        offsets = np.cumsum(sizes) - sizes
        step = np.repeat(np.arange(len(sizes)), sizes)
        row = np.arange(len(step)) - offsets[step]
        source = starts[row] + np.minimum(step, lengths[row] - 1)
        real = step < lengths[row]
        position = np.empty(is_init.size, dtype=np.int64)
        position[source[real]] = np.flatnonzero(real)
        self.sizes: list[int] = sizes.tolist()
        self.shape = is_init.shape
        self.source = _to(source, device)
        self.position = _to(position, device)
        self.starts = _to(starts, device)
        self._start_indices = tuple(_to(i, device) for i in np.divmod(starts, is_init.shape[1]))
        self.is_dense = len(starts) == len(is_init)
        self.padding = None if real.all() else _to(np.flatnonzero(~real), device)

    @cached_property
    def blocks(self) -> list[tuple[int, int, int]]:
        """Runs of steps with one size."""
        first = [t for t, n in enumerate(self.sizes) if t == 0 or n != self.sizes[t - 1]]
        ends = [*first[1:], len(self.sizes)]
        return [(t, end - t, self.sizes[t]) for t, end in zip(first, ends, strict=True)]

    def pack(self, x: Tensor) -> Tensor:
        """Lay ``x [B, T, F]`` out in rows ``[N, F]``."""
        if self.is_dense:
            return x.transpose(0, 1).flatten(0, 1)
        return _Gather.apply(x.flatten(0, 1), self.source, self.position, None)

    def unpack(self, rows: Tensor) -> Tensor:
        """Take ``[B, T, F]`` out of rows ``[N, F]``: a view if the plan is dense."""
        if self.is_dense:
            return rows.view(*self.shape[::-1], -1).transpose(0, 1)
        flat = _Gather.apply(rows, self.position, self.source, self.padding)
        return flat.view(*self.shape, -1)

    def at_starts(self, state: Tensor) -> Tensor:
        """Take the entries ``[S, ...]`` of ``state [B, T, ...]`` at the segments' first steps."""
        return state[:, 0] if self.is_dense else state[self._start_indices]

    def put_at_starts(self, rows: Tensor) -> Tensor:
        """Put ``rows [S, ...]`` where segments start in ``[B, T, ...]``, and NaN elsewhere."""
        batch, steps = self.shape
        flat = rows.new_full((batch * steps, *rows.shape[1:]), float("nan"))
        return flat.index_copy_(0, self.starts, rows).view(batch, steps, *rows.shape[1:])


class _Gather(torch.autograd.Function):
    """Gather rows; backward gathers too: every real row is taken once, ``unused`` ones never."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, unused: Tensor | None):
        ctx.inverse, ctx.unused = inverse, unused
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        grad = grads[0].index_select(0, ctx.inverse)
        if ctx.unused is not None:
            grad.index_fill_(0, ctx.unused, 0.0)
        return grad, None, None, None


_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
_plans_lock = threading.Lock()


def plan(is_init: Tensor, block_rows: int = 0) -> Plan:
    """Plan the packing of a batch, or return the plan made before for the same marks.

    Plans are kept by content, since losses pass clones and views: all layers, all modules and both
    passes of a training step share one. Reading the marks synchronises with the device.

    Args:
        is_init: bool ``[B, T]``, True where a segment starts; the first column counts as True.
        block_rows: if not 0, step sizes are rounded up so that they form few blocks of one size,
            each of which costs about as much as this many rows of one step.

    Returns:
        The plan, with its indices on the device of ``is_init``.

    Examples:
        >>> plan(torch.tensor([[True, False, True, False, False]])).sizes
        [2, 2, 1]
    """
    marks = is_init.detach().cpu().numpy()
    key = (marks.shape, np.packbits(marks).tobytes(), block_rows, is_init.device)
    with _plans_lock:
        found = _plans.get(key)
        if found is not None:
            _plans.move_to_end(key)
            return found
    # A plan made while evaluating in inference mode must serve the training that follows.
    with torch.inference_mode(False):
        made = Plan(marks, block_rows, is_init.device)
    with _plans_lock:
        _plans[key] = made
        while len(_plans) > _CACHE_ENTRIES:
            _plans.popitem(last=False)
    return made


def _segments(is_init: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions of segment starts and the segments' lengths, in order of the batch."""
    marks = is_init.copy()
    marks[:, 0] = True
    starts = np.flatnonzero(marks)
    return starts, np.diff(starts, append=marks.size)


def _rows_per_step(lengths: np.ndarray) -> np.ndarray:
    """How many segments are longer than ``t``, for every ``t``; ``lengths`` are sorted, falling."""
    return len(lengths) - np.searchsorted(lengths[::-1], np.arange(lengths[0]), side="right")


def _pad_to_blocks(sizes: np.ndarray, block_rows: int) -> np.ndarray:
    """Round sizes up to few values, until one more block would cost more than it saves.

    Dynamic programming over the steps at which the size falls: ``best[j]`` is the least cost of all
    steps before candidate ``j`` when a block ends there.
    """
    falls = np.flatnonzero(np.diff(sizes)) + 1
    if len(falls) > _MAX_BLOCK_CANDIDATES:
        # Candidates where equal shares of all rows lie between them.
        share = np.searchsorted(
            np.cumsum(sizes)[falls - 1],
            np.linspace(0, sizes.sum(), _MAX_BLOCK_CANDIDATES, endpoint=False)[1:],
        )
        falls = falls[np.unique(np.minimum(share, len(falls) - 1))]
    cuts = np.concatenate([[0], falls, [len(sizes)]])
    best = np.zeros(len(cuts))
    choice = np.zeros(len(cuts), dtype=np.int64)
    for j in range(1, len(cuts)):
        cost = best[:j] + block_rows + (cuts[j] - cuts[:j]) * sizes[cuts[:j]]
        choice[j] = int(cost.argmin())
        best[j] = cost[choice[j]]
    padded = np.empty_like(sizes)
    j = len(cuts) - 1
    while j:
        i = choice[j]
        padded[cuts[i] : cuts[j]] = sizes[cuts[i]]
        j = i
    return padded


def _to(index: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(index.astype(np.int64)).to(device)
