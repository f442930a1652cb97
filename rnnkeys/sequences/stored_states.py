"""Checks of the states that a batch stores, by the rules of single steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from ..checks import Problem
from .segment_starts import find_steps_after_done
from .segments import Segments, select_features


def states_are_right(segments: Segments, state_keys: list[NestedKey]) -> bool:
    """Return whether all stored states together pass every check of this file.

    False proves nothing: then every state has to be checked by itself.

    Args:
        segments: of a batch whose entries are valid.
        state_keys: keys of the recurrent states that the flags reset.

    Examples:
        >>> from tensordict import TensorDict
        >>> flags, after = torch.tensor([[True], [False]]), torch.rand(2, 1, 5)
        >>> before = torch.cat([0 * after[:1], after[:1]])
        >>> batch = TensorDict({"is_init": flags, "h": before, "next": {"h": after}}, [2])
        >>> states_are_right(Segments(batch, "is_init"), ["h"])
        True
    """
    entering, written = [], []
    for key in state_keys:
        state = segments.read_state(key)
        after = None if state is None else segments.read_next_state(key, state)
        if state is None or after is None:
            return False
        entering.append(select_features(state))
        written.append(select_features(after))
    if not entering or any(state.shape[:-1] != entering[0].shape[:-1] for state in entering):
        return False
    states, after = torch.cat(entering, -1), torch.cat(written, -1)
    carried, arrives = segments.carried, segments.drop_first(states)
    wrong = (arrives != segments.drop_last(after)) | (arrives == 0)
    if (wrong.flatten(carried.ndim).any(-1) & carried).any():
        return False
    is_first = segments.clear_padding(segments.flags & segments.after_done).squeeze(-1)
    return not states[is_first].any()


def find_episode_state_problems(segments: Segments, state_key: NestedKey) -> Iterator[Problem]:
    """Yield a problem (a warning) if a state stored at the first step of an episode is not zero.

    Single steps start episodes from zeros, and sequences start segments from the stored state: the
    two agree only if zeros are stored there. A flag that follows a ``done`` in its row is an
    episode's. Buffers that keep the state from before the reset store another one.

    A flat batch ``[N]`` may hold sampled slices end to end, whose flags follow a ``done`` too;
    there only the state that a terminated step wrote is a problem.

    Args:
        segments: of a batch whose entries are valid.
        state_key: key of a recurrent state that the flags reset.

    Examples:
        >>> from tensordict import TensorDict
        >>> flags = torch.tensor([[[True], [False], [True]]])
        >>> done = torch.tensor([[[False], [True], [False]]])
        >>> batch = TensorDict({"is_init": flags, "h": torch.ones(1, 3, 1, 5)}, [1, 3])
        >>> batch["next"] = TensorDict({"done": done, "h": torch.ones(1, 3, 1, 5)}, [1, 3])
        >>> [problem] = find_episode_state_problems(Segments(batch, "is_init"), "h")
        >>> problem.check, problem.error
        ('episode-state', <class 'UserWarning'>)
    """
    state = segments.read_state(state_key)
    if state is None:
        return
    is_first = segments.clear_padding(segments.flags & segments.after_done).squeeze(-1)
    wrong = torch.zeros_like(is_first)
    # The states of first steps alone: there are few of them.
    wrong[is_first] = state[is_first].flatten(1).any(-1)
    if not wrong.any():
        return
    if segments.batch.ndim == 1:
        terminated = find_steps_after_done(
            segments.batch, segments.init_key, segments.flags, "terminated"
        )
        wrong &= terminated.squeeze(-1) & _is_kept(segments, state_key, state, wrong)
    if wrong.any():
        yield Problem(
            "episode-state",
            f"The state {state_key!r} is not zero at {int(wrong.sum())} first steps of episodes, "
            f"the first at {wrong.nonzero()[0].tolist()}. Single steps start episodes from zeros, "
            "and sequences from the stored state, so the two differ.",
            f"Store zeros there: batch.get({state_key!r})[batch.get({segments.init_key!r})"
            ".squeeze(-1)] = 0. In environments the primers of get_primers_from_module(policy) do "
            "so.",
            UserWarning,
        )


def _is_kept(segments: Segments, state_key: NestedKey, state: Tensor, like: Tensor) -> Tensor:
    """Return where a state is the one that the step before it wrote."""
    after = segments.read_next_state(state_key, state)
    if after is None:
        return torch.zeros_like(like)
    return (state == after.roll(1, segments.time)).flatten(like.ndim).all(-1)


def find_zero_state_problems(
    segments: Segments, state_key: NestedKey, *, everywhere: bool = False
) -> Iterator[Problem]:
    """Yield a problem (a warning) if states are zero at some, but not all, steps inside episodes.

    Recurrent layers write other states. Zeros are stored where something else acted, such as random
    actions during a warm-up. A batch whose states are zero throughout proves nothing by itself.

    Args:
        segments: of a batch whose entries are valid.
        state_key: key of a recurrent state that the flags reset.
        everywhere: whether states that are zero throughout are a problem too, because a policy is
            known to have collected the batch.

    Examples:
        >>> from tensordict import TensorDict
        >>> flags = torch.tensor([[True], [False], [False]])
        >>> after = torch.tensor([0.0, 0.0, 1.0]).reshape(3, 1, 1)
        >>> batch = TensorDict({"is_init": flags, "h": 0 * after, "next": {"h": after}}, [3])
        >>> segments = Segments(batch, "is_init")
        >>> [problem.error for problem in find_zero_state_problems(segments, "h")]
        [<class 'UserWarning'>]
    """
    state = segments.read_state(state_key)
    after = None if state is None else segments.read_next_state(state_key, state)
    if state is None or after is None:
        return
    carried = segments.carried
    arrives, leaves = segments.drop_first(state), segments.drop_last(after)
    # One feature shows nearly always that there is no zero state.
    zero = carried & (arrives.flatten(carried.ndim)[..., 0] == 0)
    if not zero.any():
        return
    zero &= ~(arrives.flatten(carried.ndim).any(-1) | leaves.flatten(carried.ndim).any(-1))
    if zero.any() and (everywhere or state.any() or after.any()):
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
