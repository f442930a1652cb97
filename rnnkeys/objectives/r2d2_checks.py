"""Checks of the batches that ``R2D2Loss`` takes, and of its results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor, nn

from ..checks import (
    Problem,
    find_action_mask_problems,
    find_action_problems,
    find_done_problems,
    find_finite_problems,
    find_mask_problems,
    find_multi_step_problems,
    find_step_problems,
    find_tensor_problems,
)
from ..keys import MASK_KEY, MULTI_STEP_KEY, entry_names, next_key
from ..modules.network import RecurrentNetwork
from ..sequences import find_sequence_problems, read_mask

_READER = "R2D2Loss"
_AGENTS_REMEDY = (
    "For agents that share a reward use QMixerLoss; for others move the dimension of agents in "
    "front of time, into the batch."
)


def find_window_problems(
    windows: TensorDictBase,
    keys: Any,
    in_keys: Iterable[NestedKey],
    network: RecurrentNetwork,
    *,
    read_values: bool,
) -> Iterator[Problem]:
    """Yield the problems of windows that can be seen before a network runs.

    Args:
        windows: ``[B, T]``.
        keys: ``tensor_keys`` of the loss.
        in_keys: keys that the loss reads; states may be missing.
        network: the value network.
        read_values: whether to read values.
    """
    yield from find_step_problems(windows, _READER)
    for key in map(unravel_key, in_keys):
        if windows.get(key, None) is None and key not in network.state_keys:
            yield Problem(
                "missing-entry",
                f"{_READER} reads {key!r}, which is not in the batch. Entries: "
                f"{entry_names(windows)}.",
                "Collect it, or name another entry with set_keys().",
                KeyError,
            )
    yield from find_tensor_problems(windows, [*map(unravel_key, in_keys), keys.priority_weight])
    yield from find_multi_step_problems(windows, MULTI_STEP_KEY, "n_steps=")
    for name in (keys.done, keys.terminated):
        yield from find_done_problems(windows, next_key(name))
    yield from _find_agent_problems(windows, keys)
    yield from find_mask_problems(windows, _READER, keys.mask)
    if unravel_key(keys.mask) != MASK_KEY:
        windows = windows.copy()
        mask = windows.get(keys.mask, None)
        windows = windows.exclude(MASK_KEY) if mask is None else windows.set(MASK_KEY, mask)
    yield from find_sequence_problems(
        windows, network.init_keys, network.pairs, reader=_READER, read_values=read_values
    )
    valid = read_mask(windows)
    for key in network.action_mask_keys:
        yield from find_action_mask_problems(
            windows,
            key,
            keys.action,
            valid,
            terminated_key=keys.terminated,
            read_values=read_values,
        )


def _find_agent_problems(windows: TensorDictBase, keys: Any) -> Iterator[Problem]:
    for key in map(next_key, (keys.reward, keys.done, keys.terminated)):
        value = windows.get(key)
        if value.numel() != windows.batch_size.numel():
            yield Problem(
                "single-agent",
                f"{_READER} learns one value for each step, and {unravel_key(key)!r} must have the "
                f"shape {[*windows.shape, 1]}. Got {list(value.shape)}.",
                _AGENTS_REMEDY,
            )


def find_value_problems(
    windows: TensorDictBase, keys: Any, q: Tensor, mask: Tensor, *, read_values: bool
) -> Iterator[Problem]:
    """Yield the problems of values and actions.

    Args:
        windows: ``[B, T]``.
        keys: ``tensor_keys`` of the loss.
        q: values that the network has computed.
        mask: bool ``[B, T]``, False at padding.
        read_values: whether to read values.
    """
    if q.ndim != windows.ndim + 1:
        yield Problem(
            "single-agent",
            f"The value network must write {keys.action_value!r} of shape [*batch, actions] for "
            f"windows {list(windows.shape)}. Got {list(q.shape)}.",
            _AGENTS_REMEDY,
        )
    yield from find_action_problems(
        windows, keys.action, q.shape[-1], mask, read_values=read_values
    )


def find_loss_problems(
    results: Iterable[Tensor],
    windows: TensorDictBase,
    mask: Tensor,
    network: RecurrentNetwork,
    loss: nn.Module,
) -> Iterator[Problem]:
    """Yield the reason if a loss or a priority is not finite. Reads values.

    Args:
        results: of the loss.
        windows: ``[B, T]``, the entries that it has read.
        mask: bool ``[B, T]``, False at padding.
        network: the value network.
        loss: whose parameters are looked at if every entry is finite.
    """
    if all(bool(result.isfinite().all()) for result in results):
        return
    entries = [*network.input_keys, *map(next_key, network.input_keys)]
    others = [key for key in map(unravel_key, windows.keys(True, True)) if key not in entries]
    yield from find_finite_problems(windows, [*entries, *others], mask)
    for name, parameter in loss.named_parameters():
        if not parameter.isfinite().all():
            yield Problem(
                "not-finite",
                f"The loss is not finite because the parameter {name!r} is not.",
                "Lower the learning rate, or clip the gradient.",
            )
    yield Problem(
        "not-finite",
        "The loss or a priority is not finite although every entry and parameter is: values "
        "overflow.",
        "Scale rewards down, lower the learning rate, or check the importance weights.",
    )
