"""Greedy choice of one action where several have the greatest value."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrl.modules import DistributionalQValueModule, QValueModule

from .submodules import find_networks


def choose_one_action(network: nn.Module) -> None:
    """Make every ``QValueModule`` inside choose the first of the best actions, in place.

    With one-hot actions TorchRL writes a one for each action of the greatest value. A loss then
    adds their values, in its targets, too, and an environment gets an action that its spec
    excludes. Values are equal where an output layer starts with zeros, for example.

    Args:
        network: a policy, or a loss with networks inside.

    Examples:
        >>> choose = QValueModule("one_hot")
        >>> choose_one_action(choose)
        >>> choose(torch.tensor([3.0, 7.0, 7.0]))[0]
        tensor([0, 1, 0])
    """
    for one in find_networks(network):
        # Of distributions TorchRL takes the first of several ones.
        if isinstance(one, QValueModule) and not isinstance(one, DistributionalQValueModule):
            one.action_func_mapping["one_hot"] = _choose_first_best


def _choose_first_best(values: Tensor) -> Tensor:
    best = values.argmax(-1, keepdim=True)
    return torch.zeros_like(values, dtype=torch.long).scatter(-1, best, 1)
