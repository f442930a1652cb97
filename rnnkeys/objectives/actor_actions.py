"""Comparison of actions and advantages in a batch with the actor's, while a loss runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.nn import CompositeDistribution, ProbabilisticTensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.modules import MaskedOneHotCategorical, OneHotCategorical
from torchrl.objectives import BCLoss, DDPGLoss, DiscreteSACLoss

from ..checks import find_action_shape_problems, raise_first
from ..checks.losses import find_advantage_rank_problems

# Gets the key of actions, who made them on what batch, and the shapes of their batch and of each.
_Check = Callable[[NestedKey, TensorDictBase, torch.Size, torch.Size], None]


@contextmanager
def check_actor_actions(loss: Any, batch: TensorDictBase) -> Iterator[None]:
    """Raise in the block if the actor's actions do not fit the actions or advantages of the batch.

    Losses combine both, or give both to a critic, and tensors of other shapes broadcast. The shape
    of an actor's actions shows only when it runs: in its output, or in the distribution it makes.

    Args:
        loss: a TorchRL loss, with or without an ``actor_network``.
        batch: sequences ``[*, T]`` with the actions that the loss reads.

    Raises:
        ValueError: by the name ``action-shape`` or ``advantage-shape``, from inside the loss.
    """
    actor: Any = getattr(loss, "actor_network", None)
    actions = {key for key in _find_action_keys(loss) if _is_compared(loss, batch, key)}
    if not isinstance(actor, nn.Module) or not actions:
        yield
        return

    def check(key: NestedKey, like: TensorDictBase, each: torch.Size, one: torch.Size) -> None:
        if key in actions and each[: like.ndim] == like.batch_size:
            raise_first(find_action_shape_problems(batch, key, each[like.ndim :] + one))
            raise_first(find_advantage_rank_problems(loss, batch, len(each)))

    with ExitStack() as stack:
        stack.enter_context(_watch_output(actor, list(actions), check))
        for module in actor.modules():
            if isinstance(module, ProbabilisticTensorDictModule):
                stack.enter_context(_watch_distribution(module, check))
        yield


def _find_action_keys(loss: Any) -> list[NestedKey]:
    if isinstance(loss, DDPGLoss):
        # It has no key of actions: they are what its actor writes and its critic reads.
        read = {unravel_key(key) for key in loss.value_network.in_keys}
        return [key for key in map(unravel_key, loss.actor_network.out_keys) if key in read]
    keys: Any = getattr(getattr(loss, "tensor_keys", None), "action", None) or []
    return [unravel_key(key) for key in (keys if isinstance(keys, list) else [keys])]


def takes_cross_entropy(loss: Any, batch: TensorDictBase) -> bool:
    """Return whether a loss compares logits ``[N, A]`` of the actor with indices ``[N]``.

    Args:
        loss: a TorchRL loss.
        batch: sequences ``[*, T]`` with the actions that the loss reads.
    """
    if not isinstance(loss, BCLoss):
        return False
    action: Any = batch.get(loss.tensor_keys.action, None)
    is_index = isinstance(action, Tensor) and not action.is_floating_point()
    return loss.loss_function == "cross_entropy" or loss.loss_function is None and is_index


def _is_compared(loss: Any, batch: TensorDictBase, key: NestedKey) -> bool:
    """Return whether a loss compares these actions with those of its actor."""
    if not isinstance(batch.get(key, None), Tensor) or takes_cross_entropy(loss, batch):
        return False
    # The former may be a function of the user, the latter reads probabilities of all actions.
    is_any = isinstance(loss, BCLoss) and callable(loss.loss_function)
    return not is_any and not isinstance(loss, DiscreteSACLoss)


@contextmanager
def _watch_output(actor: nn.Module, keys: list[NestedKey], check: _Check) -> Iterator[None]:
    def read(module: nn.Module, inputs: Any, out: Any) -> None:
        for key in keys if isinstance(out, TensorDictBase) else []:
            action = out.get(key, None)
            if isinstance(action, Tensor):
                check(key, out, action.shape[: out.ndim], action.shape[out.ndim :])

    with actor.register_forward_hook(read):
        yield


@contextmanager
def _watch_distribution(module: ProbabilisticTensorDictModule, check: _Check) -> Iterator[None]:
    """Replace ``get_dist``, since nothing else is called wherever a distribution is made."""
    make = module.get_dist

    def read(tensordict: TensorDictBase) -> Any:
        made: Any = make(tensordict)
        several = isinstance(made, CompositeDistribution)
        for key, part in made.dists.items() if several else [(module.out_keys[0], made)]:
            if _is_known(part):
                check(unravel_key(key), tensordict, part.batch_shape, _read_event_shape(part))
        return made

    vars(module)["get_dist"] = read
    try:
        yield
    finally:
        del vars(module)["get_dist"]


def _is_known(made: Distribution) -> bool:
    """Return whether samples have the shapes that the distribution says; a user's may not."""
    return type(made).__module__.partition(".")[0] in ("tensordict", "torch", "torchrl")


def _read_event_shape(made: Distribution) -> torch.Size:
    if isinstance(made, (OneHotCategorical, MaskedOneHotCategorical)):
        return torch.Size([made.num_samples])
    return made.event_shape
