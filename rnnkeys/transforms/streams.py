"""Episodes that arrive in pieces: which steps belong to one episode, and which of them wait."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from ..checks import (
    find_done_problems,
    find_init_problems,
    find_mask_problems,
    find_tensor_problems,
    raise_first,
)
from ..keys import MASK_KEY, TRAJECTORY_KEY, as_tuple

# After so many batches that do not continue it, an episode counts as over: its actor is gone.
_PATIENCE = 100


class Piece(NamedTuple):
    """Consecutive steps of one episode inside one row of a batch.

    Attributes:
        stream: key of the episode from batch to batch: ``("trajectory", id)`` or ``("row", b)``.
        steps: positions in the flattened batch, int64 ``[n]``.
        is_start: whether an episode starts at the first of them.
        is_end: whether the episode ends at the last of them.
    """

    stream: tuple[str, int]
    steps: Tensor
    is_start: bool
    is_end: bool


def find_pieces(rows: TensorDictBase, init_key: NestedKey) -> list[Piece]:
    """Split the rows of a batch at the ends and starts of episodes and trajectories.

    Args:
        rows: ``[B, T]`` as a collector returns it.
        init_key: key of the ``is_init`` flags.

    Returns:
        The pieces in the order of the rows; steps at padding are left out.

    Raises:
        KeyError: if there is neither ``done`` nor a flag.
        TypeError: if ``done``, a flag or the mask is not bool.
        ValueError: if the shape of one of them is wrong.

    Examples:
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([[[False], [True], [False]]])
        >>> flags = torch.tensor([[[True], [False], [True]]])
        >>> rows = TensorDict({"is_init": flags, "next": {"done": done}}, [1, 3])
        >>> [(piece.steps.tolist(), piece.is_end) for piece in find_pieces(rows, "is_init")]
        [([0, 1], True), ([2], False)]
    """
    raise_first(find_tensor_problems(rows, [init_key, MASK_KEY, TRAJECTORY_KEY]))
    ends, starts = _read_ends_and_starts(rows, init_key)
    raise_first(find_mask_problems(rows, "Windows"))
    mask = rows.get(MASK_KEY, None)
    mask = torch.ones_like(ends) if mask is None else mask.reshape(rows.shape).cpu()
    ids = rows.get(TRAJECTORY_KEY, None)
    has_ids = ids is not None and ids.numel() == ends.numel()
    if ids is None or not has_ids:
        ids = torch.zeros_like(ends, dtype=torch.long)
    ids = ids.reshape(rows.shape).cpu()
    pieces = []
    for b in range(rows.shape[0]):
        steps = mask[b].nonzero().squeeze(-1)
        row = (ends[b, steps], starts[b, steps], ids[b, steps])
        for first, last, is_start, is_end in _split_row(*row, has_ids):
            stream = ("trajectory", int(row[2][first])) if has_ids else ("row", b)
            position = b * rows.shape[1] + steps[first:last]
            pieces.append(Piece(stream, position, is_start, is_end))
    return pieces


def _split_row(
    ends: Tensor, starts: Tensor, ids: Tensor, has_ids: bool
) -> Iterator[tuple[int, int, bool, bool]]:
    """Yield the first step of each piece, the one after its last, and whether it starts and ends.

    A flag ends the episode before it in its row, unless trajectory ids show that rows are mixed.
    """
    if not len(ends):
        return
    other = torch.cat([torch.ones_like(ends[:1]), ids[1:] != ids[:-1]])
    follows_end = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    is_start = starts | (follows_end & ~other)
    cuts = is_start | other
    bounds = [*cuts.nonzero().squeeze(-1).tolist(), len(ends)]
    for first, last in zip(bounds, bounds[1:], strict=False):
        is_end = bool(ends[last - 1])
        if not has_ids and last < len(ends):
            is_end = True
        yield first, last, bool(is_start[first]), is_end


def _read_ends_and_starts(rows: TensorDictBase, init_key: NestedKey) -> tuple[Tensor, Tensor]:
    done_key = _find_done_key(rows, init_key)
    flags = rows.get(init_key, None)
    if done_key is None and flags is None:
        raise KeyError(
            "Windows are cut where episodes end, and the batch has neither ('next', 'done') "
            f"nor the init key {init_key!r}. Append InitTracker() to the environment, or pass "
            "init_key=."
        )
    neither = torch.zeros(rows.shape, dtype=torch.bool)
    ends = starts = neither
    if done_key is not None:
        raise_first(find_tensor_problems(rows, [done_key]))
        raise_first(find_done_problems(rows, done_key))
        ends = rows.get(done_key).flatten(2).any(-1).cpu()
    if flags is not None:
        raise_first(find_init_problems(rows, init_key))
        starts = flags.flatten(2).any(-1).cpu()
    return ends, starts


def _find_done_key(rows: TensorDictBase, init_key: NestedKey) -> tuple[str, ...] | None:
    """Return the key of the environment's ``done``, or else of that of the flags' group."""
    for key in (("next", "done"), ("next", *as_tuple(init_key)[:-1], "done")):
        if rows.get(key, None) is not None:
            return key
    return None


@dataclass
class Stream:
    """An episode that is not over, as far as it has arrived.

    Attributes:
        episode: its number, a random one, which no other process or run draws again.
        steps: positions of the steps that wait, and of those that arrive, each int64 ``[n]``.
        first: number of the first of them in the episode.
        covered: how many of them are in a window already.
        idle: number of batches since its last step arrived.
        is_over: whether no more steps can arrive.
    """

    episode: int = field(default_factory=lambda: secrets.randbits(63))
    steps: tuple[Tensor, ...] = ()
    first: int = 0
    covered: int = 0
    idle: int = 0
    is_over: bool = False

    @property
    def count(self) -> int:
        """Number of steps."""
        return sum(map(len, self.steps))


def continue_streams(
    waiting: dict[tuple[str, int], Stream], pieces: list[Piece]
) -> list[tuple[tuple[str, int], Stream]]:
    """Append the pieces of a batch to the episodes that they continue.

    Args:
        waiting: open episodes; they stay as they are.
        pieces: of the batch.

    Returns:
        All episodes, those that are over first.

    Raises:
        ValueError: if two open episodes of the batch have one trajectory id.
    """
    is_over: list[tuple[tuple[str, int], Stream]] = []
    is_open = {key: replace(one, idle=one.idle + 1) for key, one in waiting.items()}

    def end(key: tuple[str, int]) -> None:
        is_over.append((key, replace(is_open.pop(key), is_over=True)))

    for key, steps, is_start, is_end in pieces:
        if is_start and key in is_open:
            if not is_open[key].idle:
                raise _same_id_twice(key)
            end(key)
        one = is_open.pop(key, None) or Stream()
        is_open[key] = replace(one, steps=(*one.steps, steps), idle=0)
        if is_end:
            end(key)
    for key in [key for key, one in is_open.items() if one.idle > _PATIENCE]:
        end(key)
    return [*is_over, *is_open.items()]


def _same_id_twice(key: tuple[str, int]) -> ValueError:
    return ValueError(
        f"Two trajectories of this batch have the id {key[1]} at {TRAJECTORY_KEY!r}: the ids of "
        "two collectors. Make one Windows for each collector, or give trajectories ids of their "
        "own."
    )


@dataclass(frozen=True)
class Cutter:
    """Find windows of one length in the steps of an episode.

    Args:
        length: steps in a window.
        period: steps between the first steps of two windows.
        residual: as of :class:`rnnkeys.transforms.Windows`.
    """

    length: int
    period: int
    residual: str

    def find_windows(self, stream: Stream) -> tuple[list[tuple[int, int]], Stream]:
        """Find the windows that are complete.

        Returns:
            The first step of each window and the step after its last, counted in the steps of the
            stream; and the stream without the steps that no later window needs.
        """
        spans, keep, covered = self._find_spans(stream.count, stream.covered, stream.is_over)
        steps = (torch.cat(stream.steps)[keep:],)
        return spans, replace(stream, steps=steps, first=stream.first + keep, covered=covered)

    def _find_spans(
        self, count: int, covered: int, is_over: bool
    ) -> tuple[list[tuple[int, int]], int, int]:
        """Find windows in ``count`` steps of which the first ``covered`` are in a window already.

        Returns:
            The windows; the first step to keep; and how many of the steps to keep are covered.
        """
        length = self.length
        spans = []
        start = max(covered - (length - self.period), 0) if covered else 0
        while start + length <= count:
            spans.append((start, start + length))
            covered = start + length
            start += self.period
        if is_over and covered < count:
            if self.residual == "last":
                spans.append((max(count - length, 0), count))
            elif self.residual != "drop":
                spans.append((start, count))
        keep = max(covered - length + 1, 0) if self.residual == "last" else min(start, covered)
        return spans, keep, covered - keep
