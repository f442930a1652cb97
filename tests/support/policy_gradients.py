"""Recurrent actors and critics, and data that they collected, for the tests of policy gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import NormalParamExtractor
from torch import nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor, TanhNormal

import rnnkeys
from tests.support import target_cases as cases
from tests.support.target_cases import ACTIONS, HIDDEN, Mod, Seq

SHAPES = {"separate": False, "shared": True}


class Agent(NamedTuple):
    """An actor, a critic that runs by itself, and both in sequence, as they collect."""

    kind: str
    actor: Any
    critic: Any

    @property
    def both(self) -> Any:
        return Seq(self.actor, self.critic)


def make_agent(kind: str = "discrete", cell: str = "gru", shared: bool = False) -> Agent:
    """Make networks with one recurrent layer or two; ``kind`` is that of the actions."""
    body = cases.recurrent(rnnkeys, cell)
    outputs = ACTIONS if kind == "discrete" else 4
    head = Mod(cases._net(HIDDEN, 8, outputs), ["actor_embed"], ["raw"])
    options: dict[str, Any] = {"return_log_prob": True}
    if kind == "discrete":
        rename = Mod(nn.Identity(), ["raw"], ["logits"])
        keys, options["distribution_class"] = ["logits"], Categorical
    else:
        rename = Mod(NormalParamExtractor(), ["raw"], ["loc", "scale"])
        keys, options["distribution_class"] = ["loc", "scale"], TanhNormal
    actor: Any = ProbabilisticActor(Seq(body, head, rename), in_keys=keys, **options)
    name = "actor" if shared else "value"
    recurrent = body if shared else cases.recurrent(rnnkeys, cell, name=name)
    value = Mod(cases._net(HIDDEN, 8, 1), [f"{name}_embed"], ["state_value"])
    return Agent(kind, actor, Seq(recurrent, value))


def collect(agent: Agent, steps: int = 24, envs: int = 3) -> TensorDictBase:
    """Collect ``[envs, steps]`` with actor and critic, from the midst of episodes on."""
    case: Any = cases.Case(agent.kind, agent.kind, None, None)  # pyright: ignore[reportArgumentType]
    data = cases.collect(case, agent.both, envs * steps, (envs,))
    assert data.shape == (envs, steps)
    return data


def move(agent: Agent) -> None:
    """Change the weights, as gradient steps would."""
    with torch.no_grad():
        for parameter in agent.both.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
