"""Checks of whole sequences: each step follows the step before it, and states fit the flags."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor

from ..checks import (
    Problem,
    can_read_values,
    find_empty_mask_problems,
    find_init_problems,
    find_mask_problems,
    find_step_problems,
)
from ..keys import TRAJECTORY_KEY, next_key
from .masks import read_mask
from .segment_starts import (
    any_agent,
    find_group_done_problems,
    find_segment_starts,
    follow_done,
    read_is_init,
)

_REMEDY = (
    "A recurrent network in recurrent mode needs runs of consecutive steps, time last, with a flag "
    "at every segment start: sample slices with SliceSampler, or set the flags. To run single "
    "transitions use set_recurrent_mode(False)."
)
# Relative to the largest state. A step recomputed in bfloat16 or TF32 differs by less, a step of
# another trajectory by more.
_TOLERANCE = 0.02
_COMPACT_REMEDY = (
    "The collector left it out (compact_obs=True): name {0!r} to NextStateReconstructor(keys=[...])"
    ", or remove {1!r} from the batch where no loss reads it."
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
        read_values: whether to read values; by default where no device has to be waited for (see
            ``rnnkeys.checks.set_value_checks``).

    Examples:
        >>> from tensordict import TensorDict
        >>> flags = torch.zeros(4, 1, dtype=torch.bool)
        >>> ids = torch.tensor([7, 7, 3, 3])
        >>> batch = TensorDict({"is_init": flags, "collector": {"traj_ids": ids}}, [4])
        >>> [problem.check for problem in find_sequence_problems(batch, ["is_init"])]
        ['continuity']
    """
    init_keys = list(dict.fromkeys(map(unravel_key, init_keys)))
    problems = [*_find_entry_problems(batch, init_keys, reader)]
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
    pairs = [(unravel_key(state), unravel_key(init)) for state, init in state_keys]
    for key in init_keys:
        states = [state for state, init in pairs if init == key]
        yield from find_continuity_problems(batch, key, states)
        yield from find_length_problems(batch, key)
    for state, init in pairs:
        yield from find_episode_state_problems(batch, init, state)
        yield from find_zero_state_problems(batch, init, state)


def _find_entry_problems(
    batch: TensorDictBase, init_keys: Iterable[NestedKey], reader: str
) -> Iterator[Problem]:
    problems = [*find_step_problems(batch, reader)]
    yield from problems
    if problems:
        return
    for key in init_keys:
        yield from find_init_problems(batch, key)
        yield from find_group_done_problems(batch, key)
    yield from find_mask_problems(batch, reader)


def find_continuity_problems(
    batch: TensorDictBase, init_key: NestedKey, state_keys: Iterable[NestedKey] = ()
) -> Iterator[Problem]:
    """Yield a problem if a step does not follow the step before it and no flag says so.

    The batch itself is the evidence, by what TorchRL and recurrent modules write into it:

    - trajectory ids ``("collector", "traj_ids")`` must not change inside a segment;
    - a recurrent state must be the one that the step before wrote, ``("next", state)``;
    - a counter at ``"step_count"`` must go on as ``("next", "step_count")`` does;
    - the ``"index"`` that a replay buffer writes must grow by one, if nothing else is there.

    Args:
        batch: sequences ``[*, T]`` whose flags are valid.
        init_key: key of the flags.
        state_keys: keys of the recurrent states that these flags reset.

    Examples:
        >>> from tensordict import TensorDict
        >>> flags = torch.zeros(3, 1, dtype=torch.bool)
        >>> state = torch.rand(3, 1, 5)
        >>> next_state = torch.cat([state[1:], state[:1]])
        >>> batch = TensorDict({"is_init": flags, "h": state, "next": {"h": next_state}}, [3])
        >>> list(find_continuity_problems(batch, "is_init", ["h"]))
        []
        >>> list(find_continuity_problems(batch[[1, 0, 2]], "is_init", ["h"]))[0].check
        'continuity'
    """
    time = batch.ndim - 1
    steps = batch.shape[time]
    if steps < 2:
        return
    starts = find_segment_starts(batch, init_key)
    mask = read_mask(batch)
    for evidence in _find_breaks(batch, starts, state_keys):
        unflagged = evidence.breaks
        if mask is not None:
            unflagged = unflagged & mask.narrow(time, 1, steps - 1)
        if unflagged.any():
            yield _discontinuity(unflagged, evidence, init_key)
            return


