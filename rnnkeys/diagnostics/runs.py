"""Runs of a policy on a batch: sequences, single steps, and single steps from stored states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase, unravel_key
from torch import Tensor, nn

from ..keys import next_key
from ..modules.network import RecurrentNetwork, eval_mode
from ..sequences import find_segment_starts, set_segment_starts
from ..sequences.segment_starts import expand_flags, reduce_agents
from ..transforms.staleness import value_discrepancy

# A part of a batch is enough: single steps take time, and a fault shows in the first rows.
_ROWS, _STEPS = 16, 64
_VALUES = ("action_value", "state_value", "state_action_value", "logits", "loc")


class Staleness(NamedTuple):
    """Staleness of the state that is stored at each step of sequences.

    Attributes:
        key: the entry that was compared, such as ``"action_value"``.
        age: steps since the start of the segment, int64 ``[N]``.
        difference: of :func:`rnnkeys.transforms.staleness.value_discrepancy`, ``[N]``.
        is_last: whether a step ends its segment, bool ``[N]``.
    """

    key: Any
    age: Tensor
    difference: Tensor
    is_last: Tensor


def staleness_by_step(policy: nn.Module, batch: TensorDictBase) -> Staleness:
    """Measure how stale the states stored at the steps of a batch are for the current weights.

    At every step the policy runs once from the state that is stored there, and once as a sequence
    from the start of the segment. A window that starts at the step would have that staleness at its
    first step. Where a segment starts inside an episode, its own initial state is stale too, so
    that the result is too small; for whole episodes
    :func:`rnnkeys.transforms.measure_staleness` recomputes all states.

    Args:
        policy: with recurrent modules inside.
        batch: sequences ``[N]`` or ``[*, T]`` with a stored state at every step.

    Returns:
        The staleness at every step.

    Raises:
        KeyError: if states or flags are missing.
        ValueError: if the policy writes nothing that can be compared.

    Examples:
        >>> from tensordict import TensorDict
        >>> from rnnkeys import GRUModule
        >>> gru = GRUModule(3, 5, in_key="observation", out_key="embed")
        >>> flags = torch.zeros(2, 7, 1, dtype=torch.bool)
        >>> batch = TensorDict(observation=torch.randn(2, 7, 3), is_init=flags, batch_size=[2, 7])
        >>> batch["recurrent_state"] = torch.zeros(2, 7, 1, 5)
        >>> found = staleness_by_step(gru, batch)
        >>> found.key, bool((found.difference[found.age == 0] < 1e-5).all())
        ('embed', True)
    """
    network = RecurrentNetwork(policy)
    for key in network.state_keys:
        if batch.get(key, None) is None:
            raise KeyError(
                f"There is no state {key!r} in the batch, so its staleness cannot be measured. "
                "Store it with the transitions."
            )
    with evaluating(policy):
        whole = run_sequences(network, batch)
        single = run_from_stored(network, batch)
        key = _choose_value(find_outputs(network, batch, whole))
    lead = batch.ndim
    true, stale = (run.get(key).flatten(lead) for run in (whole, single))
    difference = value_discrepancy(stale, true)
    age = compute_ages(reduce_agents(find_segment_starts(batch, network.init_keys[0]), lead))
    last = torch.cat([age[..., 1:] == 0, torch.ones_like(age[..., :1], dtype=torch.bool)], -1)
    return Staleness(key, age.flatten(), difference.flatten(), last.flatten())


def _choose_value(keys: list[Any]) -> Any:
    """Return values rather than parameters of distributions, rather than any other entry."""
    names = [key if isinstance(key, str) else key[-1] for key in keys]
    for name in _VALUES:
        if name in names:
            return keys[names.index(name)]
    if not keys:
        raise ValueError(
            "The policy writes nothing that can be compared. Expected a floating-point entry that "
            "is not random."
        )
    return keys[-1]


def compute_ages(starts: Tensor) -> Tensor:
    """Count the steps since the last segment start, ``[*, T]``; rows start at their first step.

    Examples:
        >>> compute_ages(torch.tensor([False, False, True, False]))
        tensor([0, 1, 0, 1])
    """
    step = torch.arange(starts.shape[-1], device=starts.device).expand(starts.shape)
    return step - step.masked_fill(~starts, 0).cummax(-1).values


@contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """Run without gradient, in eval mode, and without advancing the random generators."""
    with eval_mode(policy), torch.random.fork_rng():
        yield


def largest_difference(network: RecurrentNetwork, batch: TensorDictBase) -> tuple[Any, float]:
    """Compare sequences with single steps that carry the state.

    Returns:
        The entry that differs most, and its largest difference relative to its largest value.
    """
    whole = run_sequences(network, batch)
    single = run_by_steps(network, batch)
    worst: tuple[Any, float] = (None, 0.0)
    for key in find_outputs(network, batch, whole):
        difference = relative_difference(whole.get(key), single.get(key))
        if not difference <= worst[1]:
            worst = key, difference
    return worst


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value.

    Examples:
        >>> relative_difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0]))
        0.25
    """
    scale = expected.abs().max().clamp_min(1e-12)
    return float((actual - expected).abs().max() / scale)


