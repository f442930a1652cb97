"""Where segments run: which row of which steps, decided on the host.

Segments do not depend on each other, so they may run side by side, each down a row of its own, or
one below the other in a row that clears its state in a gap between them.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

import numpy as np

_MAX_BLOCK_CANDIDATES = 48
# Rows come in multiples of this: kernels waste no registers, and rows are few and short enough.
_FULL_ROWS = 8


class Layout(NamedTuple):
    """Where segments run.

    Attributes:
        sizes: ``[steps]``, rows of every step, never growing.
        row: ``[S]``, the row of each segment.
        first: ``[S]``, the step at which each begins.
        clears: whether segments share rows, with a gap of one step or more between them.
    """

    sizes: np.ndarray
    row: np.ndarray
    first: np.ndarray
    clears: bool


def lay_out(lengths: np.ndarray, block_rows: int, carried: np.ndarray | None) -> Layout:
    """Lay segments out so that they cost least.

    Args:
        lengths: ``[S]``, of segments.
        block_rows: if not 0, steps run in blocks of one size, each of which costs about as much as
            this many rows of one step.
        carried: ``[S]``, which segments start from a state that a gap cannot make, so that they
            must be the first of their row; None where rows cannot be shared.

    Examples:
        >>> lay_out(np.array([1, 3, 2]), 0, None).sizes.tolist()
        [3, 2, 1]
        >>> lay_out(np.array([1, 2, 4]), 128, np.array([False, True, False])).sizes.tolist()
        [2, 2, 2, 2]
    """
    rows = 0 if carried is None else _rows_to_share(lengths, carried)
    if carried is None or rows >= len(lengths):
        return _own_rows(lengths, block_rows)
    steps = int(lengths.sum())
    # Where sharing may lose, it is compared before it is planned: every gap takes a step.
    own = None
    if len(lengths) - rows > block_rows:
        own = _own_rows(lengths, block_rows)
        if steps + len(lengths) - rows > _cost(own, block_rows):
            return own
    shared = _share_rows(lengths, carried, rows)
    if shared.sizes.sum() <= steps + block_rows:
        return shared
    own = own or _own_rows(lengths, block_rows)
    return shared if shared.sizes.sum() <= _cost(own, block_rows) else own


def _cost(own: Layout, block_rows: int) -> int:
    """Rows of one step that a layout costs beyond its first block's call."""
    return int(own.sizes.sum()) + np.count_nonzero(np.diff(own.sizes)) * block_rows


def _own_rows(lengths: np.ndarray, block_rows: int) -> Layout:
    """Side by side from the first step, sorted by falling length."""
    row = np.empty_like(lengths)
    order = np.argsort(-lengths, kind="stable")
    row[order] = np.arange(len(lengths))
    sizes = _rows_per_step(lengths[order])
    if block_rows:
        sizes = _pad_to_blocks(sizes, block_rows)
    return Layout(sizes, row, np.zeros_like(lengths), clears=False)


def _rows_to_share(lengths: np.ndarray, carried: np.ndarray) -> int:
    """As many rows as leave few steps beyond the longest segment's, full ones where possible."""
    rows = int(lengths.sum() + len(lengths)) // int(lengths.max())
    rows = rows // _FULL_ROWS * _FULL_ROWS if rows > _FULL_ROWS else rows
    return max(rows, int(carried.sum()))


def _share_rows(lengths: np.ndarray, carried: np.ndarray, rows: int) -> Layout:
    """In rows of one length, a gap between any two segments.

    Rows as short as may be, and longer ones where segments do not fit.
    """
    order = np.lexsort((-lengths, ~carried))
    falling = lengths[order].tolist()
    shortest = max(int(lengths.max()), -(-(sum(falling) + len(falling)) // rows) - 1)
    places, more = None, 0
    while places is None:
        places = _best_fit(falling, rows, shortest + more)
        more = 2 * more or 1
    row, first = np.empty_like(lengths), np.empty_like(lengths)
    row[order], first[order] = np.array(places).T
    return Layout(np.full((first + lengths).max(), rows), row, first, clears=True)


def _best_fit(lengths: list[int], rows: int, steps: int) -> list[tuple[int, int]] | None:
    """Row and first step of each segment, in the row that it fills best; None if one fits nowhere.

    The first ``rows`` segments begin a row each.
    """
    # What is left of rows behind a gap, least first.
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