def _are_single_steps(batch: TensorDictBase) -> bool:
    """Return whether every episode terminates after one step, as those of a bandit do."""
    terminated = batch.get(("next", "terminated"), None)
    return terminated is not None and bool(terminated.all())


def find_length_problems(batch: TensorDictBase, init_key: NestedKey) -> Iterator[Problem]:
    """Yield a problem (a warning) if every segment of a batch has one step.

    Args:
        batch: sequences ``[*, T]`` whose flags are valid.
        init_key: key of the flags.

    Examples:
        >>> from tensordict import TensorDict
        >>> flags = torch.ones(4, 1, dtype=torch.bool)
        >>> batch = TensorDict(is_init=flags, batch_size=[4])
        >>> [problem.check for problem in find_length_problems(batch, "is_init")]
        ['segment-length']
    """
    time = batch.ndim - 1
    if batch.shape[time] < 2:
        return
    if _are_single_steps(batch):
        return
    inside = _valid(batch, ~find_segment_starts(batch, init_key))
    if not inside.narrow(time, 1, batch.shape[time] - 1).any():
        yield Problem(
            "segment-length",
            f"Every step of this batch {list(batch.batch_size)} starts a segment, so that the "
            "recurrent layers learn nothing about time.",
            "Sample longer slices. A replay buffer needs time in the last dimension of what is "
            "stored, and SliceSampler an end_key or traj_key that marks real ends.",
            UserWarning,
        )


class _Evidence(NamedTuple):
    """Where ``[*, T - 1]`` a step inside a segment does not follow the one before, and why."""

    key: Any
    breaks: Tensor
    reason: str
    remedy: str = _REMEDY


def _discontinuity(breaks: Tensor, evidence: _Evidence, init_key: NestedKey) -> Problem:
    where = breaks.nonzero()[0].tolist()
    where[-1] += 1
    return Problem(
        "continuity",
        f"Time is not contiguous in this batch: {int(breaks.sum())} of {breaks.numel()} steps do "
        f"not follow the step before them, the first at {where} ({evidence.key!r} "
        f"{evidence.reason}), and {init_key!r} flags no segment start there.",
        evidence.remedy,
    )


def _find_breaks(
    batch: TensorDictBase, starts: Tensor, state_keys: Iterable[NestedKey]
) -> Iterator[_Evidence]:
    known = False
    inside = ~any_agent(starts, batch.ndim)[..., 1:]
    ids = batch.get(TRAJECTORY_KEY, None)
    if ids is not None and ids.numel() == batch.batch_size.numel():
        known = True
        changes = ids.reshape(batch.batch_size).diff(dim=-1) != 0
        yield _Evidence(TRAJECTORY_KEY, changes & inside, "changes")
    for key in state_keys:
        evidence = _compare_states(batch, key, starts)
        if evidence is not None:
            known = True
            yield evidence
    counts = _compare_counts(batch)
    if counts is not None:
        known = True
        yield _Evidence("step_count", counts & inside, "does not continue ('next', 'step_count')")
    jumps = None if known else _compare_index(batch)
    if jumps is not None:
        yield _Evidence("index", jumps & inside, "does not grow by one")


def _compare_states(batch: TensorDictBase, key: NestedKey, starts: Tensor) -> _Evidence | None:
    """Compare each state with the one that the step before wrote; None if they prove nothing."""
    time = batch.ndim - 1
    enters, after = _stepwise_state(batch, key), batch.get(next_key(key), None)
    if enters is None or after is None or enters.shape != after.shape:
        return None
    steps = enters.shape[time] - 1
    arrives, leaves = enters.narrow(time, 1, steps), after.narrow(time, 0, steps)
    carried = ~starts.narrow(time, 1, steps).squeeze(-1)
    breaks = (arrives != leaves).flatten(carried.ndim).any(-1) & carried
    if breaks.any():
        size = (arrives - leaves).abs().flatten(carried.ndim).amax(-1)
        scale = enters.nan_to_num(0.0, 0.0, 0.0).abs().amax()
        breaks = breaks & (size > _TOLERANCE * scale) & ~_is_constant(enters, time, carried.ndim)
    is_compact = bool(breaks.any()) and not after.any()
    return _Evidence(
        key,
        any_agent(breaks.unsqueeze(-1), batch.ndim),
        f"is not the state at {next_key(key)!r} of that step"
        + (", which is zero at every step" if is_compact else ""),
        _COMPACT_REMEDY.format(key, next_key(key)) if is_compact else _REMEDY,
    )


