"""The one check of a batch as sequences, which every reader of batches runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey

from ..checks import (
    Problem,
    can_read_values,
    find_empty_mask_problems,
    find_init_problems,
    find_mask_problems,
    find_step_problems,
    find_tensor_problems,
)
from ..keys import MASK_KEY, next_key
from .continuity import find_breaks
from .masks import read_mask
from .segment_starts import find_done_key, find_group_done_problems
from .segments import Segments
from .stored_states import (
    find_episode_state_problems,
    find_zero_state_problems,
    states_are_right,
)


def find_sequence_problems(
    batch: TensorDictBase,
    init_keys: Iterable[NestedKey],
    state_keys: Iterable[tuple[NestedKey, NestedKey]] = (),
    *,
    reader: str = "a recurrent network",
    read_values: bool | None = None,
) -> Iterator[Problem]:
    """Yield the problems of a batch as sequences: the one check that every reader of batches runs.

    Keys, dtypes and shapes come first. If they are right, values follow: a mask without a valid
    step, time that is not contiguous, and states stored at the first step of an episode that are
    not zero.

    Args:
        batch: sequences ``[*, T]``.
        init_keys: keys of the ``is_init`` flags.
        state_keys: pairs ``(state key, init key)`` of recurrent states, stored at the root and in
            ``next``; missing ones are left out.
        reader: who reads the batch, for the messages.
        read_values: whether to read values; by default in CPU memory only (see
            ``rnnkeys.checks.set_value_checks``).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> flags = torch.zeros(4, 1, dtype=torch.bool)
        >>> ids = torch.tensor([7, 7, 3, 3])
        >>> batch = TensorDict({"is_init": flags, "collector": {"traj_ids": ids}}, [4])
        >>> [problem.check for problem in find_sequence_problems(batch, ["is_init"])]
        ['continuity']
    """
    init_keys = list(dict.fromkeys(map(unravel_key, init_keys)))
    pairs = [(unravel_key(state), unravel_key(init)) for state, init in state_keys]
    problems = [*_find_entry_problems(batch, init_keys, pairs, reader)]
    yield from problems
    if problems:
        return
    flags = batch.get(init_keys[0]) if init_keys else None
    if not (can_read_values(flags) if read_values is None else read_values):
        return
    mask = read_mask(batch, reader)
    if mask is not None and not mask.any():
        yield from find_empty_mask_problems(mask, reader)
        return
    if batch.shape[-1] < 2:
        return
    for key in init_keys:
        segments = Segments(batch, key)
        stored = [state for state, init in pairs if init == key]
        # Most batches are right, and one look at all states together shows it.
        are_right = states_are_right(segments, stored)
        states = [] if are_right else stored
        yield from find_breaks(segments, states, known=are_right)
        yield from find_length_problems(segments)
        for state in states:
            yield from find_episode_state_problems(segments, state)
            yield from find_zero_state_problems(segments, state)


def _find_entry_problems(
    batch: TensorDictBase,
    init_keys: list[NestedKey],
    pairs: list[tuple[NestedKey, NestedKey]],
    reader: str,
) -> Iterator[Problem]:
    problems = [*find_step_problems(batch, reader)]
    yield from problems
    if problems:
        return
    states = [key for key, _ in pairs]
    read = [*init_keys, MASK_KEY, *states, *map(next_key, states)]
    for name in ("done", "terminated"):
        read += [find_done_key(batch, key, name) for key in init_keys]
    problems = [*find_tensor_problems(batch, [key for key in read if key is not None])]
    yield from problems
    if problems:
        return
    for key in init_keys:
        yield from find_init_problems(batch, key)
        yield from find_group_done_problems(batch, key)
    yield from find_mask_problems(batch, reader)
    for state, init in pairs:
        yield from find_state_problems(batch, state, init)


def find_state_problems(
    batch: TensorDictBase, state_key: NestedKey, init_key: NestedKey
) -> Iterator[Problem]:
    """Yield problems of states that are not floats, or that their flags do not fit.

    Args:
        batch: sequences ``[*, T]``, or single steps.
        state_key: key of a recurrent state; it may be missing, here and in ``next``.
        init_key: key of its flags.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> state = torch.zeros(4, 1, 5, dtype=torch.int64)
        >>> batch = TensorDict({"is_init": torch.zeros(4, 1).bool(), "h": state}, [4])
        >>> [problem.check for problem in find_state_problems(batch, "h", "is_init")]
        ['state-dtype']
    """
    flags = batch.get(init_key, None)
    for key in (state_key, next_key(state_key)):
        state = batch.get(key, None)
        if state is None:
            continue
        if not state.is_floating_point():
            yield Problem(
                "state-dtype",
                f"The state {key!r} must be floats. Got {state.dtype}.",
                "Store it as the recurrent layer wrote it.",
                TypeError,
            )
        other = batch.get(state_key, state)
        if state.shape != other.shape:
            yield Problem(
                "state-shape",
                f"The state {key!r} must have the shape of {state_key!r}, {list(other.shape)}. Got "
                f"{list(state.shape)}.",
                "Store both as they were collected.",
            )
        lead = batch.batch_size if flags is None else flags.shape[:-1]
        if state.ndim < len(lead) + 2 or state.shape[: len(lead)] != lead:
            yield Problem(
                "state-shape",
                f"The state {key!r} must have the shape [*batch, *agents, layers, size], and "
                f"{init_key!r} [*batch, 1] or [*batch, agents, 1], with the batch "
                f"{list(batch.batch_size)}. Got {list(state.shape)} and "
                f"{None if flags is None else list(flags.shape)}.",
                "Store both as they were collected.",
            )


def find_length_problems(segments: Segments) -> Iterator[Problem]:
    """Yield a problem (a warning) if every segment of a batch has one step.

    Args:
        segments: of a batch ``[*, T]`` of at least two steps.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> batch = TensorDict(is_init=torch.ones(4, 1, dtype=torch.bool), batch_size=[4])
        >>> [problem.check for problem in find_length_problems(Segments(batch, "is_init"))]
        ['segment-length']
    """
    if segments.carried.any() or _are_single_steps(segments.batch):
        return
    yield Problem(
        "segment-length",
        f"Every step of this batch {list(segments.batch.batch_size)} starts a segment, so that "
        "the recurrent layers learn nothing about time.",
        "Sample longer slices. A replay buffer needs time in the last dimension of what is "
        "stored, and SliceSampler an end_key or traj_key that marks real ends.",
        UserWarning,
    )


def _are_single_steps(batch: TensorDictBase) -> bool:
    """Return whether every episode terminates after one step, as those of a bandit do."""
    terminated = batch.get(("next", "terminated"), None)
    return terminated is not None and bool(terminated.all())
