"""Episodes cut into windows of one length, with the state that enters the first step of each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor

from ..keys import MASK_KEY, as_tuple, next_key
from ..sequences.segment_starts import check_mask
from .batches import BatchTransform

RESIDUALS = ("drop", "last", "null", "repeat", "overlap")
EPISODE_KEY, FIRST_KEY = ("window", "episode"), ("window", "first")
_STATE_PREFIX = "recurrent_state"
_ENDS = ("done", "terminated")
_LOST_EPISODES = 10


class _Clock(NamedTuple):
    """Where a row stands: which episode, which step of it is next, and whether it is over."""

    episode: int = 0
    step: int = 0
    over: bool = True


def sequence_mask(lengths: Tensor, max_len: int | None = None) -> Tensor:
    """Return which steps of padded sequences are real.

    Args:
        lengths: integers ``[*]``.
        max_len: ``T``; by default the longest length.

    Returns:
        Bool ``[*, T]``, True before each length.

    Raises:
        ValueError: if a length is negative or more than ``max_len``.

    Examples:
        >>> sequence_mask(torch.tensor([1, 3]))
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    longest = int(lengths.max()) if lengths.numel() else 0
    if max_len is None:
        max_len = longest
    if longest > max_len or (lengths < 0).any():
        raise ValueError(
            f"lengths must be between 0 and max_len={max_len}. Got {lengths.tolist()}: raise "
            "max_len, or clamp the lengths."
        )
    return torch.arange(max_len, device=lengths.device) < lengths.unsqueeze(-1)