def _is_constant(states: Tensor, time: int, features: int) -> Tensor:
    """Return which rows hold one state at all their steps, such as a window's; time is kept.

    A burn-in writes the states of the first two steps, so those may differ.
    """
    steps = states.shape[time]
    states = states.narrow(time, 2, steps - 2) if steps > 4 else states
    same = (states == states.narrow(time, 0, 1)).flatten(features).all(-1)
    return same.all(time, keepdim=True)


def _compare_counts(batch: TensorDictBase) -> Tensor | None:
    """Return where ``step_count`` does not continue; None if it does not count steps.

    Only what StepCounter writes is believed: integers that grow by one from root to ``next``.
    """
    count, following = batch.get("step_count", None), batch.get(("next", "step_count"), None)
    size = batch.batch_size.numel()
    if count is None or following is None or count.numel() != size or following.numel() != size:
        return None
    if count.is_floating_point() or count.dtype is torch.bool:
        return None
    count, following = count.reshape(batch.batch_size), following.reshape(batch.batch_size)
    grows = following == count + 1
    mask = read_mask(batch)
    if not (grows if mask is None else grows | ~mask).all():
        return None
    return count[..., 1:] != following[..., :-1]


def _compare_index(batch: TensorDictBase) -> Tensor | None:
    """Return where ``index`` does not grow by one; None if no replay buffer wrote it.

    A replay buffer writes integers ``[*, T]`` or, for a storage of several dimensions, ``[*, T,
    dims]``, at the root alone. An entry of the environment is in ``next`` as well.
    """
    index, ndim = batch.get("index", None), batch.ndim
    if not isinstance(index, Tensor) or batch.get(("next", "index"), None) is not None:
        return None
    if index.dtype is not torch.int64 or index.ndim not in (ndim, ndim + 1):
        return None
    index = index.unsqueeze(-1) if index.ndim == ndim else index
    growth = index.diff(dim=ndim - 1)
    if not growth.any():
        # A buffer of whole windows repeats the window's index at every step.
        return None
    # A full buffer continues at its first place.
    wraps = index.narrow(ndim - 1, 1, index.shape[ndim - 1] - 1)[..., 0] == 0
    follows = ((growth[..., 0] == 1) | wraps) & (growth[..., 1:] == 0).all(-1)
    return ~follows


def find_episode_state_problems(
    batch: TensorDictBase, init_key: NestedKey, state_key: NestedKey
) -> Iterator[Problem]:
    """Yield a problem if a state stored at the first step of an episode is not zero.

    Single steps start episodes from zeros, and sequences start segments from the stored state: the
    two agree only if zeros are stored there. A flag that follows a ``done`` in its row is an
    episode's. The state that the last step of the episode before wrote is an error there: nothing
    has reset it. Another state is a warning: something else than zeros was chosen on purpose.

    A flat batch ``[N]`` may hold sampled slices end to end, whose flags follow a ``done`` too;
    there only the state that a terminated step wrote is a problem.

    Args:
        batch: sequences ``[*, T]`` whose flags are valid.
        init_key: key of the flags.
        state_key: key of a recurrent state that they reset.

    Examples:
        >>> from tensordict import TensorDict
        >>> flags = torch.tensor([[[True], [False], [True]]])
        >>> done = torch.tensor([[[False], [True], [False]]])
        >>> batch = TensorDict({"is_init": flags, "h": torch.ones(1, 3, 1, 5)}, [1, 3])
        >>> batch["next"] = TensorDict({"done": done, "h": torch.ones(1, 3, 1, 5)}, [1, 3])
        >>> [problem] = find_episode_state_problems(batch, "is_init", "h")
        >>> problem.check, problem.error
        ('episode-state', <class 'ValueError'>)
    """
    state = _stepwise_state(batch, state_key)
    if state is None:
        return
    flags = read_is_init(batch, init_key)
    is_first = _valid(batch, flags & follow_done(batch, init_key, flags)).squeeze(-1)
    if not is_first.any():
        return
    wrong = is_first & state.flatten(is_first.ndim).any(-1)
    if not wrong.any():
        return
    kept = wrong & _is_kept(batch, state_key, wrong)
    if batch.ndim == 1:
        terminated = follow_done(batch, init_key, flags, "terminated").squeeze(-1)
        wrong = kept = kept & terminated
    if kept.any():
        yield _episode_state(kept, is_first, state_key, init_key, ValueError)
    elif wrong.any():
        yield _episode_state(wrong, is_first, state_key, init_key, UserWarning)


