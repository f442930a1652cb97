"""Checks of a batch: flags, the order of time, and the states that sequences start from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key

from ..checks import Problem, find_meta_problems, find_multi_step_problems
from ..checks.losses import LONGER_RETURNS
from ..keys import MASK_KEY, MULTI_STEP_KEY, TRAJECTORY_KEY, next_key
from ..modules.network import RecurrentLayer
from ..sequences import find_segment_starts, find_sequence_problems
from ..sequences.continuity import find_continuity_problems
from ..sequences.segment_starts import reduce_agents
from ..sequences.segments import Segments
from ..sequences.stored_states import find_zero_state_problems

_READER = "check_recurrent_policy"


def find_data_problems(batch: TensorDictBase, layers: list[RecurrentLayer]) -> Iterator[Problem]:
    """Yield problems of a batch as sequences for recurrent modules.

    Args:
        batch: ``[N]`` or ``[*, T]``.
        layers: the recurrent modules that run on it and whose states it must hold.
    """
    early = [
        *(one for key in batch.keys() for one in find_meta_problems(batch, key, _READER)),
        *find_multi_step_problems(batch, MULTI_STEP_KEY, LONGER_RETURNS),
    ]
    yield from early
    if early:
        return
    pairs = [(key, layer.init_key) for layer in layers for key in layer.state_keys]
    init_keys = list(dict.fromkeys(unravel_key(one.init_key) for one in layers)) or ["is_init"]
    problems = list(find_sequence_problems(batch, init_keys, pairs, read_values=True))
    for problem in problems:
        if problem.check == "continuity":
            problem = _find_time(batch, init_keys, pairs) or problem
        yield problem
    if not problems:
        for layer in layers:
            yield from _find_state_problems(batch, layer)
        for key, init_key in pairs:
            yield from find_zero_state_problems(Segments(batch, init_key), key, everywhere=True)


def _find_time(
    batch: TensorDictBase, init_keys: list[Any], pairs: Iterable[tuple[Any, Any]]
) -> Problem | None:
    """Return a problem if time is another dimension than the last one."""
    time = batch.ndim - 1
    states = [key for key, _ in pairs]
    keys = [*init_keys, *states, *map(next_key, states), TRAJECTORY_KEY, MASK_KEY]
    keys += ["step_count", ("next", "step_count"), ("next", "done")]
    for dim in range(time):
        moved = batch.select(*keys, strict=False).transpose(dim, time)
        found = (
            problem
            for key in init_keys
            for problem in find_continuity_problems(moved, key, [s for s, i in pairs if i == key])
        )
        if next(found, None) is None:
            return Problem(
                "time-not-last",
                f"Time is dimension {dim} of the batch {list(batch.shape)}; recurrent mode takes "
                "the last one for time.",
                f"batch = batch.transpose({dim}, {time})",
            )
    return None


def _find_state_problems(batch: TensorDictBase, layer: RecurrentLayer) -> Iterator[Problem]:
    missing = [key for key in layer.state_keys if batch.get(key, None) is None]
    name = layer.name
    if 0 < len(missing) < len(layer.state_keys):
        yield Problem(
            "state-missing",
            f"The batch holds a part of the state of {name}, and not {missing}.",
            f"Store {missing} with the transitions.",
        )
    elif missing and _starts_inside_episodes(batch, layer):
        yield Problem(
            "state-missing",
            f"The batch holds no state {missing} for {name}, and its sequences do not all start "
            "with episodes: those run from zeros instead.",
            f"Store {missing} with the transitions: collect with the primers of "
            "get_env_transforms_from_module(policy).",
        )


def _starts_inside_episodes(batch: TensorDictBase, layer: RecurrentLayer) -> bool:
    """Return whether a sequence may start inside an episode, as far as the batch shows."""
    starts = reduce_agents(find_segment_starts(batch, layer.init_key), batch.ndim).clone()
    flagged_first = starts[..., 0].clone()
    starts[..., 0] = True
    count = _read_step_count(batch)
    if count is not None:
        return bool((count[starts] != 0).any())
    # Samplers of slices flag starts that are not those of episodes; rows of a collector do not.
    is_sampled = batch.get("index", None) is not None
    is_sampled = is_sampled and batch.get(("next", "index"), None) is None
    return is_sampled or not bool(flagged_first.all())


def _read_step_count(batch: TensorDictBase) -> Any:
    """Return the counts of StepCounter, ``[*, T]``; None if ``step_count`` is another entry."""
    count, after = batch.get("step_count", None), batch.get(("next", "step_count"), None)
    if count is None or after is None or count.numel() != batch.batch_size.numel():
        return None
    return count.reshape(batch.shape) if torch.equal(after, count + 1) else None


def is_next_flagged(batch: TensorDictBase, init_key: Any) -> bool:
    """Return whether every segment start is flagged in the ``next`` tensordict too."""
    starts = find_segment_starts(batch, init_key)
    flags = batch.get(next_key(init_key), None)
    if flags is None or flags.dtype is not torch.bool or flags.shape != starts.shape:
        return False
    # The first step of a row starts a segment there as well, flagged or not.
    time = batch.ndim - 1
    return bool((flags | ~starts).narrow(time, 1, batch.shape[time] - 1).all())
