"""Previous actions and rewards: exact over resets, in environments and in collected sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import CatTensors, RewardScaling, SerialEnv, TransformedEnv
from torchrl.envs.utils import check_env_specs

from rnnkeys import GRUModule, get_env_transforms_from_module, set_recurrent_mode
from rnnkeys.environments import make_gym_env
from rnnkeys.transforms import PreviousActionReward
from tests.support.odd_environments import action_id
from tests.support.recurrent import chain

ACTIONS = {"Choice": 2, "Choices": 5, "Box": 2}


def encode(action: torch.Tensor, name: str) -> torch.Tensor:
    if name == "Box":
        return action
    sizes = {"Choice": [2], "Choices": [2, 3]}[name]
    parts = [nn.functional.one_hot(action[..., i], size) for i, size in enumerate(sizes)]
    return torch.cat(parts, -1).float()


@pytest.mark.parametrize("name", ACTIONS)
def test_previous_action_and_reward_are_those_of_the_step_before(name: str) -> None:
    env = make_gym_env(action_id(name), 3)
    env.append_transform(RewardScaling(loc=0.0, scale=2.0))
    env.append_transform(PreviousActionReward())
    env.append_transform(get_env_transforms_from_module(nn.Identity()))
    rollout = env.rollout(45, break_when_any_done=False)
    starts = rollout["is_init"].squeeze(-1)
    taken, reward = encode(rollout["action"], name), rollout["next", "reward"]
    assert starts.sum() > 3 and taken.shape[-1] == ACTIONS[name]
    assert torch.equal(rollout["next", "previous_action"], taken)  # at ends of episodes, too
    assert torch.equal(rollout["next", "previous_reward"], reward)
    assert not rollout["previous_action"][starts].any()
    assert not rollout["previous_reward"][starts].any()
    later = ~starts[:, 1:]
    for key, value in (("previous_action", taken), ("previous_reward", reward)):
        assert torch.equal(rollout[key][:, 1:][later], value[:, :-1][later])
    check_env_specs(env)


def test_previous_reward_where_single_environments_reset_stays_that_of_the_others() -> None:
    make: Any = SerialEnv
    vector = make(2, [lambda: make_gym_env(action_id("Choice"), 1)] * 2)
    env = TransformedEnv(vector, PreviousActionReward())
    step = env.rollout(3)[..., -1]["next"].clone()
    step["_reset"] = torch.tensor([[[True]], [[False]]])
    for key in ("done", "terminated"):
        step[key] = step["_reset"].clone()
    reset = env.reset(step.clone())
    assert not reset["previous_reward"][0].any() and not reset["previous_action"][0].any()
    assert torch.equal(reset["previous_reward"][1], step["previous_reward"][1])
    assert torch.equal(reset["previous_action"][1], step["previous_action"][1])


def test_sequences_with_previous_actions_equal_the_steps_that_were_collected() -> None:
    torch.manual_seed(0)
    policy: Any = chain(
        GRUModule(3 + 2 + 1, 8, in_key="inputs", out_key="embed"),
        TensorDictModule(nn.Linear(8, 1), ["embed"], ["score"]),
        TensorDictModule(lambda score: (score > 0).long(), ["score"], ["action"]),
    )
    env = make_gym_env(action_id("Choice"), 2)
    keys = ["observation", "previous_action", "previous_reward"]
    env.append_transform(PreviousActionReward())
    env.append_transform(CatTensors(keys, "inputs", del_keys=False))
    env.append_transform(get_env_transforms_from_module(policy))
    collector: Any = Collector(env, policy, frames_per_batch=70, total_frames=70)
    [data] = list(collector)
    assert data["is_init"].sum() > 2
    with set_recurrent_mode(True):
        whole = policy(data.clone())
    torch.testing.assert_close(whole["score"], data["score"], atol=1e-6, rtol=1e-5)


def test_previous_action_alone_has_no_reward() -> None:
    env = make_gym_env(action_id("Box"), 2).append_transform(PreviousActionReward(reward_key=None))
    assert {str(key) for key in env.reset().keys()} >= {"previous_action"}
    assert "previous_reward" not in env.rollout(2).keys()


def test_previous_action_reward_outside_of_an_environment_raises() -> None:
    with pytest.raises(RuntimeError, match="append it to an environment"):
        PreviousActionReward()(make_gym_env(action_id("Box"), 2).reset())


def test_previous_action_of_a_step_without_a_reset_is_that_of_the_step() -> None:
    env, other = (make_gym_env(action_id("Choice"), 1) for _ in range(2))
    for one in (env, other):
        one.append_transform(PreviousActionReward())
    step = other.rand_action(other.reset())
    env.base_env.reset()
    after = env.step(step)["next"]
    assert torch.equal(after["previous_action"], encode(step["action"], "Choice"))
