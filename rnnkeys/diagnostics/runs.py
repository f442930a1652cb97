"""Runs of a policy on a batch: sequences, single steps, and single steps from stored states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase, unravel_key
from torch import Tensor, nn

from ..keys import next_key
from ..mode import set_recurrent_mode
from ..modules.network import Recurrent, find_recurrent
from ..sequences.segment_starts import find_segment_starts

# A batch is looked at in part: single steps cost time, and a fault shows in the first rows.
_ROWS, _STEPS = 16, 64


class Staleness(NamedTuple):
    """How far what a policy makes of stored states is from what it makes of its own.

    Attributes:
        key: the entry that was compared, such as ``"action_value"``.
        age: steps since the start of the segment, int64 ``[N]``.
        difference: ``||q(stored) - q(recomputed)|| / max |q(recomputed)|``, float ``[N]``.
        is_last: whether a step ends its segment, bool ``[N]``.
    """

    key: Any
    age: Tensor
    difference: Tensor
    is_last: Tensor


def staleness_by_step(policy: nn.Module, batch: TensorDictBase) -> Staleness:
    """Measure how stale the stored states of a batch are for a policy as it is now.

    At every step the policy is run once from the state that is stored there, and once as a
    sequence from the start of the segment, with today's weights. Where a segment starts an episode
    the second is exact; elsewhere it still carries some of the stored start, and the measure is a
    lower bound. It is that of "Recurrent Experience Replay in Distributed Reinforcement Learning",
    Kapturowski et al., 2019 (R2D2), section 3; where whole episodes are at hand,
    ``rnnkeys.transforms.compute_staleness`` takes it from recomputed states.

    Args:
        policy: with recurrent modules inside.
        batch: sequences ``[N]`` or ``[*, T]`` with the states that were stored with them.

    Returns:
        The difference at every step.

    Raises:
        KeyError: if states or marks are not there.
        ValueError: if the policy writes nothing to compare.

    Examples:
        >>> from tensordict import TensorDict
        >>> from rnnkeys import GRUModule
        >>> gru = GRUModule(3, 5, in_key="observation", out_key="embed")
        >>> marks = torch.zeros(2, 7, 1, dtype=torch.bool)
        >>> batch = TensorDict(observation=torch.randn(2, 7, 3), is_init=marks, batch_size=[2, 7])
        >>> batch["recurrent_state"] = torch.zeros(2, 7, 1, 5)
        >>> found = staleness_by_step(gru, batch)
        >>> found.key, bool((found.difference[found.age == 0] < 1e-6).all())
        ('embed', True)
    """
    recurrent = find_recurrent(policy)
    for key in (key for one in recurrent for key in one.state_keys):
        if batch.get(key, None) is None:
            raise KeyError(
                f"There is no state {key!r} in this batch, so there is nothing whose staleness "
                "could be measured. Store it with the transitions."
            )
    with quietly(policy):
        whole = run_sequences(policy, batch, recurrent)
        single = run_from_stored(policy, batch, recurrent)
        key = _most_telling(find_outputs(policy, batch, whole, recurrent))
    lead = batch.ndim
    q, stored = (run.get(key).flatten(lead) for run in (whole, single))
    difference = (stored - q).norm(dim=-1) / q.abs().max().clamp_min(1e-12)
    starts = find_segment_starts(batch, recurrent[0].init_key).flatten(lead).any(-1)
    age = ages(starts)
    last = torch.cat([age[..., 1:] == 0, torch.ones_like(starts[..., :1])], -1)
    return Staleness(key, age.flatten(), difference.flatten(), last.flatten())


def _most_telling(keys: list[Any]) -> Any:
    """Choose values over parameters of actions over whatever there is."""
    wanted = ("action_value", "state_value", "state_action_value", "logits", "loc")
    names = [key if isinstance(key, str) else key[-1] for key in keys]
    for name in wanted:
        if name in names:
            return keys[names.index(name)]
    if not keys:
        raise ValueError("The policy writes nothing that could be compared.")
    return keys[-1]


def ages(starts: Tensor) -> Tensor:
    """Count the steps since the last start, ``[*, T]``; rows start at their first step.

    Examples:
        >>> ages(torch.tensor([False, False, True, False]))
        tensor([0, 1, 0, 1])
    """
    step = torch.arange(starts.shape[-1], device=starts.device).expand(starts.shape)
    return step - step.masked_fill(~starts, 0).cummax(-1).values


@contextmanager
def quietly(policy: nn.Module) -> Iterator[None]:
    """Run without gradient, without dropout, and without drawing from the random generators."""
    training = {module: module.training for module in policy.modules()}
    policy.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def largest_difference(policy: nn.Module, batch: TensorDictBase) -> tuple[Any, float]:
    """Compare sequences with single steps that carry the state by hand.

    Returns:
        The entry that differs most and its largest difference, relative to its largest value.
    """
    recurrent = find_recurrent(policy)
    with quietly(policy):
        whole = run_sequences(policy, batch, recurrent)
        single = run_by_steps(policy, batch, recurrent)
        keys = find_outputs(policy, batch, whole, recurrent)
    worst: tuple[Any, float] = (None, 0.0)
    for key in keys:
        expected = single.get(key)
        scale = expected.abs().max().clamp_min(1e-12)
        difference = float((whole.get(key) - expected).abs().max() / scale)
        if not difference <= worst[1]:
            worst = key, difference
    return worst


def part_of(batch: TensorDictBase) -> TensorDictBase:
    """Return the first rows and steps of a batch, as many as are worth running."""
    if batch.ndim == 1:
        part: Any = batch[: 4 * _STEPS]
    else:
        part = batch.reshape(-1, batch.shape[-1])[:_ROWS, :_STEPS]
    return part


def run_sequences(policy: Any, batch: TensorDictBase, recurrent: list[Recurrent]) -> TensorDictBase:
    """Run whole sequences."""
    with set_recurrent_mode(True):
        return policy(_view(batch, recurrent))


def run_from_stored(
    policy: Any, batch: TensorDictBase, recurrent: list[Recurrent]
) -> TensorDictBase:
    """Run every step by itself, from the state stored there."""
    view = _view(batch, recurrent)
    for one in recurrent:
        view.set(one.init_key, torch.zeros_like(view.get(one.init_key)))
    with set_recurrent_mode(False):
        return policy(view)


def run_by_steps(policy: Any, batch: TensorDictBase, recurrent: list[Recurrent]) -> TensorDictBase:
    """Run one step after the other; segments start from the state stored at their first step."""
    view, time = _view(batch, recurrent), batch.ndim - 1
    before, outputs = None, []
    with set_recurrent_mode(False):
        for t in range(batch.shape[time]):
            step: Any = view[..., t].clone()
            _hand_on(recurrent, step, before)
            before = policy(step)
            outputs.append(before.select(*policy.out_keys, strict=False))
    stacked: Any = torch.stack(outputs, time)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return stacked


def _hand_on(
    recurrent: list[Recurrent], step: TensorDictBase, before: TensorDictBase | None
) -> None:
    marks = {one.init_key: step.get(one.init_key) for one in recurrent}
    for one in recurrent:
        stored = [step.get(key, None) for key in one.state_keys]
        fresh = marks[one.init_key]
        # The state is chosen here: a module that zeroes it would not see what is stored. Where
        # nothing is stored, at the first step, zeros are right.
        step.set(one.init_key, torch.full_like(fresh, before is None and None in stored))
        if before is None:
            continue
        for key, state in zip(one.state_keys, stored, strict=True):
            carried = before.get(next_key(key))
            wide = fresh.reshape(*fresh.shape[:-1], *[1] * (carried.ndim - fresh.ndim + 1))
            fallback = torch.zeros_like(carried) if state is None else state
            step.set(key, torch.where(wide, fallback, carried))


def _view(batch: TensorDictBase, recurrent: list[Recurrent]) -> TensorDictBase:
    """Return a copy of the root, every start in it marked."""
    view = batch.exclude("next").clone(recurse=False)
    for one in recurrent:
        view.set(one.init_key, find_segment_starts(batch, one.init_key))
    return view


def find_outputs(
    policy: Any, batch: TensorDictBase, whole: TensorDictBase, recurrent: list[Recurrent]
) -> list[Any]:
    """Return the keys that the policy writes as numbers, states and random entries left out."""
    states = {next_key(key) for one in recurrent for key in one.state_keys}
    again = run_sequences(policy, batch, recurrent)
    keys = []
    for key in map(unravel_key, policy.out_keys):
        value = whole.get(key, None)
        if key in states or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if torch.equal(value.nan_to_num(), again.get(key).nan_to_num()):
            keys.append(key)
    return keys
