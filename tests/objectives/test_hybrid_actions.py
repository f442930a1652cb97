"""PPO of several actions at a time: log-probabilities are those of single steps, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor, TanhNormal
from torchrl.objectives import PPOLoss
from torchrl.objectives.value import GAE

from rnnkeys import GRUModule, get_env_transforms_from_module
from rnnkeys.environments import make_gym_env
from rnnkeys.objectives import SequenceMinibatches, recurrent_loss
from rnnkeys.spaces import ActionParameters, Layers, action_distribution, find_action_keys
from tests.support.odd_environments import HYBRID_ID
from tests.support.recurrent import chain
from tests.support.tolerances import assert_equal

STEPS, H = 33, 6


def make_agent(spec: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    kind, options, outputs = action_distribution(spec)
    parameters = ActionParameters(spec)
    actor = ProbabilisticActor(
        chain(
            GRUModule(3, H, in_key="observation", out_key="embed"),
            Layers(
                nn.Sequential(nn.Linear(H, outputs), parameters), ["embed"], parameters.out_keys
            ),
        ),
        in_keys=parameters.distribution_keys,
        distribution_class=kind,
        distribution_kwargs=options,
        return_log_prob=True,
    )
    critic = chain(
        GRUModule(3, H, in_keys=["observation", "v_h"], out_keys=["v", ("next", "v_h")]),
        Layers(nn.Linear(H, 1), ["v"], ["state_value"]),
    )
    return actor, critic


@pytest.fixture
def case() -> tuple[Any, Any, Any]:
    """A wired loss, its actor, and data of single steps with advantages."""
    env = make_gym_env(HYBRID_ID, 3)
    actor, critic = make_agent(env.action_spec)
    loss: Any = PPOLoss(actor, critic, entropy_bonus=False)
    loss.set_keys(**find_action_keys(env.action_spec))
    env.append_transform(get_env_transforms_from_module(chain(actor, critic)))
    with torch.no_grad():
        data: Any = env.rollout(STEPS, chain(actor, critic), break_when_any_done=False)
        estimator: Any = GAE(gamma=0.9, lmbda=0.9, value_network=critic)
        recurrent_loss(estimator)(data)
    assert data["is_init"].sum() > 3  # an episode ends in each row
    return recurrent_loss(loss), actor, data


def unroll_log_prob(actor: Any, data: Any) -> Tensor:
    """Run the network in single steps from each segment's stored state; return ``[B, T]``."""
    network, rows, state = actor[:-1], [], data["recurrent_state"][:, 0]
    for t in range(data.shape[1]):
        step = data[:, t].select("observation", "is_init", "recurrent_state").clone()
        starts = step["is_init"].reshape(-1, 1, 1)
        step["recurrent_state"] = torch.where(starts, step["recurrent_state"], state)
        out = network(step.set("is_init", torch.zeros_like(step["is_init"])))
        state = out["next", "recurrent_state"]
        loc, scale = out["params", "move", "loc"], out["params", "move", "scale"]
        low, high = -torch.ones(2), torch.ones(2)
        move = TanhNormal(loc, scale, low=low, high=high, tanh_loc=False)
        tool = Categorical(logits=out["params", "tool", "logits"])
        moved, used = data["action", "move"][:, t], data["action", "tool"][:, t, 0]
        rows.append(move.log_prob(moved) + tool.log_prob(used))
    return torch.stack(rows, 1)


def test_ppo_of_hybrid_actions_starts_at_the_ratio_one(case: Any) -> None:
    loss, actor, data = case
    stored = data["action", "move_log_prob"] + data["action", "tool_log_prob"]
    assert_equal(stored, unroll_log_prob(actor, data).detach(), torch.float32, "log-prob")
    for batch in SequenceMinibatches(seq_len=11)(data):
        expected = -batch["advantage"].mean()
        assert_equal(loss(batch)["loss_objective"], expected, torch.float32, "objective")


def test_ppo_of_hybrid_actions_counts_valid_steps_alone(case: Any) -> None:
    loss, actor, data = case
    with torch.no_grad():
        for weight in actor.parameters():
            weight.add_(torch.randn_like(weight) / 4)
    padded = 0
    for batch in SequenceMinibatches(seq_len=11, by_episode=True)(data):
        valid = batch["collector", "mask"]
        padded += int((~valid).sum())
        old = batch["action", "move_log_prob"] + batch["action", "tool_log_prob"]
        ratio = (unroll_log_prob(actor, batch) - old).exp().detach()
        gain = ratio * batch["advantage"].squeeze(-1)
        result = loss(batch)
        assert_equal(result["loss_objective"], -gain[valid].mean(), torch.float32, "objective")
        result["loss_objective"].backward()
    assert padded
    gradients = [weight.grad for weight in loss.actor_network_params.values(True, True)]
    assert all(one is not None and bool(one.abs().sum() > 0) for one in gradients)
