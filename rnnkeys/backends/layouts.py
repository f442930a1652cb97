"""The row and the first step of each segment in packed rows, as numbers on the host.

Side by side, each segment has a row of its own. End to end, segments share rows, with a gap of one
step or more between two of them: rows are then of one length, which suits kernels that are fastest
over steps of one size.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

import numpy as np

_MOST_BLOCK_CANDIDATES = 48
# Kernels are fastest with a multiple of this number of rows.
_FULL_ROWS = 8


class Layout(NamedTuple):
    """The place of every segment in packed rows.

    Attributes:
        sizes: number of rows of every packed step, never growing.
        row: ``[S]``, the row of each segment.
        step: ``[S]``, the packed step at which each segment starts.
    """

    sizes: np.ndarray
    row: np.ndarray
    step: np.ndarray


def choose_layout(lengths: np.ndarray, block_rows: int, nonzero: np.ndarray | None) -> Layout:
    """Return the layout that costs a kernel the least time.

    Args:
        lengths: ``[S]``, of segments.
        block_rows: if not 0, the numbers of rows are rounded up so that steps form few blocks of
            one size. A block costs about as much time as this many rows of one step.
        nonzero: bool ``[S]``, segments that do not start from zeros and so must be the first of
            their row; None if segments may not share rows.

    Examples:
        >>> choose_layout(np.array([1, 3, 2]), 0, None).sizes.tolist()
        [3, 2, 1]
        >>> choose_layout(np.array([1, 2, 4]), 128, np.array([False, True, False])).sizes.tolist()
        [2, 2, 2, 2]
    """
    apart = lay_side_by_side(lengths, block_rows)
    if nonzero is None:
        return apart
    cost = apart.sizes.sum() + np.count_nonzero(np.diff(apart.sizes)) * block_rows
    rows = _count_shared_rows(lengths, nonzero)
    least = lengths.sum() + len(lengths) - rows
    if rows >= len(lengths) or least >= cost:
        return apart
    shared = lay_end_to_end(lengths, nonzero, rows)
    return shared if shared.sizes.sum() < cost else apart


def lay_side_by_side(lengths: np.ndarray, block_rows: int) -> Layout:
    """Start all segments at the first step, sorted by falling length."""
    row = np.empty_like(lengths)
    order = np.argsort(-lengths, kind="stable")
    row[order] = np.arange(len(lengths))
    sizes = _rows_per_step(lengths[order])
    if block_rows:
        sizes = _round_to_blocks(sizes, block_rows)
    return Layout(sizes, row, np.zeros_like(lengths))


def lay_end_to_end(lengths: np.ndarray, nonzero: np.ndarray, rows: int) -> Layout:
    """Fill ``rows`` rows of one length, the shortest in which the segments are found to fit."""
    order = np.lexsort((-lengths, ~nonzero))
    falling = lengths[order].tolist()
    steps = max(int(lengths.max()), -(-(sum(falling) + len(falling)) // rows) - 1)
    places = _fit(falling, rows, steps)
    more = 1
    while places is None:
        places = _fit(falling, rows, steps + more)
        more *= 2
    row, step = np.empty_like(lengths), np.empty_like(lengths)
    row[order], step[order] = np.array(places).T
    return Layout(np.full((step + lengths).max(), rows), row, step)


def _count_shared_rows(lengths: np.ndarray, nonzero: np.ndarray) -> int:
    """Return a number of rows that are about as long as the longest segment."""
    rows = int(lengths.sum() + len(lengths)) // int(lengths.max())
    rows = rows // _FULL_ROWS * _FULL_ROWS if rows > _FULL_ROWS else rows
    return max(rows, int(nonzero.sum()))


def _fit(lengths: list[int], rows: int, steps: int) -> list[tuple[int, int]] | None:
    """Return row and first step of each segment, or None if one fits in no row.

    The first ``rows`` segments start a row each; every other one goes where it leaves the least
    room.
    """
    # The steps that are left after a gap in each row, least first.
    left = sorted((steps - length - 1, row) for row, length in enumerate(lengths[:rows]))
    places = [(row, 0) for row in range(rows)]
    for length in lengths[rows:]:
        k = bisect.bisect_left(left, (length,))
        if k == len(left):
            return None
        free, row = left.pop(k)
        places.append((row, steps - free))
        bisect.insort(left, (free - length - 1, row))
    return places


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
