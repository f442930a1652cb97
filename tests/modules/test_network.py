"""``RecurrentNetwork``: the recurrent modules inside a network, their keys, and ways to run it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchrl.modules
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import OneHot
from torchrl.objectives import DQNLoss
from torchrl.objectives.value import TD0Estimator

from rnnkeys import GRUModule, LSTMModule, drqn_policy, set_recurrent_mode
from rnnkeys.modules import RecurrentNetwork
from rnnkeys.modules.network import eval_mode


def _chain(*modules: Any) -> TensorDictSequential:
    # tensordict annotates the starred argument as a list.
    return TensorDictSequential(*modules)


def _two_layers() -> TensorDictSequential:
    gru = GRUModule(
        5,
        4,
        in_keys=["h", ("agents", "state")],
        out_keys=["y", ("next", "agents", "state")],
        init_key="start",
    )
    return _chain(LSTMModule(3, 5, in_key="observation", out_key="h"), gru)


def test_network_with_two_layers_lists_keys_of_both():
    network = RecurrentNetwork(_two_layers())
    assert network.state_keys == (
        "recurrent_state_h",
        "recurrent_state_c",
        ("agents", "state"),
    )
    assert network.init_keys == ("is_init", "start")
    assert network.pairs == (
        ("recurrent_state_h", "is_init"),
        ("recurrent_state_c", "is_init"),
        (("agents", "state"), "start"),
    )
    assert network.input_keys == ("observation",)
    assert set(network.output_keys) == {
        "h",
        "y",
        ("next", "recurrent_state_h"),
        ("next", "recurrent_state_c"),
        ("next", "agents", "state"),
    }


def test_network_with_one_module_twice_lists_it_once():
    gru = GRUModule(3, 3, in_key="x", out_key="x")
    assert RecurrentNetwork(_chain(gru, gru)).modules == (gru,)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: DQNLoss(net, action_space="one-hot"),
        lambda net: TD0Estimator(gamma=0.9, value_network=net),
    ],
    ids=["loss", "estimator"],
)
def test_network_inside_loss_or_estimator_is_found(wrap):
    policy = drqn_policy(OneHot(2), (4,), hidden_size=8)
    inside = RecurrentNetwork(wrap(policy))
    assert inside.state_keys == RecurrentNetwork(policy).state_keys
    assert ("next", "recurrent_state_h") in inside.output_keys
    assert "loss" not in inside.output_keys


def test_drqn_policy_two_best_actions_chooses_one():
    policy = drqn_policy(OneHot(3), (4,), hidden_size=8)
    for parameter in policy.parameters():
        nn.init.zeros_(parameter)  # all actions have the value 0
    step = policy(
        TensorDict(observation=torch.ones(2, 4), is_init=torch.ones(2, 1).bool(), batch_size=[2])
    )
    assert step["action"].tolist() == [[1, 0, 0]] * 2
    assert step["chosen_action_value"].tolist() == [[0.0]] * 2


def test_network_with_torchrls_module_is_found_and_writes_no_states():
    theirs = torchrl.modules.LSTMModule(3, 5, in_key="observation", out_key="embed")
    ours = GRUModule(3, 5, in_key="observation", out_key="embed")
    found = RecurrentNetwork(_chain(theirs, ours))
    assert [one.writes_states for one in found.layers] == [False, True]
    assert found.layers[0].state_keys == ("recurrent_state_h", "recurrent_state_c")
    assert found.initial_states([2])["recurrent_state_h"].shape == (2, 1, 5)


def test_network_without_recurrent_module_is_rejected_by_name():
    network = RecurrentNetwork(TensorDictModule(nn.Linear(1, 1), ["a"], ["b"]))
    assert network.modules == ()
    with pytest.raises(ValueError, match="no recurrent module inside TensorDictModule"):
        network.check_is_recurrent()


def test_run_sequences_leaves_the_batch_and_equals_a_call_in_recurrent_mode():
    gru = GRUModule(3, 5, in_key="observation", out_key="embed")
    batch = TensorDict(observation=torch.randn(2, 7, 3), other=torch.ones(2, 7), batch_size=[2, 7])
    batch["is_init"] = torch.rand(2, 7, 1) < 0.3
    out = RecurrentNetwork(gru).run_sequences(batch)
    assert set(batch.keys()) == {"observation", "other", "is_init"}
    assert "other" not in out
    with set_recurrent_mode(True):
        assert torch.equal(out["embed"], gru(batch)["embed"])


def test_run_step_runs_one_step_whatever_mode_is_in_force():
    gru = GRUModule(3, 5, in_key="observation", out_key="embed")
    step = TensorDict(observation=torch.randn(2, 3), batch_size=[2])
    step["is_init"] = torch.zeros(2, 1, dtype=torch.bool)
    step["recurrent_state"] = torch.randn(2, 1, 5)
    network = RecurrentNetwork(gru)
    with set_recurrent_mode(True):
        out = network.run_step(step)
    assert "embed" not in step
    assert torch.equal(out["embed"], gru(step)["embed"])


def test_initial_states_have_shape_dtype_and_own_memory():
    states = RecurrentNetwork(_two_layers().double()).initial_states([2, 3])
    assert states.batch_size == (2, 3)
    assert states["recurrent_state_c"].shape == (2, 3, 1, 5)
    assert states["agents", "state"].shape == (2, 3, 1, 4)
    assert states["agents", "state"].dtype == torch.float64
    states["recurrent_state_c"][0] += 1
    assert not states["recurrent_state_c"][1].any()


def test_initial_states_with_example_have_dimensions_of_agents():
    gru = GRUModule(
        3,
        5,
        in_keys=[("agents", "observation"), ("agents", "h")],
        out_keys=[("agents", "embed"), ("next", "agents", "h")],
    )
    example = TensorDict({("agents", "observation"): torch.zeros(1, 4, 3)}, [1])
    states = RecurrentNetwork(gru).initial_states([2], example)
    assert states["agents", "h"].shape == (2, 4, 1, 5)
    assert not states["agents", "h"].any()
    assert ("next", "agents", "h") not in example


def test_eval_mode_switches_every_module_and_restores_each():
    network = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    network[0].eval()
    before = [module.training for module in network.modules()]
    with eval_mode(network):
        assert not any(module.training for module in network.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in network.modules()] == before == [True, False, True, True]
    assert torch.is_grad_enabled()