class Windows(BatchTransform):
    """Cuts episodes into windows ``[N, L]``; remainders wait for the batch that goes on with them.

    As a transform of a replay buffer of windows it cuts what comes in, ``[B, T]`` or ``[T]`` as a
    collector gives it, and stores one state for each window: memory falls by the window's length.
    A sampled batch ``[N, L]`` has that state at every step, without a copy (stride 0). As a
    collector's ``postproc``, or called, it returns such a batch at once; it may be empty.

    Rows are streams: row ``b`` of a batch goes on with row ``b`` of the one before it. Every step
    stands in a window whose ``("collector", "mask")`` tells real steps from fillers; losses leave
    masked steps out. What happens to the residual of an episode of ``T`` steps:

    - ``"drop"``: it is left out.
    - ``"last"``: the last ``L`` steps make a window that overlaps the one before. An episode
      shorter than ``L`` is filled with null steps.
    - ``"null"``: null steps fill its window: zeros, with ``done``.
    - ``"repeat"``: its last step is repeated.
    - ``"overlap"``: windows start every ``period`` steps until one covers the episode's end; null
      steps fill that one.

    ``("window", "episode")`` and ``("window", "first")`` number a window's episode and its first
    step, for ``RefreshStates``.

    Args:
        length: ``L``.
        residual: what becomes of the steps that fill no window.
        period: of ``"overlap"``: from 1 to ``L``. R2D2 takes ``L = 80``, ``period = 40``.
        state_keys: keys of the states; by default those named ``"recurrent_state..."``, as in the
            modules' default keys.
        keep_states: keep the states of every step instead (for ``state_staleness``).
        init_key: key of the episodes' first steps.

    Raises:
        ValueError: if arguments do not fit each other.

    Warns:
        UserWarning: if ``"drop"`` has left nothing of the first ten episodes.

    Examples:
        >>> batch = TensorDict({"x": torch.arange(5), "is_init": torch.zeros(5, 1).bool()}, [5])
        >>> batch["next", "done"] = torch.tensor([[0], [0], [0], [0], [1]]).bool()
        >>> Windows(3, "last")(batch)["x"]
        tensor([[0, 1, 2],
                [2, 3, 4]])
    """

    _purpose = (
        "it cuts episodes. Append it to a replay buffer, pass it as the collector's postproc, or "
        "call it on a batch."
    )

    def __init__(
        self,
        length: int,
        residual: str = "last",
        period: int | None = None,
        *,
        state_keys: Sequence[NestedKey] | None = None,
        keep_states: bool = False,
        init_key: NestedKey = "is_init",
    ) -> None:
        super().__init__()
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"length must be a positive int. Got {length!r}.")
        if residual not in RESIDUALS:
            names = ", ".join(map(repr, RESIDUALS))
            raise ValueError(f"residual must be one of {names}. Got {residual!r}.")
        if (residual == "overlap") != (period is not None):
            raise ValueError(
                f"period goes with residual='overlap', and only with it. Got residual={residual!r} "
                f"and period={period}."
            )
        if period is not None and not 1 <= period <= length:
            raise ValueError(f"period must be from 1 to length={length}. Got {period}.")
        self.length, self.residual = length, residual
        self.period = length if period is None else period
        self.state_keys = None if state_keys is None else [unravel_key(k) for k in state_keys]
        self.keep_states = keep_states
        self.init_key = unravel_key(init_key)
        self._episodes = 0
        # Episodes that ended before any window was made; None once that is settled.
        self._lost: int | None = 0
        self.clear()

    def get_extra_state(self) -> dict[str, int]:
        """How many episodes were numbered: those of a buffer that is loaded go on from there."""
        return {"episodes": self._episodes}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Go on numbering behind the episodes of a checkpoint."""
        self._episodes = state["episodes"]

    def clear(self) -> None:
        """Forget the steps that wait: the next batch starts new streams."""
        # For each row: the steps that wait, and how many of them stand in a window already.
        self._waiting: list[tuple[TensorDictBase, int]] | None = None
        self._clocks: dict[int, _Clock] = {}

    @property
    def waiting(self) -> int:
        """How many steps wait for the batch that goes on with them."""
        return sum(steps.shape[0] - covered for steps, covered in self._waiting or [])

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Cut a batch into windows; inside a replay buffer, lay a sample of windows out.

        Args:
            tensordict: ``[B, T]`` or ``[T]``; a sample of stored windows, ``[N]``.

        Returns:
            ``[N, L]``, with the state that enters the first step at every step.

        Raises:
            KeyError: if a batch has neither ``("next", "done")`` nor marks.
            ValueError: if the number of rows has changed.
        """
        if self._in_buffer:
            return self.lay_out(tensordict)
        return self.lay_out(self.cut(tensordict))

    def _inv_call(self, tensordict: TensorDictBase) -> Any:
        stored = self.cut(tensordict)
        # A replay buffer takes None for nothing to store.
        return stored if stored.shape[0] else None

    def flush(self) -> TensorDictBase | None:
        """Return windows of the steps that wait, as if their episodes had ended; None without any.

        They are windows as :meth:`cut` returns them: a buffer that has this transform would cut
        them again.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return None
        flat = _join([steps for steps, _ in waiting])
        spans: list[tuple[int, int]] = []
        first = 0
        for steps, covered in waiting:
            spans += self._cut_episode(first, steps.shape[0], covered, True)[0]
            first += steps.shape[0]
        return self._gather(flat, spans)

    def cut(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Cut a batch into windows as they are stored.

        Args:
            tensordict: ``[B, T]`` or ``[T]``.

        Returns:
            Batch size ``[N]``: states ``[N, ...]``, everything else ``[N, L, ...]``.
        """
        rows = tensordict.unsqueeze(0) if tensordict.ndim == 1 else tensordict
        if rows.ndim != 2:
            raise ValueError(
                f"Windows are cut from a batch [B, T] or [T]. Got batch size "
                f"{list(tensordict.batch_size)}: reshape it."
            )
        streams = self._streams(rows)
        flat = _join([steps for steps, _, _ in streams])
        spans, waiting, first = [], [], 0
        for steps, covered, ends in streams:
            episode = 0
            for end in ends:
                new, *_ = self._cut_episode(first + episode, end - episode, covered, True)
                spans += new
                episode, covered = end, 0
            rest = steps.shape[0] - episode
            new, keep, covered = self._cut_episode(first + episode, rest, covered, False)
            spans += new
            waiting.append((steps[episode + keep :].clone(), covered))
            first += steps.shape[0]
        self._waiting = waiting
        self._warn_if_all_is_dropped(len(spans), sum(len(ends) for *_, ends in streams))
        return self._gather(flat, spans)

    def _warn_if_all_is_dropped(self, windows: int, episodes: int) -> None:
        if self._lost is None or self.residual != "drop" or windows:
            self._lost = None
            return
        self._lost += episodes
        if self._lost >= _LOST_EPISODES:
            warnings.warn(
                f"{self._lost} episodes have ended and none had length={self.length} steps, so "
                "that residual='drop' has left nothing. Shorten the windows, or fill them with "
                "residual='last' or 'null'.",
                stacklevel=3,
            )
            self._lost = None

    def _streams(self, rows: TensorDictBase) -> list[tuple[TensorDictBase, int, list[int]]]:
        """Return each row with what waited for it: steps, how many are covered, episodes' ends."""
        ends, starts = self._read_ends(rows)
        waiting = self._waiting
        if waiting is not None and len(waiting) != rows.shape[0]:
            raise ValueError(
                f"The batch has {rows.shape[0]} rows and the one before had {len(waiting)}: rows "
                "are streams that go on from batch to batch. Call clear() where new ones start."
            )
        mask = rows.get(MASK_KEY, None)
        check_mask(mask)
        streams = []
        for b, row in enumerate(rows.unbind(0)):
            real = None if mask is None else mask[b].reshape(-1)
            row_ends, row_starts = ends[b], starts[b]
            if real is not None:
                row, row_ends, row_starts = row[real], row_ends[real], row_starts[real]
            row_ends = row_ends.clone()
            row_ends[:-1] |= row_starts[1:]
            found = (row_ends.nonzero().squeeze(-1) + 1).tolist()
            row = self._number(b, row, row_ends, row_starts)
            covered = 0
            if waiting is not None and waiting[b][0].shape[0]:
                before, covered = waiting[b]
                number = before.shape[0]
                found = [end + number for end in found]
                if row_starts[:1].any():
                    found.insert(0, number)
                row = _join([before, row.select(*before.keys(True, True))])
            streams.append((row, covered, found))
        return streams

    def _number(self, b: int, row: TensorDictBase, ends: Tensor, starts: Tensor) -> TensorDictBase:
        """Number the episodes and steps of a row, on from where its clock stands."""
        clock = self._clocks.setdefault(b, _Clock())
        row = row.copy()
        episodes, steps = [], []
        for begins, is_end in zip(starts.tolist(), ends.tolist(), strict=True):
            if begins or clock.over:
                self._episodes += 1
                clock = _Clock(self._episodes, 0)
            episodes.append(clock.episode)
            steps.append(clock.step)
            clock = clock._replace(step=clock.step + 1, over=is_end)
        self._clocks[b] = clock
        numbers = torch.tensor([episodes, steps], dtype=torch.long).to(row.device or "cpu")
        row.set(EPISODE_KEY, numbers[0])
        row.set(FIRST_KEY, numbers[1])
        return row

    def _read_ends(self, rows: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Return bool ``[B, T]`` twice: where episodes end, and where they start."""
        done, marks = rows.get(("next", "done"), None), rows.get(self.init_key, None)
        if done is None and marks is None:
            raise KeyError(
                "Windows need to know where episodes end: there is neither ('next', 'done') nor "
                f"the init key {self.init_key!r}. Append InitTracker() to the environment, or pass "
                "init_key=."
            )
        no = torch.zeros(rows.batch_size, dtype=torch.bool)
        found = (
            no if entry is None else entry.reshape(*rows.batch_size, -1).any(-1).cpu()
            for entry in (done, marks)
        )
        ends, starts = found
        return ends, starts

    def _cut_episode(
        self, first: int, number: int, covered: int, ended: bool
    ) -> tuple[list[tuple[int, int]], int, int]:
        """Cut an episode of which ``number`` steps are here and ``covered`` stand in a window.

        Returns:
            Spans (shifted by ``first``), the first step to keep, and how many of those kept are
            covered.
        """
        length, spans = self.length, []
        start = max(covered - (length - self.period), 0) if covered else 0
        while start + length <= number:
            spans.append((start, start + length))
            covered = start + length
            start += self.period
        if ended and covered < number:
            if self.residual == "last":
                spans.append((max(number - length, 0), number))
            elif self.residual != "drop":
                spans.append((start, number))
        keep = max(covered - length + 1, 0) if self.residual == "last" else min(start, covered)
        return [(first + a, first + b) for a, b in spans], keep, covered - keep

    def _gather(self, flat: TensorDictBase, spans: list[tuple[int, int]]) -> TensorDictBase:
        bounds = torch.tensor(spans, dtype=torch.long).reshape(-1, 2)
        steps = bounds[:, :1] + torch.arange(self.length)
        mask = steps < bounds[:, 1:]
        steps = torch.minimum(steps, bounds[:, 1:] - 1)
        once = {EPISODE_KEY, FIRST_KEY}
        once |= set() if self.keep_states else self._states(flat)
        device = next(iter(flat.values(True, True))).device
        steps, mask = steps.to(device), mask.to(device)
        windows = TensorDict({}, batch_size=[len(spans)], device=flat.device)
        for key, value in flat.items(True, True):
            if as_tuple(key) in once:
                windows.set(key, value[steps[:, 0]])
            else:
                windows.set(key, self._fill(as_tuple(key), value[steps], mask))
        return windows.set(MASK_KEY, mask)

    def _fill(self, key: tuple[str, ...], value: Tensor, mask: Tensor) -> Tensor:
        """Make null steps of what is masked."""
        if self.residual == "repeat" or not isinstance(value, Tensor):
            return value
        filler = key[0] == "next" and key[-1] in _ENDS
        return value.masked_fill(~mask.reshape(*mask.shape, *[1] * (value.ndim - 2)), filler)

    def _states(self, tensordict: TensorDictBase) -> set[tuple[str, ...]]:
        """Return the keys of states, those of the next view included, that are there."""
        if self.state_keys is not None:
            keys = {as_tuple(k) for k in self.state_keys}
            return keys | {next_key(k) for k in keys}
        every = map(as_tuple, tensordict.keys(True, True))
        return {key for key in every if key[-1].startswith(_STATE_PREFIX)}

    def lay_out(self, stored: TensorDictBase) -> TensorDictBase:
        """Return windows ``[N, L]`` from windows as they are stored, without a copy.

        The state of the first step stands at every step.
        """
        mask = stored.get(MASK_KEY, None)
        if mask is None:
            raise KeyError(
                f"There is no {MASK_KEY!r}: these are no windows. A buffer that samples windows "
                "has Windows(...) as its transform from the start."
            )
        # In a sample of stored windows the batch is theirs; in one that was laid out it is [N, L].
        if stored.ndim > 1:
            return stored
        states = set() if self.keep_states else self._states(stored)
        shape = mask.shape
        windows = TensorDict({}, batch_size=shape, device=stored.device)
        for key, value in stored.items(True, True):
            # A replay buffer adds one index for each window.
            if as_tuple(key) in states or value.ndim < 2:
                value = value.unsqueeze(1).expand(*shape, *value.shape[1:])
            windows.set(key, value)
        return windows


def _join(parts: list[Any]) -> TensorDictBase:
    """Lay streams end to end."""
    return cast(TensorDictBase, torch.cat(parts))  # its types know nothing of TensorDicts
