"""Checks of discrete actions: one-hot vectors or indices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor

from .problem import Problem

_REMEDY = (
    "Store one-hot vectors [*batch, A] or integer indices [*batch] or [*batch, 1], as the "
    "environment's action spec says."
)


def find_action_problems(
    batch: TensorDictBase,
    action_key: NestedKey,
    num_actions: int,
    mask: Tensor | None = None,
    *,
    read_values: bool = True,
) -> Iterator[Problem]:
    """Yield a problem if discrete actions are neither one-hot vectors nor indices in range.

    Args:
        batch: sequences ``[*, T]``.
        action_key: key of the actions: one-hot ``[*, T, A]`` of any dtype, or integers ``[*, T]``
            or ``[*, T, 1]``.
        num_actions: ``A``.
        mask: bool ``[*, T]``, False at padding, where actions are not read.
        read_values: whether to read values.

    Examples:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"action": torch.tensor([[0.5, 0.5]])}, [1])
        >>> [problem.check for problem in find_action_problems(batch, "action", 2)]
        ['action-one-hot']
    """
    action, key = batch.get(action_key), unravel_key(action_key)
    if action.shape == (*batch.batch_size, num_actions):
        if read_values:
            yield from _find_one_hot_problems(action, key, mask)
    elif action.shape not in (batch.batch_size, (*batch.batch_size, 1)):
        yield Problem(
            "action-shape",
            f"The entry {key!r} must hold one of {num_actions} actions for each step of the batch "
            f"{list(batch.batch_size)}. Got shape {list(action.shape)}.",
            _REMEDY,
        )
    elif action.is_floating_point() or action.is_complex() or action.dtype is torch.bool:
        yield Problem(
            "action-dtype",
            f"The entry {key!r} has shape {list(action.shape)}, so it must hold indices, and must "
            f"be an integer tensor. Got {action.dtype}.",
            _REMEDY,
            TypeError,
        )
    elif read_values:
        index = action.reshape(batch.batch_size)
        wrong = (index < 0) | (index >= num_actions)
        yield from _find_value_problem(
            "action-range", wrong, mask, f"{key!r} is not an index from 0 to {num_actions - 1}"
        )


def _find_one_hot_problems(
    action: Tensor, key: NestedKey, mask: Tensor | None
) -> Iterator[Problem]:
    zero_or_one = ((action == 0) | (action == 1)).all(-1)
    wrong = ~zero_or_one | (action.long().sum(-1) != 1)
    yield from _find_value_problem("action-one-hot", wrong, mask, f"{key!r} is not one-hot")


def _find_value_problem(
    check: str, wrong: Tensor, mask: Tensor | None, message: str
) -> Iterator[Problem]:
    wrong = wrong if mask is None else wrong & mask
    if wrong.any():
        number, first = int(wrong.sum()), wrong.nonzero()[0].tolist()
        yield Problem(check, f"The entry {message} at {number} steps, first at {first}.", _REMEDY)
