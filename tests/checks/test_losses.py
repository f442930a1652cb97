"""Checks of the batches of losses and value estimators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.modules import GRUModule as TorchRLGRUModule
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from rnnkeys import GRUModule
from rnnkeys.checks.losses import (
    find_batch_problems,
    find_number_keys,
    find_start_problems,
    find_written_state_problems,
    needs_next,
)
from rnnkeys.modules.network import RecurrentNetwork
from tests.support.policy_gradients import make_agent
from tests.support.recurrent import chain


@pytest.mark.parametrize("option", ["num_chunks", "value_chunk_size"])
@pytest.mark.parametrize(("dim", "is_time"), [(-1, True), (1, True), (0, False), (-2, False)])
def test_find_batch_problems_of_chunks_along_time_yields_one(
    dim: int, is_time: bool, option: str
) -> None:
    critic = TensorDictModule(
        torch.nn.Linear(3, 1), in_keys=["observation"], out_keys=["state_value"]
    )
    chunks: dict[str, Any] = {option: 2, "value_chunk_dim": dim}
    gae = GAE(gamma=0.9, lmbda=0.9, value_network=critic, **chunks)
    flags = torch.zeros(4, 6, 1, dtype=torch.bool)
    after = {"done": flags, "terminated": flags, "reward": torch.ones(4, 6, 1)}
    batch = TensorDict({"observation": torch.ones(4, 6, 3), "next": after}, [4, 6])
    checks = [problem.check for problem in find_batch_problems(gae, batch, [])]
    assert checks == ["chunks-of-time"] * is_time


@pytest.mark.parametrize(
    ("arguments", "stored", "checks"),
    [
        ({}, True, ["next-state-missing"]),
        ({"skip_existing": True}, False, ["next-state-missing"]),
        ({"skip_existing": True}, True, []),
        ({"shifted": True}, False, []),
    ],
)
def test_find_batch_problems_without_next_states_accepts_values_that_are_stored(
    arguments: dict[str, Any], stored: bool, checks: list[str]
) -> None:
    gru = GRUModule(3, 5, in_key="observation", out_key="embed")
    critic = chain(gru, TensorDictModule(torch.nn.Linear(5, 1), ["embed"], ["state_value"]))
    gae = GAE(gamma=0.9, lmbda=0.9, value_network=critic, **arguments)
    flags = torch.zeros(4, 6, 1, dtype=torch.bool)
    after = {"done": flags, "terminated": flags, "reward": torch.ones(4, 6, 1)}
    batch = TensorDict({"observation": torch.ones(4, 6, 3), "next": after}, [4, 6])
    batch["is_init"] = (torch.arange(6) == 0)[:, None].expand(4, 6, 1)
    if stored:
        batch["next", "state_value"] = torch.ones(4, 6, 1)
    problems = find_batch_problems(gae, batch, RecurrentNetwork(gae).layers)
    assert [problem.check for problem in problems] == checks


def test_find_start_problems_needs_flags_and_steps_to_read() -> None:
    layer = RecurrentNetwork(GRUModule(3, 5, in_key="observation", out_key="embed")).layers[0]
    flags = torch.tensor([[True, False], [False, True]]).unsqueeze(-1)
    batch = TensorDict({"is_init": flags}, [2, 2])
    [problem] = find_start_problems(batch, layer, "A loss")
    assert problem.check == "state-missing" and problem.error is KeyError
    stored = {layer.state_keys[0]: torch.zeros(2, 2, 1, 5)}
    rights: list[Any] = [batch[:1], batch[:0], batch[0, 0], batch.exclude("is_init")]
    rights.append(batch.to("meta"))
    for right in (*rights, batch.clone().update(stored)):
        assert not list(find_start_problems(right, layer, "A loss"))


def test_needs_next_of_a_loss_on_collected_data_depends_on_the_advantage() -> None:
    agent = make_agent()
    loss = ClipPPOLoss(agent.actor, agent.critic)
    estimator = GAE(gamma=0.9, lmbda=0.9, value_network=agent.critic)
    batch = TensorDict({"advantage": torch.zeros(2, 3, 1)}, [2, 3])
    for computed in (batch, batch.exclude("advantage")):
        assert needs_next(estimator, computed)
        assert needs_next(loss, computed) == ("advantage" not in computed)
    loss.set_keys(advantage="other")
    assert needs_next(loss, batch)


def test_find_number_keys_are_those_that_a_loss_reads() -> None:
    agent = make_agent()
    loss = ClipPPOLoss(agent.actor, agent.critic)
    estimator = GAE(gamma=0.9, lmbda=0.9, value_network=agent.critic)
    assert find_number_keys(estimator) == [("next", "reward")]
    assert find_number_keys(loss) == [("next", "reward"), "advantage", "value_target"]
    loss.set_keys(advantage="other", reward="gain")
    assert find_number_keys(loss) == [("next", "gain"), "other", "value_target"]


def test_find_written_state_problems_of_torchrls_module_names_ours() -> None:
    sizes: dict[str, Any] = {"in_key": "observation", "out_key": "embed"}
    [ours] = RecurrentNetwork(GRUModule(3, 5, **sizes)).layers
    assert not list(find_written_state_problems(ours, "A reader"))
    [theirs] = RecurrentNetwork(TorchRLGRUModule(3, 5, **sizes)).layers
    [problem] = find_written_state_problems(theirs, "A reader")
    assert problem.check == "states-not-written" and "torchrl's GRUModule" in problem.message
    assert "rnnkeys.GRUModule" in problem.remedy
