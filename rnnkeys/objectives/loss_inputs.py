"""Entries of a batch that a loss drops although one of its networks reads them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from tensordict import TensorDictBase, unravel_key
from tensordict.nn import TensorDictSequential
from tensordict.utils import NestedKey
from torchrl.objectives import IQLLoss, LossModule, REDQLoss, SACLoss, TD3BCLoss, TD3Loss

# Losses that select the inputs of one network from a batch before others run on the selection.
_SELECTIONS: tuple[tuple[tuple[type[LossModule], ...], str, tuple[str, ...]], ...] = (
    ((TD3Loss, TD3BCLoss, REDQLoss, IQLLoss), "actor_network", ("qvalue_network",)),
    ((SACLoss,), "value_network", ("actor_network", "qvalue_network")),
)


def find_dropped_keys(loss: Any) -> list[NestedKey]:
    """Return the keys of entries that a loss drops although one of its networks reads them.

    Examples:
        >>> from torchrl.objectives.value import TD0Estimator
        >>> find_dropped_keys(TD0Estimator(gamma=0.9, value_network=None))
        []
    """
    return [key for _, keys in _find_selections(loss) for key in keys]


def _find_selections(loss: Any) -> Iterator[tuple[str, list[NestedKey]]]:
    """Yield the name of each network whose inputs are selected, and the keys that others miss."""
    for kinds, first, others in _SELECTIONS:
        network = getattr(loss, first, None)
        if network is None or not isinstance(loss, kinds):
            continue
        held = [unravel_key(key) for key in (*network.in_keys, *network.out_keys)]
        wanted = (unravel_key(key) for other in others for key in getattr(loss, other).in_keys)
        keys: Any = loss.tensor_keys
        action = unravel_key(keys.action)
        yield first, [key for key in dict.fromkeys(wanted) if key not in held and key != action]


def keep_dropped_keys(loss: Any) -> None:
    """Make a loss keep the entries of :func:`find_dropped_keys`, in place.

    Raises:
        ValueError: if the network whose inputs are selected is not a ``TensorDictSequential``.
    """
    for name, dropped in _find_selections(loss):
        if dropped:
            vars(loss)[name] = _with_in_keys(loss, name, getattr(loss, name), dropped)
            loss._set_in_keys()


def keep_masks(loss: IQLLoss, batch: TensorDictBase, mask_keys: tuple[NestedKey, ...]) -> None:
    """Make IQL keep the masks that it drops before the loss of its critic looks for them."""
    network: Any = loss.actor_network
    there = [unravel_key(key) for key in mask_keys if batch.get(key, None) is not None]
    dropped = [key for key in there if key not in network.in_keys]
    if dropped:
        vars(loss)["actor_network"] = _with_in_keys(loss, "actor_network", network, dropped)


def _with_in_keys(loss: Any, name: str, network: Any, keys: list[NestedKey]) -> Any:
    """Return a copy of a network (same submodules) whose ``in_keys`` name more entries."""
    if not isinstance(network, TensorDictSequential):
        raise ValueError(
            f"{type(loss).__name__} would drop the entries {keys} that its other networks read. To "
            f"keep them, its {name} must be a TensorDictSequential. Got {type(network).__name__}: "
            f"wrap it, TensorDictSequential({name}). [dropped-keys]"
        )
    copied: Any = copy.copy(network)
    copied.in_keys = [*network.in_keys, *keys]
    return copied
