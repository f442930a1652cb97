"""Statistics of observations travel with a policy: checkpoint, plain loops, exported step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from rnnkeys import GRUModule, StatefulPolicy, export_step
from rnnkeys.spaces import Layers, RunningNorm
from tests.support.recurrent import chain


def make_policy(seed: int) -> Any:
    torch.manual_seed(seed)
    return chain(
        Layers(RunningNorm((3,)), ["observation"], ["normal"]),
        GRUModule(3, 8, in_key="normal", out_key="embed"),
        TensorDictModule(nn.Linear(8, 2), ["embed"], ["action"]),
    )


def play_by_hand(policy: Any, observations: torch.Tensor) -> torch.Tensor:
    """Normalize by the moments of the data, and run the same layers on that."""
    seen = SEEN.reshape(-1, 3)
    normal = (observations - seen.mean(0)) / seen.std(0, correction=0)
    step = TensorDict(normal=normal, is_init=torch.ones(4, 1, dtype=torch.bool), batch_size=[4])
    with torch.no_grad():
        return policy[2](policy[1](step))["action"]


SEEN = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0)) * 7 + 30


def make_trained() -> tuple[Any, torch.Tensor]:
    """Return a policy that was loaded from the checkpoint of one that has seen data."""
    trained, loaded = make_policy(0), make_policy(1)
    for part in SEEN.split(10):
        trained[0].layers.update(part)
    loaded.load_state_dict(trained.state_dict())
    return loaded, torch.randn(4, 3) * 7 + 30


def test_stateful_policy_of_a_checkpoint_normalizes_as_in_training() -> None:
    policy, observations = make_trained()
    played = StatefulPolicy(policy, 4)(observations.numpy())
    np.testing.assert_allclose(played, play_by_hand(policy, observations), atol=1e-5)


def test_exported_step_of_a_checkpoint_normalizes_as_in_training() -> None:
    policy, observations = make_trained()
    example = TensorDict(observation=torch.zeros(2, 3), batch_size=[2])
    program: Any = export_step(policy, example).module()
    action, _ = program(observations, torch.zeros(4, 1, 8))
    torch.testing.assert_close(action, play_by_hand(policy, observations), atol=1e-5, rtol=1e-4)
