"""Recurrent MAPPO and IPPO: values and advantages equal those of single steps, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import OneHotCategorical, ProbabilisticActor
from torchrl.objectives.multiagent import IPPOLoss, MAPPOLoss
from torchrl.objectives.value import MultiAgentGAE

from rnnkeys import GRUModule, get_env_transforms_from_module
from rnnkeys.objectives import SequenceMinibatches, recurrent_loss
from tests.support.recurrent import chain
from tests.support.tolerances import assert_equal
from tests.support.tutorials import load_tutorial

AGENTS, WORDS, HIDDEN = 3, 2, 6
SEEN = WORDS + 1
GAMMA, LMBDA = 0.875, 0.75  # exact in float32
KEYS: dict[str, Any] = {"value": ("agents", "state_value")}


def make_layer(group: str, name: str, size: int = SEEN) -> Any:
    return GRUModule(
        size,
        HIDDEN,
        in_keys=[(group, "observation"), (group, f"{name}_h")],
        out_keys=[(group, name), ("next", group, f"{name}_h")],
    )


def make_networks(name: str, outputs: int, out: str, own: bool) -> list[Any]:
    """Make a network of each agent's own observation, with shared or separate weights."""
    groups = [f"agent_{number}" for number in range(AGENTS)] if own else ["agents"]
    networks: list[Any] = []
    for group in groups:
        head = TensorDictModule(nn.Linear(HIDDEN, outputs), [(group, name)], [(group, out)])
        networks += [make_layer(group, name), head]
    if not own:
        return networks
    seen: Any = [(group, "observation") for group in groups]
    written: Any = [(group, out) for group in groups]
    split = TensorDictModule(lambda x: x.unbind(-2), [("agents", "observation")], seen)
    stack = TensorDictModule(lambda *x: torch.stack(x, -2), written, [("agents", out)])
    return [split, *networks, stack]


def make_critic(kind: str, own: bool) -> Any:
    if kind == "ippo":
        return chain(*make_networks("critic", 1, "state_value", own))
    joint: Any = [("team", "observation")]
    values: Any = [("team", "values")]
    head: Any = nn.Linear(HIDDEN, AGENTS)
    return chain(
        TensorDictModule(lambda x: x.flatten(-2), [("agents", "observation")], joint),
        make_layer("team", "critic", AGENTS * SEEN),
        TensorDictModule(head, [("team", "critic")], values),
        TensorDictModule(lambda x: x.unsqueeze(-1), values, [KEYS["value"]]),
    )


def make_actor(own: bool) -> Any:
    return ProbabilisticActor(
        chain(*make_networks("actor", WORDS, "logits", own)),
        in_keys=[("agents", "logits")],
        out_keys=[("agents", "one_hot")],
        distribution_class=OneHotCategorical,
        return_log_prob=True,
    )


def collect(actor: Any, critic: Any) -> TensorDict:
    """Play single steps, over several episodes in each row."""
    as_word = TensorDictModule(
        lambda x: x.argmax(-1), [("agents", "one_hot")], [("agents", "action")]
    )
    env = load_tutorial("recurrent_qmix").Password(4, AGENTS, WORDS)
    policy = chain(actor, as_word, critic)
    env = env.append_transform(get_env_transforms_from_module(policy))
    with torch.no_grad():
        data = env.rollout(17, policy, break_when_any_done=False)
    data["next", "reward"] = torch.randn(4, 17, 1)
    return data


def step_values(critic: Any, data: Any) -> Tensor:
    """Return the value of each next observation, each from the state after its step."""
    after = data["next"].reshape(-1).clone()
    after["is_init"] = torch.zeros(len(after), 1, dtype=torch.bool)
    with torch.no_grad():
        return critic(after)["agents", "state_value"].reshape(4, 17, AGENTS, 1)


def unroll_advantage(data: Any, value: Tensor, value_after: Tensor) -> Tensor:
    """Run the recursion of GAE for each agent; team rewards count for all."""
    reward, over, terminated = (
        data["next", key].unsqueeze(2).float() for key in ("reward", "done", "terminated")
    )
    delta = reward + GAMMA * (1 - terminated) * value_after - value
    advantage, rows = torch.zeros(4, AGENTS, 1), []
    for t in reversed(range(17)):
        advantage = delta[:, t] + GAMMA * LMBDA * (1 - over[:, t]) * advantage
        rows.append(advantage)
    return torch.stack(rows[::-1], 1)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", ["mappo", "ippo"])
def test_advantages_of_agents_equal_the_recursion_over_single_steps(kind: str, own: bool) -> None:
    torch.manual_seed(0)
    actor, critic = make_actor(own), make_critic(kind, own)
    data: Any = collect(actor, critic)
    assert data["is_init"].sum() > 8
    value = data["agents", "state_value"]
    expected = unroll_advantage(data, value, step_values(critic, data))
    estimator: Any = MultiAgentGAE(gamma=GAMMA, lmbda=LMBDA, value_network=critic)
    estimator.set_keys(**KEYS)
    batch = data.exclude(("agents", "state_value"))
    with torch.no_grad():
        recurrent_loss(estimator)(batch)
    assert_equal(batch["advantage"], expected, torch.float32, "advantage")
    assert_equal(batch["value_target"], expected + value, torch.float32, "target")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("kind", "make_loss"), [("mappo", MAPPOLoss), ("ippo", IPPOLoss)])
def test_losses_of_agents_start_at_the_ratio_one_and_reach_every_weight(
    kind: str, make_loss: Any, own: bool
) -> None:
    torch.manual_seed(0)
    actor, critic = make_actor(own), make_critic(kind, own)
    data: Any = collect(actor, critic)
    estimator: Any = MultiAgentGAE(gamma=GAMMA, lmbda=LMBDA, value_network=critic)
    estimator.set_keys(**KEYS)
    loss: Any = make_loss(actor, critic)
    loss.set_keys(
        action=("agents", "one_hot"), sample_log_prob=("agents", "one_hot_log_prob"), **KEYS
    )
    with torch.no_grad():
        recurrent_loss(estimator)(data)
    minibatches = SequenceMinibatches(seq_len=6, networks=chain(actor, critic))
    recurrent_loss(loss)
    for batch in minibatches(data):
        terms = loss(batch)
        total: Any = sum(value for key, value in terms.items() if key.startswith("loss_"))
        total.backward()
        assert terms["clip_fraction"] == 0
        torch.testing.assert_close(terms["max_ratio"], torch.tensor(1.0), atol=1e-5, rtol=0)
    gradients = {name: p.grad for name, p in loss.named_parameters() if p.requires_grad}
    assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients.values())
