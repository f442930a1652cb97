"""The check of continuity: each step follows the step before it, or is a flagged start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from ..checks import Problem
from ..keys import TRAJECTORY_KEY, next_key
from .segment_starts import reduce_agents
from .segments import Segments, select_features

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


def find_continuity_problems(
    batch: TensorDictBase, init_key: NestedKey, state_keys: Iterable[NestedKey] = ()
) -> Iterator[Problem]:
    """Yield a problem if a step neither follows the step before it nor is a flagged start.

    The evidence is in entries that TorchRL and recurrent modules write into the batch:

    - trajectory ids ``("collector", "traj_ids")`` must not change inside a segment;
    - a recurrent state must be the one that the step before wrote, ``("next", state)``;
    - a counter at ``"step_count"`` must continue as ``("next", "step_count")`` does;
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
    keys = [TRAJECTORY_KEY, "step_count", "index", *state_keys]
    # Segments take some time to find, and show nothing without evidence.
    if batch.shape[batch.ndim - 1] > 1 and any(batch.get(key, None) is not None for key in keys):
        yield from find_breaks(Segments(batch, init_key), state_keys)


def find_breaks(
    segments: Segments, state_keys: Iterable[NestedKey], known: bool = False
) -> Iterator[Problem]:
    """Yield the problem of :func:`find_continuity_problems` for segments that have been found.

    Args:
        segments: of a batch ``[*, T]`` of at least two steps.
        state_keys: keys of the recurrent states that their flags reset.
        known: whether other evidence has shown already that steps follow each other, so that the
            index of a replay buffer is not read.
    """
    for evidence in _find_evidence(segments, state_keys, known):
        if evidence.breaks.any():
            yield _discontinuity(evidence, segments.init_key)
            return


class _Evidence(NamedTuple):
    """Where ``[*, T - 1]`` a step inside a segment does not follow the one before, and why."""

    key: Any
    breaks: Tensor
    reason: str
    remedy: str = _REMEDY


def _discontinuity(evidence: _Evidence, init_key: NestedKey) -> Problem:
    breaks = evidence.breaks
    where = breaks.nonzero()[0].tolist()
    where[-1] += 1
    return Problem(
        "continuity",
        f"Time is not contiguous in this batch: {int(breaks.sum())} of {breaks.numel()} steps do "
        f"not follow the step before them, the first at {where} ({evidence.key!r} "
        f"{evidence.reason}), and {init_key!r} flags no segment start there.",
        evidence.remedy,
    )


def _find_evidence(
    segments: Segments, state_keys: Iterable[NestedKey], known: bool
) -> Iterator[_Evidence]:
    batch = segments.batch
    inside = segments.clear_padding(~reduce_agents(segments.starts, batch.ndim))[..., 1:]
    ids = batch.get(TRAJECTORY_KEY, None)
    if ids is not None and ids.numel() == batch.batch_size.numel():
        known = True
        changes = ids.reshape(batch.batch_size).diff(dim=-1) != 0
        yield _Evidence(TRAJECTORY_KEY, changes & inside, "changes")
    for key in state_keys:
        evidence = _compare_states(segments, key)
        if evidence is not None:
            known = True
            yield evidence
    counts = _compare_counts(segments)
    if counts is not None:
        known = True
        yield _Evidence("step_count", counts & inside, "does not continue ('next', 'step_count')")
    jumps = None if known else _compare_index(batch)
    if jumps is not None:
        yield _Evidence("index", jumps & inside, "does not grow by one")


def _compare_states(segments: Segments, key: NestedKey) -> _Evidence | None:
    """Compare each state with the one that the step before wrote; None if they prove nothing."""
    state = segments.read_state(key)
    time = segments.time
    after = None if state is None else segments.read_next_state(key, state)
    if state is None or after is None:
        return None
    carried = segments.carried
    is_compact = False
    enters, written = select_features(state), select_features(after)
    arrives, leaves = segments.drop_first(enters), segments.drop_last(written)
    breaks = (arrives != leaves).flatten(carried.ndim).any(-1) & carried
    if breaks.any():
        size = (arrives - leaves).abs().flatten(carried.ndim).amax(-1)
        scale = enters.nan_to_num(0.0, 0.0, 0.0).abs().amax()
        breaks = breaks & (size > _TOLERANCE * scale) & ~_is_constant(enters, time, carried.ndim)
        is_compact = bool(breaks.any()) and not after.any()
    return _Evidence(
        key,
        reduce_agents(breaks.unsqueeze(-1), segments.batch.ndim),
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


def _compare_counts(segments: Segments) -> Tensor | None:
    """Return where ``step_count`` does not continue; None if it does not count steps.

    Only counts like those of StepCounter are read: integers that are one larger in ``next``.
    """
    batch = segments.batch
    count, following = batch.get("step_count", None), batch.get(("next", "step_count"), None)
    size = batch.batch_size.numel()
    if count is None or following is None or count.numel() != size or following.numel() != size:
        return None
    if count.is_floating_point() or count.dtype is torch.bool:
        return None
    count, following = count.reshape(batch.batch_size), following.reshape(batch.batch_size)
    if segments.clear_padding(following != count + 1).any():
        return None
    return count[..., 1:] != following[..., :-1]


def _compare_index(batch: TensorDictBase) -> Tensor | None:
    """Return where ``index`` does not grow by one; None if no replay buffer wrote it.

    A replay buffer writes integers ``[*, T]`` or, for a storage of several dimensions, ``[*, T,
    dims]``, at the root alone. An entry of the environment is in ``next`` as well.
    """
    index = batch.get("index", None)
    ndim = batch.ndim
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
