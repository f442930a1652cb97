"""Checks and segment starts of the batches that transforms take."""

from __future__ import annotations

from collections.abc import Iterable

from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from ..checks import raise_first
from ..sequences import find_sequence_problems, set_segment_starts


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
