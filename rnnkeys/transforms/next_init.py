"""Marks in the next view: a transform for batches, and samplers whose batches come marked."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data.replay_buffers.samplers import (
    SliceSampler,
    SliceSamplerWithoutReplacement,
    StreamingSliceSampler,
)
from torchrl.data.replay_buffers.storages import Storage

from ..keys import as_keys, next_key
from ..replay import PrioritizedSliceSampler
from ..sequences.segment_starts import set_next_is_init
from .batches import BatchTransform

_TRUNCATED = ("next", "truncated")


class NextInitTracker(BatchTransform):
    """Marks in the next view every step whose root starts an episode or a slice.

    A loss that bootstraps runs its network on the next view as on a sequence. ``("next",
    "is_init")`` is False everywhere, so that sequence would run on across slices and episodes. With
    the marks, every segment of the next view starts from the state stored beside it.

    Use it as a plain call on a sampled batch, as a collector's ``postproc``, or as the transform of
    a replay buffer that stores whole windows. A buffer whose sampler cuts slices marks their starts
    only after its transforms ran: there it raises; use one of the samplers of this module, or call
    it on the batch.

    The tracker marks two more things. Root steps that follow a ``done`` become starts
    (``PrioritizedSliceSampler`` of TorchRL 0.14.1 marks none), and the first step of every row
    starts a segment of the next view.

    Args:
        init_key: key of the marks that ``InitTracker`` and slice samplers write, nested or not, or
            a list of keys.

    Examples:
        >>> from tensordict import TensorDict
        >>> marks = torch.tensor([[True], [False], [True]])
        >>> batch = TensorDict({"is_init": marks, "next": {"is_init": marks & False}}, [3])
        >>> NextInitTracker()(batch)["next", "is_init"].flatten()
        tensor([ True, False,  True])
    """

    _purpose = (
        "it marks batches of sequences. Pass it as the collector's postproc, or call it on the "
        "batch. What an environment needs is InitTracker()."
    )

    def __init__(self, init_key: NestedKey | list[NestedKey] = "is_init") -> None:
        super().__init__()
        self.init_keys = as_keys(init_key)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return a shallow copy of a batch with its next view marked.

        Args:
            tensordict: ``[N]`` (slices laid end to end) or ``[*, T]``; left as it was.

        Returns:
            A TensorDict that shares every other tensor with the one given.

        Raises:
            KeyError: if an init key or ``"next"`` is missing.
            TypeError: if an init key is not bool.
            ValueError: if an init key has a wrong shape, or if time is not contiguous.
            RuntimeError: if it runs inside a replay buffer before its sampler's marks are there.
        """
        self._refuse_unmarked_slices(tensordict)
        return set_next_is_init(tensordict, self.init_keys)

    def _refuse_unmarked_slices(self, tensordict: TensorDictBase) -> None:
        # A replay buffer hands its transforms a flat batch only if its items are single steps, and
        # then the marks of slice starts are not there yet.
        if self._in_buffer and tensordict.ndim < 2:
            raise RuntimeError(
                f"{type(self).__name__} runs too early as a transform of this replay buffer: its "
                "items are single steps, and samplers mark the starts of slices after the "
                "transforms. Use a sampler that marks the next view, such as "
                "rnnkeys.transforms.NextInitSliceSampler, or call the tracker on the batch: "
                "batch = tracker(buffer.sample())."
            )


class _MarksNextView:
    """Mixed into a slice sampler: slice starts are marked at the root *and* in the next view."""

    init_key: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("init_key", "is_init") is None:
            raise ValueError(
                f"{type(self).__name__} exists to mark starts, so init_key cannot be None. Use "
                "TorchRL's own sampler to leave a batch unmarked."
            )
        super().__init__(*args, **kwargs)
        self.init_keys = as_keys(self.init_key)

    def _maybe_emit_init_marker(
        self,
        info: dict[Any, Any],
        st_index: Any,
        num_slices: int,
        seq_length: int | Tensor,
        target_seq_length: int | None,
    ) -> None:
        """Write the marks into the info; TorchRL's samplers call this when indices are drawn."""
        lengths = seq_length if target_seq_length is None else target_seq_length
        if isinstance(lengths, Tensor):
            starts = lengths.cumsum(0) - lengths
        else:
            starts = torch.arange(num_slices) * lengths
        self._write_marks(info, st_index, starts)

    def _write_marks(self, info: dict[Any, Any], steps: Any, starts: Tensor) -> None:
        for key in self.init_keys:
            stored = steps.get(key, None)
            if stored is None:
                raise KeyError(
                    f"There is no init key {key!r} in the replay buffer, so starts of episodes "
                    "inside a slice cannot be told. Append InitTracker() to the environment "
                    "that collects, or pass init_key=."
                )
            marks = stored.clone()
            marks[starts.to(marks.device)] = True
            info[key] = marks
            ahead = steps.get(next_key(key), None)
            info[next_key(key)] = marks.clone() if ahead is None else marks | ahead


class NextInitSliceSampler(_MarksNextView, SliceSampler):
    """A ``SliceSampler`` whose batches come with the next view marked.

    ``TensorDictReplayBuffer`` writes the marks into every batch, prefetched ones included; the
    storage stays untouched. A plain ``ReplayBuffer`` writes no sampler's marks: take them from
    ``sample(return_info=True)``.

    Args:
        *args: as for TorchRL's ``SliceSampler``.
        **kwargs: as for TorchRL's ``SliceSampler``; ``init_key`` may be a list of keys.

    Examples:
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> rb = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(100),
        ...     sampler=NextInitSliceSampler(slice_len=8),
        ...     batch_size=32,
        ... )
    """


class NextInitSliceSamplerWithoutReplacement(_MarksNextView, SliceSamplerWithoutReplacement):
    """A ``SliceSamplerWithoutReplacement`` whose batches come with the next view marked."""


class NextInitStreamingSliceSampler(_MarksNextView, StreamingSliceSampler):
    """A ``StreamingSliceSampler`` whose batches come with the next view marked."""


class NextInitPrioritizedSliceSampler(_MarksNextView, PrioritizedSliceSampler):
    """A ``PrioritizedSliceSampler`` whose batches come with the root *and* the next view marked.

    TorchRL 0.14.1's own marks no start of a slice at all, not even at the root.
    """

    def sample(self, storage: Storage, batch_size: int) -> tuple[Any, dict[Any, Any]]:
        """Draw slices and mark their starts.

        Args:
            storage: of the replay buffer.
            batch_size: number of steps to draw.

        Returns:
            The indices and the info that ``TensorDictReplayBuffer`` writes into the batch.
        """
        wanted = self.truncated_key
        # The ends of slices are what tells where they start, so they are asked for even if nobody
        # wants them.
        self.truncated_key = wanted or _TRUNCATED
        try:
            index, info = super().sample(storage, batch_size)
            ends = info[self.truncated_key].flatten()
        finally:
            self.truncated_key = wanted
        if wanted is None:
            for name in ("truncated", "done", "terminated"):
                del info["next", name]
        starts = torch.cat([ends.new_ones(1), ends[:-1]]).nonzero().squeeze(-1)
        self._write_marks(info, storage[index], starts)
        return index, info