def _episode_state(
    wrong: Tensor,
    is_first: Tensor,
    state_key: NestedKey,
    init_key: NestedKey,
    error: type[Exception],
) -> Problem:
    origin = ", which is the one that the episode before ended with" if error is ValueError else ""
    return Problem(
        "episode-state",
        f"The state {state_key!r} is not zero at {int(wrong.sum())} of {int(is_first.sum())} first "
        f"steps of episodes, the first at {wrong.nonzero()[0].tolist()}{origin}. Single steps "
        "start episodes from zeros, and sequences from the stored state, so the two differ.",
        f"Store zeros there: batch.get({state_key!r})[batch.get({init_key!r}).squeeze(-1)] = 0. In "
        "environments the primers of get_primers_from_module(policy) do so.",
        error,
    )


def _is_kept(batch: TensorDictBase, state_key: NestedKey, like: Tensor) -> Tensor:
    """Return where a state is the one that the step before it wrote."""
    after = batch.get(next_key(state_key), None)
    if after is None:
        return torch.zeros_like(like)
    return (batch.get(state_key) == after.roll(1, batch.ndim - 1)).flatten(like.ndim).all(-1)


def find_zero_state_problems(
    batch: TensorDictBase,
    init_key: NestedKey,
    state_key: NestedKey,
    *,
    everywhere: bool = False,
) -> Iterator[Problem]:
    """Yield a problem (a warning) if states are zero at some steps inside episodes, not at all.

    Recurrent layers write other states. Zeros are there where something else acted, such as random
    actions during a warm-up. A batch whose states are zero throughout proves nothing by itself.

    Args:
        batch: sequences ``[*, T]`` whose flags are valid.
        init_key: key of the flags.
        state_key: key of a recurrent state that they reset.
        everywhere: whether states that are zero throughout are a problem too, because a policy is
            known to have collected the batch.

    Examples:
        >>> from tensordict import TensorDict
        >>> flags = torch.tensor([[True], [False], [False]])
        >>> after = torch.tensor([0.0, 0.0, 1.0]).reshape(3, 1, 1)
        >>> batch = TensorDict({"is_init": flags, "h": 0 * after, "next": {"h": after}}, [3])
        >>> [problem.error for problem in find_zero_state_problems(batch, "is_init", "h")]
        [<class 'UserWarning'>]
    """
    state, after = _stepwise_state(batch, state_key), batch.get(next_key(state_key), None)
    if state is None or after is None or after.shape != state.shape:
        return
    time, steps = batch.ndim - 1, state.shape[batch.ndim - 1] - 1
    carried = _valid(batch, ~find_segment_starts(batch, init_key)).squeeze(-1)
    carried = carried.narrow(time, 1, steps)
    arrives, leaves = state.narrow(time, 1, steps), after.narrow(time, 0, steps)
    # One feature shows nearly always that there is no zero state.
    zero = carried & (arrives.flatten(carried.ndim)[..., 0] == 0)
    if not zero.any():
        return
    zero &= ~(arrives.flatten(carried.ndim).any(-1) | leaves.flatten(carried.ndim).any(-1))
    if zero.any() and (everywhere or arrives.any() or leaves.any() or after.any()):
        yield Problem(
            "zero-state",
            f"The state {state_key!r} is zero at {int(zero.sum())} of {int(carried.sum())} steps "
            "inside episodes, so the recurrent layer did not run there: sequences that start at "
            "such steps start from a state that no policy had.",
            "Collect with the recurrent policy from the first frame (not with "
            "init_random_frames; explore with a module after the policy instead), or leave those "
            "frames out of the buffer.",
            UserWarning,
        )


def _stepwise_state(batch: TensorDictBase, key: NestedKey) -> Tensor | None:
    """Return a state that is stored for every step; None if there is none, or one step alone."""
    time, state = batch.ndim - 1, batch.get(key, None)
    # Windows lays out the one state that it stores for a window without a copy.
    if state is None or batch.shape[time] < 2 or state.stride(time) == 0:
        return None
    return state


def _valid(batch: TensorDictBase, flags: Tensor) -> Tensor:
    """Return the flags with those at padding False."""
    mask = read_mask(batch)
    if mask is None:
        return flags
    return flags & mask.reshape(*mask.shape, *[1] * (flags.ndim - mask.ndim))
