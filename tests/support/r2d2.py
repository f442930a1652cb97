"""R2D2's loss in NumPy, step by step, and windows with every kind of end."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import QValueModule
from torchrl.objectives import SoftUpdate

from rnnkeys import GRUModule
from rnnkeys.objectives import R2D2Loss
from tests.support import reference
from tests.support.recurrent import F64, chain

MASK = ("collector", "mask")
B, T, I, H, A = 7, 11, 3, 4, 3


class Network(NamedTuple):
    """Parameters in NumPy: a GRU and a linear head."""

    gru: reference.Weights
    w: np.ndarray
    b: np.ndarray


def make_network(seed: int = 0, action_mask_key: str | None = None) -> Any:
    torch.manual_seed(seed)
    gru = GRUModule(I, H, in_key="observation", out_key="embed", dtype=F64)
    head = nn.Linear(H, A, dtype=F64)
    nn.init.uniform_(head.weight, -3, 3)
    network = chain(gru, TensorDictModule(head, ["embed"], ["action_value"]))
    if action_mask_key is None:
        return network
    return chain(*network, QValueModule("one_hot", action_mask_key=action_mask_key))


def as_numpy(network: Any) -> Network:
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    arrays = [getattr(network[0].gru, name).detach().numpy() for name in names]
    head = network[1].module
    return Network(
        reference.Weights(*arrays), head.weight.detach().numpy(), head.bias.detach().numpy()
    )


def make_windows(one_hot: bool = True, masked: bool = True) -> TensorDict:
    """Random windows in which episodes terminate, are truncated, or are reset without a done."""
    torch.manual_seed(2)
    generator = np.random.default_rng(3)
    events = generator.choice(4, size=(B, T), p=[0.7, 0.1, 0.1, 0.1])
    events[0], events[1, -1], events[2, -1] = 0, 1, 2
    terminated, truncated, reset = (torch.from_numpy(events == k) for k in (1, 2, 3))
    over = terminated | truncated | reset
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, 1:] = over[:, :-1]
    starts[0, 0] = starts[1, 0] = True
    observation = torch.randn(B, T, I, dtype=F64)
    after = torch.randn(B, T, I, dtype=F64)
    continues = ~over[:, :-1]
    after[:, :-1][continues] = observation[:, 1:][continues]
    state = torch.randn(B, T, 1, H, dtype=F64)
    state[:, 1:][(terminated | truncated)[:, :-1]] = 0
    action = torch.randint(A, (B, T))
    data = TensorDict(
        {
            "observation": observation,
            "recurrent_state": state,
            "is_init": starts.unsqueeze(-1),
            "action": nn.functional.one_hot(action, A) if one_hot else action,
            "priority_weight": torch.rand(B, 1, dtype=F64).expand(B, T),
            "next": {
                "observation": after,
                "reward": 5 * torch.randn(B, T, 1, dtype=F64),
                "done": (terminated | truncated).unsqueeze(-1),
                "terminated": terminated.unsqueeze(-1),
            },
        },
        [B, T],
    )
    if masked:
        mask = torch.ones(B, T, dtype=torch.bool)
        mask[3, 8:] = mask[4, 5:] = mask[5] = False
        data[MASK] = mask
    return data


def add_action_masks(windows: TensorDict) -> TensorDict:
    """Add masks that allow the action played, about half of the others, and none at the end."""
    torch.manual_seed(5)
    taken = windows["action"]
    taken = taken.bool() if taken.ndim == 3 else nn.functional.one_hot(taken, A).bool()
    allowed = taken | (torch.rand(B, T, A) < 0.5)
    after = torch.rand(B, T, A) < 0.5
    after[..., 0] |= ~after.any(-1)
    # Inside an episode the next mask is that of the next step.
    over = windows["next", "done"][:, :-1, 0] | windows["is_init"][:, 1:, 0]
    after[:, :-1] = torch.where(over.unsqueeze(-1), after[:, :-1], allowed[:, 1:])
    after[windows["next", "terminated"].squeeze(-1)] = False
    valid = windows.get(MASK, torch.ones(B, T, dtype=torch.bool))
    after[:, :-1][valid[:, :-1] & ~valid[:, 1:]] = torch.tensor([False, True, True])
    windows["action_mask"] = allowed & valid.unsqueeze(-1)
    windows["next", "action_mask"] = after & valid.unsqueeze(-1)
    return windows


def rescale(x: float, eps: float | None) -> float:
    if eps is None:
        return x
    return float(np.sign(x) * (np.sqrt(abs(x) + 1) - 1) + eps * x)


def unscale(y: float, eps: float | None) -> float:
    """By bisection, so that no formula of the inverse is believed."""
    if eps is None:
        return y
    low, high = -1e6, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if rescale(middle, eps) < y else (low, middle)
    return (low + high) / 2


class Window:
    """One window seen by one network, step by step."""

    def __init__(self, network: Network, data: dict[str, np.ndarray], b: int) -> None:
        self.network = network
        self.best = np.zeros(T, dtype=int)  # allowed action with the largest value
        self.state = np.zeros((T, H))
        h = data["state"][b, 0]
        for t in range(T):
            if t and data["init"][b, t]:
                h = data["state"][b, t]
            h = self.step(h, data["observation"][b, t])
            self.state[t] = h
            self.best[t] = np.where(data["allowed"][b, t], self.values(h), -np.inf).argmax()
        self.after = data["after"][b]

    def step(self, h: np.ndarray, observation: np.ndarray) -> np.ndarray:
        (h_next,), _ = reference.GRU().step(self.network.gru, observation[None], (h[None],))
        return h_next[0]

    def values(self, h: np.ndarray) -> np.ndarray:
        return self.network.w @ h + self.network.b

    def values_after(self, t: int) -> np.ndarray:
        """Values of the observation that step ``t`` led to."""
        return self.values(self.step(self.state[t], self.after[t]))


def expect(
    online: Network,
    target: Network,
    windows: TensorDict,
    *,
    burn_in: int = 4,
    n_steps: int = 3,
    gamma: float = 0.9,
    eps: float | None = 1e-2,
    eta: float = 0.9,
    squared: bool = False,
    double_dqn: bool = True,
    weighted: bool = True,
    learn_starts: bool = False,
    greedy_returns: bool = False,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the loss, priorities ``[B]``, and TD errors ``[B, T]`` (NaN where there is none)."""
    everything = torch.ones(B, T, A, dtype=torch.bool)
    data = {
        "allowed": windows.get("action_mask", everything).numpy(),
        "observation": windows["observation"].numpy(),
        "after": windows["next", "observation"].numpy(),
        "state": windows["recurrent_state"][:, :, 0].numpy(),
        "init": windows["is_init"][..., 0].numpy(),
    }
    done, terminated = (windows["next", key][..., 0].numpy() for key in ("done", "terminated"))
    reward = windows["next", "reward"][..., 0].numpy()
    action = windows["action"]
    action = (action.argmax(-1) if action.ndim == 3 else action).numpy()
    allowed = windows.get(("next", "action_mask"), everything).numpy()
    mask = windows.get(MASK, torch.ones(B, T, dtype=torch.bool)).numpy()
    errors = np.full((B, T), np.nan)
    for b in range(B):
        ours, theirs = Window(online, data, b), Window(target, data, b)
        for t in range(T):
            if not mask[b, t]:
                continue
            fresh = data["init"][b, : t + 1].any()
            if t < burn_in and not (learn_starts and fresh):
                continue
            total, last = 0.0, t
            for k in range(n_steps):
                last = t + k
                total += gamma**k * reward[b, last]
                alone = last + 1 == T or data["init"][b, last + 1] or not mask[b, last + 1]
                over = done[b, last] or alone
                if over or (greedy_returns and action[b, last + 1] != ours.best[last + 1]):
                    break
            if not terminated[b, last]:
                values = theirs.values_after(last)
                chooser = ours.values_after(last) if double_dqn else values
                chooser = np.where(allowed[b, last], chooser, -np.inf)
                bootstrap = unscale(float(values[chooser.argmax()]), eps)
                total += gamma ** (last - t + 1) * bootstrap
            errors[b, t] = rescale(total, eps) - ours.values(ours.state[t])[action[b, t]]
    real = ~np.isnan(errors)
    weights = windows["priority_weight"][:, :1].numpy() if weighted else np.ones((B, 1))
    loss = (weights * np.where(real, errors, 0) ** 2).sum() / max(real.sum(), 1)
    priorities = np.zeros(B)
    for b in range(B):
        if real[b].any():
            size = errors[b][real[b]] ** 2 if squared else abs(errors[b][real[b]])
            priorities[b] = eta * size.max() + (1 - eta) * size.mean()
    return loss, priorities, errors


ARGUMENTS: dict[str, Any] = {"burn_in": 4, "n_steps": 3, "gamma": 0.9, "eps": 1e-2}


def make_loss(online: Any, target: Any, **arguments: Any) -> R2D2Loss:
    """A loss whose target network has parameters of its own."""
    loss = R2D2Loss(copy.deepcopy(online), **{**ARGUMENTS, **arguments})
    if loss.delay_value:
        SoftUpdate(loss, tau=0.5)
        for key, value in _parameters(target).items():
            loss.target_value_network_params[key].data.copy_(value)
    return loss


def _parameters(network: Any) -> dict[Any, Tensor]:
    params: Any = cast(Any, TensorDict).from_module(network)
    return {k: v.data for k, v in params.items(True, True)}
