"""Checks of discrete actions, one-hot vectors or indices, and of action masks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor

from ..keys import next_key
from .problem import Problem, make_bool_problem

_REMEDY = (
    "Store one-hot vectors [*batch, A] or integer indices [*batch] or [*batch, 1], as the "
    "environment's action spec says."
)
_TIES = (
    f"{_REMEDY} TorchRL's QValueModule writes a one for every action of the greatest value: call "
    "rnnkeys.modules.choose_one_action(policy) before you collect (drqn_policy does), or store "
    "indices (categorical actions)."
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
    action = batch.get(action_key)
    key = unravel_key(action_key)
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


def find_action_shape_problems(
    batch: TensorDictBase, action_key: NestedKey, step_shape: Sequence[int]
) -> Iterator[Problem]:
    """Yield a problem if actions have another shape than those of the actor.

    Args:
        batch: sequences ``[*, T]``.
        action_key: key of the actions, ``[*, T, *step_shape]``.
        step_shape: shape of the actor's action at one step, such as ``[3]``.

    Examples:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"action": torch.zeros(4, 4)}, [4, 4])
        >>> [problem.check for problem in find_action_shape_problems(batch, "action", [1])]
        ['action-shape']
    """
    shape = [*batch.batch_size, *step_shape]
    action = batch.get(action_key)
    if list(action.shape) != shape:
        key = unravel_key(action_key)
        fits = action.numel() == math.prod(shape)
        yield Problem(
            "action-shape",
            f"The entry {key!r} must have the shape {shape} of the actor's actions, or both would "
            f"broadcast. Got {list(action.shape)}.",
            f"Reshape it: batch[{key!r}] = batch[{key!r}].reshape({shape})."
            if fits
            else "Make the actor by the action spec of the environment that the batch is from.",
        )


def find_one_hot_problems(
    batch: TensorDictBase, action_key: NestedKey, valid: Tensor | None = None
) -> Iterator[Problem]:
    """Yield a problem if actions are not one-hot vectors. Reads values.

    Args:
        batch: sequences ``[*, T]``.
        action_key: key of the actions, ``[*, T, A]`` or per agent.
        valid: bool ``[*, T]``, or per agent, False at padding, where actions are not read.

    Examples:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"action": torch.tensor([2, 0])}, [2])
        >>> [problem.check for problem in find_one_hot_problems(batch, "action")]
        ['action-shape']
    """
    action = batch.get(action_key, None)
    if action is None:
        return
    key = unravel_key(action_key)
    if action.ndim <= batch.ndim or action.shape[-1] == 1:
        yield Problem(
            "action-shape",
            f"The loss reads {key!r} as one-hot vectors [*batch, A], and it has shape "
            f"{list(action.shape)} for the batch {list(batch.batch_size)}.",
            'For indices make the loss and its QValueModule with action_space="categorical".',
        )
    else:
        yield from _find_one_hot_problems(action, key, valid)


def _find_one_hot_problems(
    action: Tensor, key: NestedKey, mask: Tensor | None
) -> Iterator[Problem]:
    zero_or_one = ((action == 0) | (action == 1)).all(-1)
    wrong = ~zero_or_one | (action.long().sum(-1) != 1)
    yield from _find_value_problem(
        "action-one-hot", wrong, mask, f"{key!r} is not one-hot", remedy=_TIES
    )


def _find_value_problem(
    check: str, wrong: Tensor, mask: Tensor | None, message: str, remedy: str = _REMEDY
) -> Iterator[Problem]:
    wrong = wrong if mask is None else wrong & _expand_to(mask, wrong)
    if wrong.any():
        number, first = int(wrong.sum()), wrong.nonzero()[0].tolist()
        yield Problem(check, f"The entry {message} at {number} steps, first at {first}.", remedy)


def find_action_mask_problems(
    batch: TensorDictBase,
    mask_key: NestedKey,
    action_key: NestedKey,
    valid: Tensor | None = None,
    *,
    terminated_key: NestedKey | None = None,
    read_values: bool = True,
) -> Iterator[Problem]:
    """Yield problems of an action mask: not bool, or not the mask of the actions in the batch.

    Args:
        batch: sequences ``[*, T]``.
        mask_key: key of the action mask, bool ``[*, T, A]`` or per agent, False at actions that are
            not allowed.
        action_key: key of the actions. Several choices in one action are not compared.
        valid: bool ``[*, T]``, or per agent, False at padding.
        terminated_key: key of the flags of terminal steps for a loss that takes the best action of
            the next observation, None for others.
        read_values: whether to read values.

    Examples:
        >>> from tensordict import TensorDict
        >>> allowed = torch.tensor([[True, False]])
        >>> batch = TensorDict({"action": torch.tensor([1]), "action_mask": allowed}, [1])
        >>> [one.check for one in find_action_mask_problems(batch, "action_mask", "action")]
        ['action-masked']
    """
    for key in map(unravel_key, (mask_key, next_key(mask_key))):
        allowed = batch.get(key, None)
        if allowed is not None and allowed.dtype is not torch.bool:
            yield make_bool_problem("action-mask-dtype", "action mask", key, allowed)
            return
    if not read_values:
        return
    allowed, action = batch.get(mask_key, None), batch.get(action_key, None)
    if allowed is not None and action is not None:
        yield from _find_masked_problems(action, allowed, valid, action_key, mask_key)
    if terminated_key is not None:
        yield from _find_no_action_problems(batch, next_key(mask_key), valid, terminated_key)


def _find_masked_problems(
    action: Tensor, allowed: Tensor, valid: Tensor | None, action_key: Any, mask_key: Any
) -> Iterator[Problem]:
    if action.shape == allowed.shape:
        wrong = ((action != 0) & ~allowed).any(-1)
    elif action.shape in (allowed.shape[:-1], (*allowed.shape[:-1], 1)):
        index = action.reshape(*allowed.shape[:-1], 1).long().clamp(0, allowed.shape[-1] - 1)
        wrong = ~allowed.gather(-1, index).squeeze(-1)
    else:
        return
    wrong = wrong if valid is None else wrong & _expand_to(valid, wrong)
    if wrong.any():
        yield Problem(
            "action-masked",
            f"The action {unravel_key(action_key)!r} is not allowed by {unravel_key(mask_key)!r} "
            f"at {int(wrong.sum())} steps, first at {wrong.nonzero()[0].tolist()}.",
            "Every module that chooses actions must read the mask: QValueModule and EpsilonGreedy "
            "by action_mask_key=, a distribution among its in_keys; and the mask must be that of "
            "the observation beside it.",
        )


def _find_no_action_problems(
    batch: TensorDictBase, mask_key: Any, valid: Tensor | None, terminated_key: NestedKey
) -> Iterator[Problem]:
    allowed, terminated = batch.get(mask_key, None), batch.get(next_key(terminated_key), None)
    if allowed is None or terminated is None:
        return
    empty = ~allowed.any(-1)
    empty = empty & ~_expand_to(terminated.squeeze(-1), empty)
    empty = empty if valid is None else empty & _expand_to(valid, empty)
    if empty.any():
        yield Problem(
            "action-mask-empty",
            f"The action mask {unravel_key(mask_key)!r} allows no action at {int(empty.sum())} "
            f"steps that are not terminated, first at {empty.nonzero()[0].tolist()}, so the next "
            "observation has no value.",
            "Allow an action without effect there, or set terminated where an episode ends.",
        )


def _expand_to(flags: Tensor, like: Tensor) -> Tensor:
    """Append dimensions of size 1, so that flags of steps are compared with those of agents."""
    flags = flags.squeeze(-1) if flags.ndim > like.ndim else flags
    return flags.reshape(*flags.shape, *[1] * (like.ndim - flags.ndim))
