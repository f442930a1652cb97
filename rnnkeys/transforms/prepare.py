"""Checks and segment starts of the batches that transforms and ``R2D2Loss`` take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from ..checks import (
    Problem,
    can_read_values,
    find_done_problems,
    find_empty_mask_problems,
    find_init_problems,
    find_mask_problems,
    find_step_problems,
    raise_first,
)
from ..keys import MASK_KEY
from ..sequences.segment_starts import (
    check_contiguous_time,
    find_segment_starts,
    set_segment_starts,
)


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
        :func:`rnnkeys.sequences.segment_starts.find_segment_starts`.

    Raises:
        KeyError: if flags are missing.
        TypeError: if flags, mask or ``done`` are not bool.
        ValueError: if a shape is wrong, or if time is not contiguous.
    """
    pairs = list(pairs)
    init_keys = list(dict.fromkeys(key for _, key in pairs))
    raise_first(find_sequence_problems(batch, init_keys, pairs, reader=reader))
    return set_segment_starts(batch, init_keys)


def find_sequence_problems(
    batch: TensorDictBase,
    init_keys: Iterable[NestedKey],
    state_keys: Iterable[tuple[NestedKey, NestedKey]] = (),
    *,
    reader: str = "a recurrent network",
    read_values: bool | None = None,
) -> Iterator[Problem]:
    """Yield the problems of a batch as sequences."""
    problems = [*find_step_problems(batch, reader)]
    yield from problems
    for key in init_keys:
        yield from find_init_problems(batch, key)
    yield from find_done_problems(batch, ("next", "done"))
    yield from find_mask_problems(batch, reader)
    flags = batch.get(next(iter(init_keys)), None)
    if not (can_read_values(flags) if read_values is None else read_values):
        return
    mask = batch.get(MASK_KEY, None)
    if mask is not None:
        yield from find_empty_mask_problems(mask, reader)
    for key in init_keys:
        try:
            check_contiguous_time(batch, key, find_segment_starts(batch, key))
        except ValueError as error:
            yield Problem("continuity", str(error), "")


def expand_flags(flags: Tensor, state: Tensor) -> Tensor:
    """Give flags ``[*, T, ..., 1]`` the dimensions of a state ``[*, T, ..., L, H]``."""
    return flags.reshape(*flags.shape[:-1], *[1] * (state.ndim - flags.ndim + 1))


def shift_states(after: Tensor, initial: Tensor, starts: Tensor, time: int) -> Tensor:
    """Return the state that enters each step."""
    is_first = expand_flags(starts, after).clone()
    is_first.select(time, 0).fill_(True)
    return torch.where(is_first, initial, after.roll(1, time))
