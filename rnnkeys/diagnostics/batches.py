"""Checks of a batch: marks, order of time, and the states that sequences start from."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from torch import Tensor

from ..keys import MULTI_STEP_KEY, next_key
from ..modules.network import Recurrent
from ..sequences.continuity import find_continuity_problems
from ..sequences.segment_starts import find_segment_starts, read_is_init
from .report import Report

_CLOCKS = ("step_count", ("collector", "traj_ids"), ("collector", "mask"), "index")


def check_batch(batch: TensorDictBase, recurrent: list[Recurrent], report: Report) -> bool:
    """Check that a batch holds sequences with their starts marked and their states.

    Returns:
        Whether sequences can be run on it.
    """
    before = len(report)
    if batch.get(MULTI_STEP_KEY, None) is not None:
        report.add(
            "multi-step",
            f"the batch holds multi-step transitions ({MULTI_STEP_KEY!r}): its next view jumps "
            "several steps, which is no sequence that a network with memory can run",
            "take MultiStepTransform away; loss.make_value_estimator(ValueEstimators.TDLambda, "
            "gamma=..., lmbda=...) gives longer returns",
        )
    for key in dict.fromkeys(unravel_key(one.init_key) for one in recurrent) or ["is_init"]:
        if _check_marks(batch, key, report):
            _check_time(batch, key, recurrent, report)
    runnable = len(report) == before
    if runnable:
        runnable = all([_check_states(batch, one, report) for one in recurrent])
    return runnable


def _check_marks(batch: TensorDictBase, key: Any, report: Report) -> bool:
    try:
        read_is_init(batch, key)
    except (KeyError, TypeError, ValueError) as error:
        report.add(
            "init-key",
            str(error.args[0]),
            "store InitTracker's mark with the transitions, bool and of shape [*batch, 1]",
        )
        return False
    return True


def _check_time(
    batch: TensorDictBase, key: Any, recurrent: list[Recurrent], report: Report
) -> None:
    if _is_contiguous(batch, key):
        lies = _dimension_of_states(batch, recurrent)
    else:
        others = range(batch.ndim - 1)
        lies = next((dim for dim in others if _is_contiguous(_moved(batch, dim, key), key)), None)
        if lies is None:
            report.add(
                "single-transitions",
                "steps do not follow the step before them, and no start is marked there: these are "
                "single transitions, which a network with memory cannot run as sequences",
                "draw slices: TensorDictReplayBuffer(storage=..., sampler=SliceSampler("
                "slice_len=...), ...)",
            )
    if lies is not None and lies != batch.ndim - 1:
        report.add(
            "time-not-last",
            f"time is dimension {lies} of the batch {list(batch.shape)}; recurrent mode takes the "
            "last one for time",
            f"batch = batch.transpose({lies}, {batch.ndim - 1})",
        )


def _moved(batch: TensorDictBase, dim: int, key: Any) -> TensorDictBase:
    clocks = batch.select(key, *_CLOCKS, ("next", "done"), strict=False)
    return clocks.transpose(dim, batch.ndim - 1)


def _is_contiguous(batch: TensorDictBase, key: Any) -> bool:
    return not list(find_continuity_problems(batch, key))


def _dimension_of_states(batch: TensorDictBase, recurrent: list[Recurrent]) -> int | None:
    """Find the one dimension along which states are handed on, where they tell."""
    if batch.ndim < 2:
        return None
    for one in recurrent:
        for key in one.state_keys:
            read, wrote = batch.get(key, None), batch.get(next_key(key), None)
            if read is None or wrote is None:
                continue
            marks = batch.get(one.init_key).flatten(batch.ndim).any(-1)
            hands_on = [d for d in range(batch.ndim) if _hands_on(read, wrote, marks, d)]
            return hands_on[0] if len(hands_on) == 1 else None
    return None


def _hands_on(read: Tensor, wrote: Tensor, marks: Tensor, dim: int) -> bool:
    steps = read.shape[dim] - 1
    same = (read.narrow(dim, 1, steps) == wrote.narrow(dim, 0, steps)).flatten(marks.ndim).all(-1)
    inside = ~marks.narrow(dim, 1, steps)
    return bool(inside.any() and same[inside].all())


def _check_states(batch: TensorDictBase, recurrent: Recurrent, report: Report) -> bool:
    """Check that sequences find the states they start from; returns whether they can be run."""
    missing = [key for key in recurrent.state_keys if batch.get(key, None) is None]
    name = type(recurrent.module).__name__
    if 0 < len(missing) < len(recurrent.state_keys):
        report.add(
            "state-not-stored",
            f"the batch holds a part of the state of {name}, and not {missing}",
            f"store {missing} with the transitions",
        )
        return False
    if missing and _starts_inside_of_episodes(batch, recurrent):
        report.add(
            "state-not-stored",
            f"the batch holds no state {missing} for {name}, and its sequences do not all start "
            "where episodes do: those run from zeros instead",
            f"store {missing} with the transitions (collect with the primer, and with every "
            "network that keeps a state)",
        )
    return True


def _starts_inside_of_episodes(batch: TensorDictBase, recurrent: Recurrent) -> bool:
    """Whether a sequence may start inside of an episode, as far as the batch says."""
    starts = find_segment_starts(batch, recurrent.init_key).flatten(batch.ndim).any(-1).clone()
    marked_first = starts[..., 0].clone()
    starts[..., 0] = True
    count = batch.get("step_count", None)
    if count is not None and count.numel() == starts.numel():
        return bool((count.reshape(starts.shape)[starts] != 0).any())
    # Samplers of slices mark starts that are none of episodes; rows of a collector do not.
    sampled = batch.get("index", None) is not None
    return sampled or not bool(marked_first.all())


def next_view_is_marked(batch: TensorDictBase, init_key: Any) -> bool:
    """Tell whether every start in a batch is marked in its next view too."""
    starts = find_segment_starts(batch, init_key)
    ahead = batch.get(next_key(init_key), None)
    if ahead is None or ahead.dtype is not torch.bool or ahead.shape != starts.shape:
        return False
    # The first step of a row is the first one of its next view too, marked or not.
    time = batch.ndim - 1
    steps = batch.shape[time] - 1
    return bool((ahead | ~starts).narrow(time, 1, steps).all())
