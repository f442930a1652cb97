"""What a loss really bootstraps from: its next values and targets, seen while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torchrl.objectives.value.advantages as advantages
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import DistributionalDQNLoss

from tests.support.target_cases import ATOMS
from tests.support.target_oracle import starts_of


@dataclass
class Seen:
    """Next values that a loss used, and the targets it made of them."""

    next_value: Tensor | None = None
    target: Tensor | None = None


_NEXT_ARGUMENT = {
    "td0_return_estimate": 1,
    "td_lambda_return_estimate": 2,
    "vec_td_lambda_return_estimate": 2,
    "vec_td1_return_estimate": 1,
    "generalized_advantage_estimate": 3,
    "vec_generalized_advantage_estimate": 3,
}


@contextmanager
def watching(loss: Any) -> Iterator[Seen]:
    """Record what return estimators are given; C51 has none, so its network is watched."""
    seen, handles = Seen(), []

    def watch(original: Callable[..., Any], position: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            names = ("next_state_value", "next_value")
            given = next((kwargs[n] for n in names if n in kwargs), None)
            seen.next_value = (args[position] if given is None else given).detach().clone()
            out = original(*args, **kwargs)
            seen.target = (out[1] if isinstance(out, tuple) else out).detach().clone()
            return out

        return call

    patches = [
        mock.patch.object(advantages, name, watch(getattr(advantages, name), position))
        for name, position in _NEXT_ARGUMENT.items()
    ]
    if isinstance(loss, DistributionalDQNLoss):
        handles.append(loss.value_network.register_forward_hook(_watch_atoms(seen)))
    for patch in patches:
        patch.start()
    try:
        yield seen
    finally:
        for patch in patches:
            patch.stop()
        for handle in handles:
            handle.remove()


def _watch_atoms(seen: Seen) -> Callable[..., None]:
    calls: list[TensorDictBase] = []

    def hook(module: nn.Module, args: Any, out: TensorDictBase) -> None:
        calls.append(out.copy())
        if len(calls) == 3:  # root, online on next, target on next
            action = calls[1].get("action").reshape(-1, 1, 1)
            probs = out.get("action_value").exp()
            chosen = probs.gather(-1, action.expand(*probs.shape[:-1], 1)).squeeze(-1)
            seen.target = chosen.detach().clone()
            seen.next_value = (chosen * torch.linspace(-2, 2, ATOMS)).sum(-1, keepdim=True)

    return hook


def run(loss: Any, batch: TensorDictBase) -> Seen:
    """Run a loss from known random numbers and return what it used."""
    torch.manual_seed(1)
    with watching(loss) as seen:
        loss(batch)
    return seen


def perturbed(batch: TensorDictBase) -> tuple[TensorDictBase, Tensor]:
    """Change every float in one slice from the middle; return where nothing was changed.

    The slice stays a sequence: what ``next`` holds arrives at the next step. A slice after one that
    was cut short is preferred, because there a return could run on.
    """
    starts = starts_of(batch)
    number = starts.cumsum(0)
    done = batch.get(("next", "done")).reshape(len(batch))
    behind_cut = number[1:][starts[1:] & ~done[:-1]]
    behind_cut = behind_cut[behind_cut < number[-1]]
    chosen = behind_cut[len(behind_cut) // 2] if len(behind_cut) else number[len(number) // 2]
    inside = number == chosen
    other = batch.clone()
    for value in other.values(True, True):
        if value.is_floating_point():
            value[inside] += torch.randn_like(value[inside]) * 0.5
    steps = inside.nonzero().flatten()
    for key, value in other["next"].items(True, True):
        if value.is_floating_point() and other.get(key, None) is not None:
            other.get(key)[steps[1:]] = value[steps[:-1]]
    assert inside.any() and not inside[0] and not inside[-1]
    return other, ~inside
