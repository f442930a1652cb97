"""Windows: episodes cut into sequences of one length, each with the state that it starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from tensordict import (
    NonTensorStack,
    TensorDict,
    TensorDictBase,
    UnbatchedTensor,
    unravel_key,
)
from tensordict.utils import NestedKey
from torch import Tensor

from ..checks import (
    as_int,
    can_read_values,
    check_choice,
    find_meta_problems,
    find_tensor_problems,
    find_type_problems,
    raise_first,
    warn_caller,
)
from ..keys import MASK_KEY, as_key, as_tuple, next_key
from ..sequences import Spans, append_dims, cut_windows
from ..sequences.check_sequences import find_state_problems
from ..sequences.continuity import find_continuity_problems
from .base import SequenceTransform
from .streams import Cutter, Stream, continue_streams, find_pieces

RESIDUALS = ("drop", "last", "null", "repeat", "overlap")
EPISODE_KEY, FIRST_KEY = ("window", "episode"), ("window", "first")
_STATE_PREFIX = "recurrent_state"
_DONE_NAMES = ("done", "terminated")
_LOST_EPISODES = 10
_MAX_LENGTH = 2**20
_STREAM_REMEDY = (
    " Windows joins the steps of a trajectory id, or without ids a row with the same row of the "
    "batch before: give each collector a Windows of its own, and call clear() where episodes were "
    "interrupted between two batches."
)


class Windows(SequenceTransform):
    """Cut episodes into windows ``[N, L]``; steps that fill no window wait for the next batch.

    As a transform of a replay buffer it cuts the batches ``[B, T]`` or ``[T]`` of a collector, and
    stores one recurrent state for each window, so that states take ``1 / L`` of the memory. A
    sampled batch ``[N, L]`` has that state at every step, without a copy (stride 0). As a
    ``postproc`` of a collector, or called, it returns such a batch at once; it may be empty.

    An episode continues from batch to batch. Where batches have trajectory ids
    (``("collector", "traj_ids")``, as collectors write them), steps of one trajectory belong
    together, whichever row or batch they come in. Without ids, row ``b`` of a batch continues row
    ``b`` of the batch before.

    Windows have a valid mask ``("collector", "mask")``, False at padding, which losses leave out.
    If an episode of ``T`` steps does not fill its last window, ``residual`` decides:

    - ``"drop"``: the remaining steps are left out.
    - ``"last"``: the last ``L`` steps are a window, which overlaps the one before. An episode
      shorter than ``L`` is padded with null steps.
    - ``"null"``: null steps pad the window: zeros, with ``done`` and ``terminated``.
    - ``"repeat"``: the last step of the episode is repeated.
    - ``"overlap"``: windows start every ``period`` steps until one reaches the end of the episode;
      null steps pad that one.

    ``("window", "episode")`` is a number of the episode, drawn at random so that no two episodes of
    any process or run share it. ``("window", "first")`` is the number of the window's first step in
    the episode. :class:`rnnkeys.transforms.RefreshStates` reads both. Entries that are not tensors
    are kept; at padding they repeat the last step.

    Args:
        length: ``L``, in steps, at most 2 ** 20.
        residual: treatment of the steps that fill no window.
        period: of ``"overlap"``, from 1 to ``L``. R2D2 has ``L = 80``, ``period = 40``.
        state_keys: keys of the recurrent states; by default all whose name starts with
            ``"recurrent_state"``, as the modules' default keys do.
        keep_states: whether to keep the states of every step, for
            :func:`rnnkeys.transforms.state_staleness`.
        init_key: key of the ``is_init`` flags.

    Raises:
        ValueError: if arguments do not fit each other.

    Warns:
        UserWarning: if ``"drop"`` leaves nothing of the first ten episodes.

    Examples:
        >>> batch = TensorDict({"x": torch.arange(5), "is_init": torch.zeros(5, 1).bool()}, [5])
        >>> batch["next", "done"] = torch.tensor([[0], [0], [0], [0], [1]]).bool()
        >>> Windows(3, "last")(batch)["x"]
        tensor([[0, 1, 2],
                [2, 3, 4]])
    """

    usage = "Append it to a replay buffer, pass it as postproc= of a collector, or call it."

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
        self.length = as_int("length", length, maximum=_MAX_LENGTH)
        check_choice("residual", residual, RESIDUALS)
        if (residual == "overlap") != (period is not None):
            raise ValueError(
                f"period belongs to residual='overlap'. Got residual={residual!r} and "
                f"period={period}."
            )
        self.residual = residual
        self.period = self.length if period is None else as_int("period", period)
        if self.period > self.length:
            raise ValueError(f"period must be from 1 to length={length}. Got {period}.")
        if isinstance(state_keys, str) or not isinstance(state_keys, (Sequence, type(None))):
            state_keys = [state_keys]
        self.state_keys = (
            None if state_keys is None else [as_key("state_keys", key) for key in state_keys]
        )
        self.keep_states = keep_states
        self.init_key = as_key("init_key", init_key)
        self._cutter = Cutter(self.length, self.period, residual)
        # Episodes that have ended without a window; None once a window was made.
        self._lost_episodes: int | None = 0
        self.clear()

    def clear(self) -> None:
        """Drop the steps that wait: the next batch starts new episodes."""
        self._streams: dict[tuple[str, int], Stream] = {}
        self._waiting: TensorDictBase | None = None
        self._num_rows: int | None = None

    @property
    def waiting(self) -> int:
        """Number of steps that wait for the batch that continues their episodes."""
        return sum(one.count - one.covered for one in self._streams.values())

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Cut a batch into windows; inside a replay buffer, expand a sample of stored windows.

        Args:
            tensordict: ``[B, T]`` or ``[T]``; inside a replay buffer stored windows ``[N]``.

        Returns:
            ``[N, L]``, with the state of the first step at every step.

        Raises:
            KeyError: if a batch has neither ``("next", "done")`` nor ``is_init`` flags, or if its
                entries are not those of the batch before.
            TypeError: if ``done``, flags or the mask are not bool.
            ValueError: if the number of rows has changed, or if time is not contiguous.
        """
        if self.is_in_buffer:
            return self.to_sequences(tensordict)
        return self.to_sequences(self.cut(tensordict))

    def _inv_call(self, tensordict: TensorDictBase) -> Any:
        stored = self.cut(tensordict)
        # A replay buffer takes None for nothing to store.
        return stored if stored.shape[0] else None

    def flush(self) -> TensorDictBase | None:
        """Return windows of the steps that wait, as if their episodes had ended; None without any.

        They are windows as :meth:`cut` returns them. A buffer with this transform would cut them
        again.
        """
        waiting, streams = self._waiting, self._streams
        self.clear()
        if waiting is None:
            return None
        ended = [(key, replace(one, is_over=True)) for key, one in streams.items()]
        return self._cut_streams(waiting, ended)[0]

    def cut(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Cut a batch into windows as a replay buffer stores them.

        A batch that raises an error changes nothing: neither the batch nor the steps that wait.

        Args:
            tensordict: ``[B, T]`` or ``[T]``.

        Returns:
            Batch size ``[N]``: states ``[N, ...]``, everything else ``[N, L, ...]``.
        """
        raise_first(find_type_problems(tensordict, "Windows"))
        rows = tensordict.unsqueeze(0) if tensordict.ndim == 1 else tensordict
        self._check_rows(rows)
        pieces = find_pieces(rows, self.init_key)
        self._check_number_of_rows(rows, any(one.stream[0] == "row" for one in pieces))
        steps = rows.reshape(rows.batch_size.numel())
        if self._waiting is not None:
            self._check_entries(steps)
            offset = len(self._waiting)
            pieces = [one._replace(steps=one.steps + offset) for one in pieces]
            steps = _cat([self._waiting, steps])
        streams = continue_streams(self._streams, pieces)
        windows, waiting, kept = self._cut_streams(steps, streams)
        self._waiting, self._streams, self._num_rows = waiting, kept, rows.shape[0]
        self._warn_if_all_is_dropped(len(windows), sum(one.is_over for _, one in streams))
        return windows

    def _cut_streams(
        self, steps: TensorDictBase, streams: list[tuple[tuple[str, int], Stream]]
    ) -> tuple[TensorDictBase, TensorDictBase | None, dict[tuple[str, int], Stream]]:
        """Cut episodes whose steps are somewhere in ``steps [S]``.

        Returns:
            Windows ``[N]``; the steps that wait, ``[W]``, or None; and the streams that they belong
            to.
        """
        positions, waiting, begins, spans, origins = [], [], [], [], []
        kept: dict[tuple[str, int], Stream] = {}
        begin = end = 0
        for key, one in streams:
            found, rest = self._cutter.find_windows(one)
            spans += [(begin + first, last - first) for first, last in found]
            origins += [(one.episode, one.first + first) for first, _ in found]
            positions += one.steps
            begins += [begin] if one.count else []
            begin += one.count
            if not one.is_over:
                waiting += rest.steps
                place = torch.arange(end, end := end + rest.count)
                kept[key] = replace(rest, steps=(place,))
        row = _index(steps, torch.cat(positions)) if begin else steps[:0]
        self._check_continuity(row, begins)
        rest = _index(steps, torch.cat(waiting)) if end else None
        return self._gather(row, spans, origins), rest, kept

    def _check_continuity(self, row: TensorDictBase, begins: list[int]) -> None:
        """Check that every step follows the one before it in its episode.

        Args:
            row: steps ``[S]``, one episode after the other.
            begins: positions of the first steps of the episodes.
        """
        flags = row.get(self.init_key, None)
        if flags is None:
            flags = torch.zeros(len(row), 1, dtype=torch.bool, device=_device_of(row))
        flags = flags.clone()
        if not can_read_values(flags):
            return
        flags[begins] = True
        states = [unravel_key(key) for key in self._find_states(row) if key[0] != "next"]
        flagged = row.copy().set(self.init_key, flags)
        problems = find_continuity_problems(flagged, self.init_key, states)
        raise_first(replace(one, remedy=one.remedy + _STREAM_REMEDY) for one in problems)

    def _check_rows(self, rows: TensorDictBase) -> None:
        if rows.ndim != 2:
            raise ValueError(
                f"Windows are cut from a batch [B, T] or [T]. Got batch size "
                f"{list(rows.batch_size)}. Reshape it."
            )
        tensors = [key for key, value in _leaves(rows) if isinstance(value, Tensor)]
        raise_first(find_tensor_problems(rows, tensors))
        for key in tensors[:1]:
            raise_first(find_meta_problems(rows, key, "Windows"))
        for key in self._find_states(rows):
            if key[0] != "next":
                raise_first(find_state_problems(rows, key, self.init_key))

    def _check_number_of_rows(self, rows: TensorDictBase, continues_rows: bool) -> None:
        if continues_rows and self._num_rows not in (None, rows.shape[0]):
            raise ValueError(
                f"The batch has {rows.shape[0]} rows and the one before had {self._num_rows}. "
                "Without trajectory ids a row continues the same row of the batch before. Call "
                "clear() where new episodes start in every row, or collect with trajectory ids."
            )

    def _check_entries(self, steps: TensorDictBase) -> None:
        assert self._waiting is not None
        before, now = (set(map(as_tuple, td.keys(True))) for td in (self._waiting, steps))
        if before != now:
            added, missing = sorted(now - before), sorted(before - now)
            raise KeyError(
                "The batch must have the entries of the batch before, whose last steps wait to "
                f"share windows with it. Got {added} in addition, and {missing} are missing. Call "
                "flush() or clear() before the entries change."
            )

    def _warn_if_all_is_dropped(self, windows: int, episodes: int) -> None:
        if self._lost_episodes is None or self.residual != "drop" or windows:
            self._lost_episodes = None
            return
        self._lost_episodes += episodes
        if self._lost_episodes >= _LOST_EPISODES:
            warn_caller(
                f"{self._lost_episodes} episodes have ended and none had length={self.length} "
                "steps, so that residual='drop' has left nothing. Shorten the windows, or use "
                "residual='last' or 'null'."
            )
            self._lost_episodes = None

    def _gather(
        self, row: TensorDictBase, spans: list[tuple[int, int]], origins: list[tuple[int, int]]
    ) -> TensorDictBase:
        """Return windows ``[N]`` of steps ``[S]``.

        Args:
            row: the steps.
            spans: first step and length of each window.
            origins: episode of each window, and number of its first step there.
        """
        device = _device_of(row)
        first, length = torch.tensor(spans, device=device).reshape(-1, 2).long().unbind(-1)
        episode, number = torch.tensor(origins, device=device).reshape(-1, 2).long().unbind(-1)
        once = set() if self.keep_states else self._find_states(row)
        row = row if spans else _drop_texts(row)
        cut, mask = cut_windows(
            row.exclude(*once, MASK_KEY).unsqueeze(0),
            Spans(torch.zeros_like(first), first, length),
            self.length,
        )
        windows = TensorDict({}, [len(spans)], device=row.device)
        padding = None if self.residual == "repeat" or mask.all() else ~mask
        for key, value in _leaves(cut):
            windows.set(key, value if padding is None else _make_null(key, value, padding))
        for key, value in _leaves(_index(row.select(*once), first)):
            windows.set(key, value)
        windows.set(EPISODE_KEY, episode)
        windows.set(FIRST_KEY, number)
        return windows.set(MASK_KEY, mask)

    def _find_states(self, tensordict: TensorDictBase) -> set[tuple[str, ...]]:
        """Return the keys of states that are there, in the root and in ``next``."""
        every = set(map(as_tuple, tensordict.keys(True, True)))
        if self.state_keys is not None:
            keys = {as_tuple(k) for k in self.state_keys}
            return every & (keys | {next_key(k) for k in keys})
        return {key for key in every if key[-1].startswith(_STATE_PREFIX)}

    def to_sequences(self, stored: TensorDictBase) -> TensorDictBase:
        """Return stored windows ``[N]`` as sequences ``[N, L]``, without a copy.

        The state of the first step is at every step.

        Args:
            stored: windows as :meth:`cut` returns them.

        Raises:
            KeyError: if they are not windows.
        """
        mask = stored.get(MASK_KEY, None)
        if mask is None or stored.get(EPISODE_KEY, None) is None:
            raise KeyError(
                f"There is no {EPISODE_KEY!r}, so these are not windows. A buffer that samples "
                "windows has Windows(...) as its transform from the beginning."
            )
        # A batch that is [N, L] already was expanded before it was stored.
        if stored.ndim > 1:
            return stored
        states = set() if self.keep_states else self._find_states(stored)
        sequences = TensorDict({}, batch_size=mask.shape, device=stored.device)
        for key, value in _leaves(stored):
            # A replay buffer adds one index for each window.
            per_window = key in states or value.shape[:2] != mask.shape
            if per_window and not isinstance(value, UnbatchedTensor):
                value = value.unsqueeze(1)
                value = value.expand(*mask.shape, *value.shape[2:])
            sequences.set(key, value)
        return sequences


def _make_null(key: tuple[str, ...], value: Any, padding: Tensor) -> Any:
    """Zero out a tensor ``[N, L, ...]`` at padding; set ``done`` there."""
    if not isinstance(value, Tensor) or isinstance(value, UnbatchedTensor):
        return value
    fill = key[0] == "next" and key[-1] in _DONE_NAMES
    return value.masked_fill(append_dims(padding, value.ndim), fill)


def _drop_texts(steps: TensorDictBase) -> TensorDictBase:
    """Leave out entries that cannot be indexed by an empty index."""
    kept = (Tensor, UnbatchedTensor)
    return steps.exclude(*(key for key, value in _leaves(steps) if not isinstance(value, kept)))


def _leaves(tensordict: TensorDictBase) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield all entries that hold data, those that are not tensors included."""

    def is_leaf(kind: type) -> bool:
        return not issubclass(kind, TensorDictBase) or issubclass(kind, NonTensorStack)

    for key, value in tensordict.items(True, True, is_leaf=is_leaf):
        yield as_tuple(key), value


def _index(steps: TensorDictBase, positions: Tensor) -> TensorDictBase:
    return cast(TensorDictBase, steps[positions.to(_device_of(steps))])


def _device_of(tensordict: TensorDictBase) -> torch.device:
    """Return the device of a TensorDict, that of its first tensor if it names none."""
    if tensordict.device is not None:
        return tensordict.device
    first = next(iter(tensordict.values(True, True)), None)
    return first.device if isinstance(first, Tensor) else torch.device("cpu")


def _cat(parts: Sequence[TensorDictBase]) -> TensorDictBase:
    untyped: Any = parts  # the types of torch.cat exclude TensorDicts
    return cast(TensorDictBase, torch.cat(untyped))
