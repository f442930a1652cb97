"""Episodes for tests of windows, with states that belong to their steps."""

from __future__ import annotations

from typing import Any, cast

import torch
from tensordict import TensorDict
from torchrl.data import OneHot

from rnnkeys import drqn_policy
from rnnkeys.transforms import RefreshStates


def episode(length: int, done: bool = True, first: int = 1) -> Any:
    """Steps ``first, first + 1, ...``; the state that enters step ``x`` is ``x - 1``."""
    x = torch.arange(first, first + length)
    ends = torch.zeros(length, 1, dtype=torch.bool)
    ends[-1] = done
    state = x[:, None, None] - 1.0
    return TensorDict(
        {
            "x": x,
            "is_init": (torch.arange(length) == 0)[:, None],
            "recurrent_state": state,
            "next": {
                "done": ends,
                "terminated": ends.clone(),
                "reward": x[:, None].float(),
                "recurrent_state": state + 1,
            },
        },
        [length],
    )


def make_policy(cell: str = "lstm") -> Any:
    """Return a recurrent Q-network for observations of 4 numbers and 2 actions."""
    return drqn_policy(OneHot(2), (4,), cell=cell, hidden_size=6, encoder_sizes=())


def collect_episodes(policy: Any, lengths: list[list[int]]) -> Any:
    """Return rows of whole episodes, with the states that single steps have."""
    rows: list[Any] = []
    for row in lengths:
        number = sum(row)
        flags = torch.zeros(number, 1, dtype=torch.bool)
        ends = torch.zeros(number, 1, dtype=torch.bool)
        step = 0
        for length in row:
            flags[step] = ends[step + length - 1] = True
            step += length
        data = cast(
            Any, TensorDict({"observation": torch.randn(number, 4), "is_init": flags}, [number])
        )
        for key in policy[1].state_keys:
            data[key] = torch.zeros(number, 1, 6)
        data = cast(Any, RefreshStates(policy)(data))
        data["next", "done"] = ends
        rows.append(data)
    return torch.stack(rows)


def disturb(policy: Any) -> None:
    """Move the weights of a policy, in place."""
    for p in policy.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