def select_part(batch: TensorDictBase) -> TensorDictBase:
    """Return the first rows and steps of a batch, as many as are worth running."""
    if batch.ndim == 1:
        part: Any = batch[: 4 * _STEPS]
    else:
        part = batch.reshape(-1, batch.shape[-1])[:_ROWS, :_STEPS]
    return part


def run_sequences(network: RecurrentNetwork, batch: TensorDictBase) -> TensorDictBase:
    """Run whole sequences, with every segment start flagged."""
    return network.run_sequences(set_segment_starts(batch, network.init_keys))


def run_from_stored(network: RecurrentNetwork, batch: TensorDictBase) -> TensorDictBase:
    """Run every step alone, from the state that is stored there."""
    steps = batch.copy()
    for key in network.init_keys:
        steps.set(key, torch.zeros_like(batch.get(key)))
    return network.run_step(steps)


def run_by_steps(network: RecurrentNetwork, batch: TensorDictBase) -> TensorDictBase:
    """Run one step after the other; segments start from the state stored at their first step."""
    flagged = set_segment_starts(batch, network.init_keys)
    time = batch.ndim - 1
    before = None
    outputs: Any = []
    policy: Any = network.network
    for t in range(batch.shape[time]):
        view: Any = flagged[..., t]
        step = view.copy()
        _carry_states(network, step, before)
        before = network.run_step(step)
        outputs.append(before.select(*policy.out_keys, *map(next_key, network.state_keys)))
    stacked: Any = torch.stack(outputs, time)
    return stacked


def _carry_states(
    network: RecurrentNetwork, step: TensorDictBase, before: TensorDictBase | None
) -> None:
    """Write the states that enter a step, and flags that keep the module from zeroing them."""
    flags = {key: step.get(key) for key in network.init_keys}
    missing = [key for key in network.state_keys if step.get(key, None) is None]
    for key in network.init_keys:
        # At the first step zeros are right where no state is stored.
        step.set(key, torch.full_like(flags[key], before is None and bool(missing)))
    if before is None:
        return
    for key, init_key in network.pairs:
        carried = before.get(next_key(key))
        stored = step.get(key, None)
        stored = torch.zeros_like(carried) if stored is None else stored
        step.set(key, torch.where(expand_flags(flags[init_key], carried), stored, carried))


def find_outputs(
    network: RecurrentNetwork, batch: TensorDictBase, whole: TensorDictBase
) -> list[Any]:
    """Return the floating-point entries that the policy writes, without states and random ones."""
    policy: Any = network.network
    states = set(map(next_key, network.state_keys))
    again = run_sequences(network, batch)
    keys = []
    for key in map(unravel_key, policy.out_keys):
        value = whole.get(key, None)
        if key in states or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if torch.equal(value.nan_to_num(), again.get(key).nan_to_num()):
            keys.append(key)
    return keys
