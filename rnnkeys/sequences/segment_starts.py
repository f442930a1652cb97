"""Segment starts of a batch of sequences, and the states that segments start from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from ..checks import (
    Problem,
    find_done_problems,
    find_init_problems,
    find_next_problems,
    find_step_problems,
    find_tensor_problems,
    find_type_problems,
    raise_first,
)
from ..keys import as_tuple, next_key


def read_is_init(batch: TensorDictBase, init_key: NestedKey) -> Tensor:
    """Return the ``is_init`` flags of a batch.

    Args:
        batch: sequences ``[*, T]``.
        init_key: key of the flags.

    Returns:
        Bool ``[*, T, 1]``, or per agent ``[*, T, agents, 1]``.

    Raises:
        KeyError: if the flags are missing.
        TypeError: if they are not bool.
        ValueError: if their shape is wrong, or if there is no time dimension.

    Examples:
        >>> from tensordict import TensorDict
        >>> flags = torch.zeros(2, 5, 1, dtype=torch.bool)
        >>> read_is_init(TensorDict({"is_init": flags}, [2, 5]), "is_init") is flags
        True
    """
    raise_first(find_type_problems(batch, "read_is_init"))
    if not batch.ndim:
        raise_first(find_step_problems(batch, "A recurrent network in recurrent mode"))
    raise_first(find_init_problems(batch, init_key))
    return batch.get(init_key)


def find_segment_starts(batch: TensorDictBase, init_key: NestedKey) -> Tensor:
    """Return where segments start: at ``is_init`` flags, and after every ``done``.

    The step after a ``done`` in its row starts a segment even if it carries no flag: TorchRL's
    ``PrioritizedSliceSampler`` (0.14.1) sets ``done`` at the end of every slice and no flag, and
    ``NoopResetEnv`` acts in resets. Flags belong to the ``done`` of their own group: those at
    ``("agents", "is_init")`` to ``("next", "agents", "done")``, or else to ``("next", "done")``.

    Args:
        batch: sequences ``[*, T]``.
        init_key: key of the flags, bool ``[*, T, 1]`` or per agent ``[*, T, agents, 1]``.

    Returns:
        Bool, in the shape of the flags. The first step of a row is True only if it is flagged.

    Raises:
        KeyError: if the flags are missing.
        TypeError: if the flags or ``done`` are not bool.
        ValueError: if the shape of the flags or of ``done`` is wrong, or if there is no time
            dimension.

    Examples:
        >>> from tensordict import TensorDict
        >>> flags = torch.tensor([[True], [False], [False]])
        >>> done = torch.tensor([[False], [True], [False]])
        >>> batch = TensorDict({"is_init": flags, "next": {"done": done}}, [3])
        >>> find_segment_starts(batch, "is_init").flatten()
        tensor([ True, False,  True])
    """
    flags = read_is_init(batch, init_key)
    return flags | find_steps_after_done(batch, init_key, flags)


def find_steps_after_done(
    batch: TensorDictBase, init_key: NestedKey, flags: Tensor, name: str = "done"
) -> Tensor:
    """Return which steps follow a ``done`` of the flags' group in their row.

    Args:
        batch: sequences ``[*, T]``.
        init_key: key of the flags.
        flags: the flags.
        name: ``"done"`` or ``"terminated"``.

    Returns:
        Bool, in the shape of the flags.

    Raises:
        TypeError: if ``done`` is not bool.
        ValueError: if its shape is wrong.
    """
    time = batch.ndim - 1
    key = find_done_key(batch, init_key, name)
    if key is None or flags.shape[time] < 2:
        return torch.zeros_like(flags)
    raise_first(find_tensor_problems(batch, [init_key, key]))
    raise_first(find_done_problems(batch, key))
    done = match_agents(batch.get(key), flags, batch.ndim)
    ends = done.narrow(time, 0, done.shape[time] - 1)
    return torch.cat([torch.zeros_like(done.narrow(time, 0, 1)), ends], time)


def find_group_done_problems(batch: TensorDictBase, init_key: NestedKey) -> Iterable[Problem]:
    """Yield problems of the ``done`` entry that belongs to the flags at ``init_key``."""
    key = find_done_key(batch, init_key)
    if key is not None:
        yield from find_done_problems(batch, key)


def find_done_key(
    batch: TensorDictBase, init_key: NestedKey, name: str = "done"
) -> tuple[str, ...] | None:
    """Return the key of the ``done`` beside the flags, or else of the one nearest to the root."""
    group = as_tuple(init_key)[:-1]
    for depth in range(len(group), -1, -1):
        key = ("next", *group[:depth], name)
        if batch.get(key, None) is not None:
            return key
    return None


def match_agents(flags: Tensor, like: Tensor, ndim: int) -> Tensor:
    """Bring flags to the agent dimensions of other flags.

    Shared flags hold for every agent. Of flags per agent, those of all agents together make a
    shared one.

    Args:
        flags: bool ``[*batch, 1]`` or ``[*batch, agents, 1]``.
        like: bool of either shape.
        ndim: number of batch dimensions.

    Returns:
        Bool in the shape of ``like``.

    Examples:
        >>> per_agent = torch.tensor([[[True], [False]], [[True], [True]]])
        >>> match_agents(per_agent, torch.zeros(2, 1), 1).flatten()
        tensor([False,  True])
    """
    if flags.shape == like.shape:
        return flags
    if flags.ndim > like.ndim:
        flags = flags.flatten(ndim).all(-1)
    shape = (*flags.shape[:ndim], *[1] * (like.ndim - flags.ndim), *flags.shape[ndim:])
    return flags.reshape(shape).expand_as(like)


def reduce_agents(flags: Tensor, ndim: int) -> Tensor:
    """Reduce flags ``[*batch, ..., 1]`` to ``[*batch]``: True where any agent's is.

    Examples:
        >>> reduce_agents(torch.tensor([[[True], [False]]]), 1)
        tensor([True])
    """
    return flags.flatten(ndim).any(-1)


def expand_flags(flags: Tensor, state: Tensor) -> Tensor:
    """Give flags the dimensions of a state, so that they broadcast with it.

    Args:
        flags: bool ``[*, T, 1]``, or per agent ``[*, T, agents, 1]``.
        state: ``[*, T, L, H]`` or ``[*, T, agents, L, H]``.

    Examples:
        >>> expand_flags(torch.zeros(2, 7, 1).bool(), torch.zeros(2, 7, 3, 1, 5)).shape
        torch.Size([2, 7, 1, 1, 1])
    """
    return flags.reshape(*flags.shape[:-1], *[1] * (state.ndim - flags.ndim + 1))


def set_segment_starts(batch: TensorDictBase, init_keys: Iterable[NestedKey]) -> TensorDictBase:
    """Return a shallow copy whose flags are those of :func:`find_segment_starts`.

    Args:
        batch: sequences ``[*, T]``; it stays as it is.
        init_keys: keys of the flags.

    Raises:
        KeyError: as :func:`find_segment_starts`, which raises its other errors too.
    """
    raise_first(find_type_problems(batch, "set_segment_starts"))
    flagged = batch.copy()
    for key in init_keys:
        flagged.set(key, find_segment_starts(batch, key))
    return flagged


def set_next_flags(batch: TensorDictBase, init_keys: Iterable[NestedKey]) -> TensorDictBase:
    """Return a shallow copy with segment starts flagged at the root and in ``next``.

    The ``next`` tensordict is the root shifted by one step. Run as a sequence, it must start a
    segment wherever the root does, from the state stored at ``("next", state)``.

    Args:
        batch: sequences ``[*, T]`` with a ``next`` tensordict; it stays as it is.
        init_keys: keys of the flags.

    Raises:
        KeyError: if flags or ``next`` are missing.
        TypeError: if flags or ``done`` are not bool.
        ValueError: if a shape is wrong.
    """
    raise_first(find_next_problems(batch))
    flagged = batch.copy()
    for key in init_keys:
        starts = find_segment_starts(batch, key)
        flagged.set(key, starts)
        flagged.set(next_key(key), _next_starts(batch, key, starts))
    return flagged


def _next_starts(batch: TensorDictBase, key: NestedKey, starts: Tensor) -> Tensor:
    time = batch.ndim - 1
    first = torch.ones_like(starts.narrow(time, 0, 1))
    # Some losses lay rows end to end (CrossQ, SAC without done states), so rows start segments too.
    flags = torch.cat([first, starts.narrow(time, 1, starts.shape[time] - 1)], time)
    stored = batch.get(next_key(key), None)
    if stored is None:
        return flags
    raise_first(find_init_problems(batch, next_key(key)))
    if stored.shape != flags.shape:
        raise_first([_other_shape(key, flags, stored)])
    return flags | stored


def _other_shape(key: NestedKey, flags: Tensor, stored: Tensor) -> Problem:
    return Problem(
        "init-shape",
        f"The init key {next_key(key)!r} must have the shape of {key!r}, {list(flags.shape)}. Got "
        f"{list(stored.shape)}.",
        f"Remove it (batch.exclude({next_key(key)!r})), or store the flags that InitTracker "
        "writes.",
    )


def shift_states(after: Tensor, initial: Tensor, starts: Tensor, time: int) -> Tensor:
    """Return the state that enters each step.

    At segment starts, and at the first step of a row, it is the initial state; elsewhere it is the
    state after the step before.

    Args:
        after: states after each step, ``[*, T, ..., L, H]``.
        initial: states that segments would start from, of the same shape.
        starts: bool ``[*, T, 1]`` or per agent ``[*, T, agents, 1]``.
        time: index of the time dimension.

    Returns:
        States in the shape of ``after``.

    Examples:
        >>> after = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
        >>> starts = torch.tensor([[True], [False], [True]])
        >>> shift_states(after, torch.zeros(3, 1, 1), starts, 0).flatten()
        tensor([0., 1., 0.])
    """
    is_first = expand_flags(starts, after).clone()
    is_first.select(time, 0).fill_(True)
    return torch.where(is_first, initial, after.roll(1, time))
