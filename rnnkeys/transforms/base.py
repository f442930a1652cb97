"""The base of transforms of batches of sequences, and the preparation of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.envs import Transform

from ..checks import raise_first
from ..sequences import find_sequence_problems, set_segment_starts


class SequenceTransform(Transform):
    """Abstract transform of batches of sequences, for replay buffers and collectors.

    An environment produces one time step at a time, so that it cannot run such a transform.

    Attributes:
        usage: how to use the transform instead, for the error.
    """

    usage: str

    def __init__(self) -> None:
        super().__init__()
        self._has_container = False

    def set_container(self, container: Any) -> None:
        """Remember that the transform belongs to a container, and reject environments.

        Raises:
            RuntimeError: if the transform is appended to an environment.
        """
        super().set_container(container)
        self._has_container = container is not None
        if self.parent is not None:
            raise RuntimeError(
                f"{type(self).__name__} cannot be appended to an environment, which has one time "
                f"step at a time. {self.usage}"
            )

    @property
    def is_in_buffer(self) -> bool:
        """Whether a replay buffer runs the transform: its transforms are in evaluation mode."""
        return self._has_container and not self.training


def prepare_sequences(
    batch: TensorDictBase, pairs: Iterable[tuple[NestedKey, NestedKey]], reader: str
) -> TensorDictBase:
    """Check a batch of sequences and flag its segment starts.

    Args:
        batch: ``[*, T]``; it stays as it is.
        pairs: ``(state key, init key)`` of the recurrent states that are read.
        reader: who reads the batch, for error messages.

    Returns:
        A shallow copy whose flags are those of
        :func:`rnnkeys.sequences.find_segment_starts`.

    Raises:
        KeyError: if flags are missing.
        TypeError: if flags, mask or ``done`` are not bool.
        ValueError: if a shape is wrong, or if time is not contiguous.
    """
    pairs = list(pairs)
    init_keys = list(dict.fromkeys(key for _, key in pairs))
    raise_first(find_sequence_problems(batch, init_keys, pairs, reader=reader))
    return set_segment_starts(batch, init_keys)
