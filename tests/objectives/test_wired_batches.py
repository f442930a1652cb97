"""Batches that a wired loss must get right, or reject by name and leave as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torch.nn.functional import one_hot
from torchrl.collectors.utils import split_trajectories
from torchrl.data import Categorical
from torchrl.modules import QValueModule
from torchrl.objectives import (
    A2CLoss,
    BCLoss,
    ClipPPOLoss,
    DQNLoss,
    GAILLoss,
    REDQLoss,
    ReinforceLoss,
    SACLoss,
    SoftUpdate,
    ValueEstimators,
)
from torchrl.objectives.value import GAE, MultiAgentGAE, TD1Estimator, TDLambdaEstimator

import rnnkeys
from rnnkeys import GRUModule
from rnnkeys.checks import set_value_checks
from rnnkeys.objectives import recurrent_loss
from tests.support import target_cases as cases
from tests.support.policy_gradients import collect, make_agent
from tests.support.recurrent import chain
from tests.support.sequence_data import assert_untouched, tensors
from tests.support.target_cases import CASES

BY_NAME = {case.name: case for case in CASES}
MASK = ("collector", "mask")
T, A = 8, 3


# Agents that end apart.


def per_agent_critic() -> Any:
    gru = GRUModule(
        3,
        5,
        in_keys=[("agents", "observation"), ("agents", "h")],
        out_keys=[("agents", "embed"), ("next", "agents", "h")],
        init_key=("agents", "is_init"),
    )
    head = TensorDictModule(torch.nn.Linear(5, 1), [("agents", "embed")], [("agents", "value")])
    return cases.Seq(gru, head)


def agents_that_end(done: Tensor) -> TensorDict:
    """Return a row of agents ``[1, T]``; ``done`` is bool ``[1, T, A, 1]``."""
    torch.manual_seed(3)
    observation = torch.randn(1, T + 1, A, 3)
    flags = torch.cat([torch.ones(1, 1, A, 1, dtype=torch.bool), done[:, :-1]], 1)
    after = torch.randn(1, T, A, 1, 5)
    before = torch.cat([torch.zeros(1, 1, A, 1, 5), after[:, :-1]], 1)
    before = before.masked_fill(flags.unsqueeze(-1), 0)
    root = {"observation": observation[:, :-1], "is_init": flags, "h": before}
    ahead = {"observation": observation[:, 1:], "is_init": torch.zeros_like(flags), "h": after}
    ahead |= {"done": done, "terminated": done.clone(), "reward": torch.ones(1, T, A, 1)}
    agents = {"agents": TensorDict(root, [1, T, A])}
    following = TensorDict({"agents": TensorDict(ahead, [1, T, A])}, [1, T])
    return TensorDict({**agents, "next": following}, [1, T])


@pytest.mark.parametrize(
    ("kind", "options"),
    [(GAE, {"lmbda": 0.9}), (TDLambdaEstimator, {"lmbda": 0.9}), (TD1Estimator, {})],
    ids=["GAE", "TD(lambda)", "TD(1)"],
)
def test_estimator_with_an_agent_that_ends_leaves_the_returns_of_others(
    kind: Any, options: Any
) -> None:
    estimator: Any = kind(
        gamma=0.9, value_network=per_agent_critic(), deactivate_vmap=True, **options
    )
    names = ("reward", "done", "terminated", "advantage", "value_target")
    estimator.set_keys(value=("agents", "value"), **{name: ("agents", name) for name in names})
    estimator = recurrent_loss(estimator)
    done = torch.zeros(1, T, A, 1, dtype=torch.bool)
    alive = estimator(agents_that_end(done))["agents", "advantage"]
    done[0, 3, 1] = True
    apart = estimator(agents_that_end(done))["agents", "advantage"]
    torch.testing.assert_close(apart[:, :, [0, 2]], alive[:, :, [0, 2]])
    assert not torch.isclose(apart[:, :4, 1], alive[:, :4, 1]).any()


def test_team_estimator_with_an_agent_that_restarts_continues() -> None:
    """The team's return ends with the team, not where one agent's recurrent state is reset."""
    critic = per_agent_critic()
    gae: Any = MultiAgentGAE(gamma=0.9, lmbda=0.9, value_network=critic, agent_dim=-2)
    gae.set_keys(
        value=("agents", "value"),
        advantage=("agents", "advantage"),
        value_target=("agents", "value_target"),
    )
    gae = recurrent_loss(gae)
    done = torch.zeros(1, T, A, 1, dtype=torch.bool)
    results = []
    for restarts in (False, True):
        done[0, 3, 1] = restarts
        batch = agents_that_end(done)
        batch = batch.exclude(("next", "agents", "done"), ("next", "agents", "terminated"))
        batch["next", "reward"] = torch.ones(1, T, 1)
        batch["next", "done"] = torch.zeros(1, T, 1, dtype=torch.bool)
        batch["next", "terminated"] = torch.zeros(1, T, 1, dtype=torch.bool)
        results.append(gae(batch)["agents", "advantage"])
    assert torch.equal(results[0][:, :, 0], results[1][:, :, 0])


# Entries that are wrong.


def dqn(name: str = "DQN double delayed TD0") -> tuple[Any, TensorDictBase]:
    case = BY_NAME[name]
    setup = case.make(rnnkeys, "gru")
    return recurrent_loss(setup.loss), cases.flat(case, setup.policy)


def check_raises(loss: Any, batch: TensorDictBase, error: type[Exception], message: str) -> None:
    before = tensors(batch)
    with pytest.raises(error, match=message):
        loss(batch)
    assert_untouched(batch, before)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "done of bytes": (
        lambda b: b.set(("next", "done"), b["next", "done"].byte()),
        TypeError,
        r"'done'\) must be bool. Got torch.uint8.*\[done-dtype\]",
    ),
    "done of integers": (
        lambda b: b.set(("next", "done"), b["next", "done"].long()),
        TypeError,
        r"\[done-dtype\]",
    ),
    "done without its last dimension": (
        lambda b: b.set(("next", "done"), b["next", "done"].squeeze(-1)),
        ValueError,
        r"'done'\) must have the shape.*\[done-shape\]",
    ),
    "terminated of bytes": (
        lambda b: b.set(("next", "terminated"), b["next", "terminated"].byte()),
        TypeError,
        r"'terminated'\) must be bool.*\[done-dtype\]",
    ),
    "flags of floats": (
        lambda b: b.set("is_init", b["is_init"].float()),
        TypeError,
        r"\[init-dtype\]",
    ),
    "no step": (lambda b: b[:0], ValueError, r"\[no-steps\]"),
    "one step": (lambda b: b[0], ValueError, r"\[no-time\]"),
    "no next": (lambda b: b.exclude("next"), KeyError, r"\[next\]"),
    "nothing valid": (
        lambda b: b.set(MASK, torch.zeros(len(b), dtype=torch.bool)),
        ValueError,
        r"\[mask-empty\]",
    ),
    "mask of integers": (
        lambda b: b.set(MASK, torch.ones(len(b), dtype=torch.long)),
        TypeError,
        r"\[mask-dtype\]",
    ),
    "shuffled": (
        lambda b: b[torch.randperm(len(b), generator=torch.Generator().manual_seed(0))],
        ValueError,
        r"\[continuity\]",
    ),
    "shuffled without ids": (
        lambda b: b.exclude("collector", "step_count", "index")[
            torch.randperm(len(b), generator=torch.Generator().manual_seed(0))
        ],
        ValueError,
        r"next', 'actor_h'.*\[continuity\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wired_loss_of_a_bad_batch_raises_and_leaves_it(name: str) -> None:
    change, error, message = BAD[name]
    loss, batch = dqn()
    check_raises(loss, change(batch), error, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "key", ["observation", ("next", "observation"), ("next", "reward"), "actor_h"]
)
def test_wired_loss_of_an_entry_that_is_not_finite_names_it(key: Any, value: float) -> None:
    loss, batch = dqn()
    starts = batch["is_init"].flatten().nonzero().flatten()
    entry = batch.get(key).clone()
    entry[starts[1] if key == "actor_h" else 5] = value
    name = key if isinstance(key, str) else key[-1]
    with set_value_checks(False):
        assert not loss(batch.clone().set(key, entry))["loss"].isfinite()
    check_raises(
        loss, batch.set(key, entry), ValueError, rf"{name}.* is not finite.*\[not-finite\]"
    )


def test_wired_loss_of_a_stale_state_that_is_not_finite_is_finite() -> None:
    """A state inside a segment is not read."""
    loss, batch = dqn()
    inside = (~batch["is_init"].flatten()[1:]).nonzero().flatten() + 1
    for step in inside[:3].tolist():
        batch["actor_h"][step] = float("nan")
        batch["next", "actor_h"][step - 1] = float("nan")
    assert loss(batch)["loss"].isfinite()


def test_wired_loss_with_a_mask_per_agent_names_the_remedy() -> None:
    loss, batch = dqn()
    batch.set(MASK, torch.ones(len(batch), 3, dtype=torch.bool))
    check_raises(loss, batch, ValueError, r"loss.loss_mask_key = \"alive\".*\[mask-shape\]")


def test_wired_loss_with_a_named_mask_rejects_one_without_a_step() -> None:
    loss, batch = dqn()
    loss.loss_mask_key = "learned"
    learned = torch.zeros(len(batch), dtype=torch.bool)
    check_raises(
        loss,
        batch.clone().set("learned", learned),
        ValueError,
        r"mask 'learned' of .* is False everywhere.*\[mask-empty\]",
    )
    check_raises(
        loss, batch.clone().set("learned", learned.byte()), TypeError, r"'learned'.*\[mask-dtype\]"
    )
    with set_value_checks(False):
        assert loss(batch.clone().set("learned", learned))["loss"] == 0
    learned[3] = True
    assert loss(batch.set("learned", learned))["loss"] > 0


def test_wired_loss_with_two_masks_that_share_no_step_raises() -> None:
    loss, batch = dqn()
    first = torch.arange(len(batch)) < 9
    check_raises(
        loss,
        batch.set(MASK, first).set("shifted_valid", ~first),
        ValueError,
        r"shifted_valid'\] of .* is False everywhere.*\[mask-empty\]",
    )


def test_wired_loss_of_a_feed_forward_network_checks_values() -> None:
    policy = rnnkeys.drqn_policy(Categorical(2), (3,), cell="feed_forward", hidden_size=4)
    loss: Any = recurrent_loss(DQNLoss(policy, action_space="categorical", delay_value=False))
    _, batch = dqn()
    batch["action"] = batch["action"] % 2
    loss(batch.clone())
    spoiled = batch.clone()
    spoiled["observation"][5] = float("nan")
    check_raises(loss, spoiled, ValueError, r"'observation' is not finite.*\[not-finite\]")
    backwards: Any = batch[torch.arange(len(batch)).flip(0)]
    check_raises(loss, backwards, ValueError, r"\[continuity\]")


def test_recurrent_loss_of_networks_that_share_state_keys_warns() -> None:
    actor, critic = cases._random_actor(rnnkeys, "gru"), cases._critic(rnnkeys, "gru", "actor")
    message = r"GRUModule and GRUModule in SACLoss.*'actor_h'.*\[shared-key\]"
    loss = SACLoss(actor, critic, target_entropy=-1.0)  # pyright: ignore[reportArgumentType]
    with pytest.warns(UserWarning, match=message):
        recurrent_loss(loss)


def test_recurrent_loss_of_networks_that_share_a_layer_is_silent() -> None:
    agent = make_agent(shared=True)
    recurrent_loss(ClipPPOLoss(agent.actor, agent.critic))


@pytest.mark.parametrize("name", ["DQN double delayed TD0", "GAE", "SAC"])
def test_wired_loss_with_entries_called_like_clocks_accepts_them(name: str) -> None:
    case = BY_NAME[name]
    setup = case.make(rnnkeys, "gru")
    loss = recurrent_loss(setup.loss)
    batch = cases.flat(case, setup.policy)
    for key in ("step_count", "index"):
        batch[key] = torch.randint(0, 50, (len(batch), 1))
        batch["next", key] = torch.randint(0, 50, (len(batch), 1))
    loss(batch)


@pytest.mark.parametrize("kind", [SACLoss, REDQLoss])
def test_wired_loss_without_states_of_the_critic_starts_them_from_zeros(kind: Any) -> None:
    torch.manual_seed(0)
    actor, critic = cases._random_actor(rnnkeys, "gru"), cases._critic(rnnkeys, "gru", "critic")
    options: Any = {"num_qvalue_nets": 2, "target_entropy": -1.0}
    if kind is REDQLoss:
        options["sub_sample_len"] = 2
    loss = cases._finish(recurrent_loss(kind(actor, critic, **options)), actor).loss
    batch = cases.flat(BY_NAME["SAC"], cases.Seq(actor, critic))
    bare = batch.exclude("critic_h", ("next", "critic_h"))
    zeros = batch.clone()
    for key in ("critic_h", ("next", "critic_h")):
        zeros[key] = torch.zeros_like(zeros[key])
    results = []
    for data in (bare, zeros):
        torch.manual_seed(1)
        results.append(loss(data)["loss_qvalue"])
    assert torch.equal(*results)


def test_wired_loss_of_critics_with_dropout_names_the_switch_of_its_randomness() -> None:
    torch.manual_seed(0)
    actor, critic = cases._random_actor(rnnkeys, "gru"), cases._critic(rnnkeys, "gru", "critic")
    layer = critic[0]
    options: Any = {"in_keys": layer.in_keys, "out_keys": layer.out_keys}
    deep = GRUModule(3, cases.HIDDEN, num_layers=2, dropout=0.5, **options)
    critic = cases.Seq(deep, *list(critic)[1:])
    loss = recurrent_loss(SACLoss(actor, critic, target_entropy=-1.0))
    loss = cases._finish(loss, actor).loss
    batch = cases.flat(BY_NAME["SAC"], cases.Seq(actor, critic))
    check_raises(loss, batch, RuntimeError, r"set_vmap_randomness\('different'\)\. \[network-input")
    loss.set_vmap_randomness("different")
    assert loss(batch)["loss_qvalue"].isfinite()


def test_wired_loss_with_lambda_zero_names_the_switch_that_gives_one_step_targets() -> None:
    loss, batch = dqn()
    values = {}
    for kind, options in (("TD0", {}), ("TDLambda", {"lmbda": 0.0, "vectorized": False})):
        loss.make_value_estimator(ValueEstimators[kind], gamma=0.9, **options)
        values[kind] = loss(batch)["loss"]
    torch.testing.assert_close(values["TD0"], values["TDLambda"])
    loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9, lmbda=0.0)
    check_raises(loss, batch, RuntimeError, r"pass vectorized=False .* \[network-input")


def test_recurrent_loss_of_gail_raises() -> None:
    network = cases.Seq(
        TensorDictModule(lambda o, a: torch.cat([o, a], -1), ["eo", "ea"], ["both"]),
        GRUModule(4, 5, in_key="both", out_key="y"),
        TensorDictModule(torch.nn.Linear(5, 1), ["y"], ["d_logits"]),
    )
    with pytest.raises(ValueError, match=r"GAILLoss.*without is_init flags.*\[unsupported-loss\]"):
        recurrent_loss(GAILLoss(network, use_grad_penalty=False))


def test_wired_ppo_of_shuffled_steps_without_ids_raises() -> None:
    """``env.rollout`` writes no trajectory ids; the stored states show the order."""
    agent = make_agent()
    data: Any = collect(agent)
    recurrent_loss(GAE(gamma=0.9, lmbda=0.8, value_network=agent.critic))(data)
    data["is_init"][:, 0] = True
    flat = data.reshape(-1).exclude("collector", "step_count")
    loss = recurrent_loss(ClipPPOLoss(agent.actor, agent.critic))
    loss(flat)
    torch.manual_seed(0)
    check_raises(loss, flat[torch.randperm(len(flat))], ValueError, r"\[continuity\]")


def test_wired_loss_of_split_trajectories_names_where_their_mask_belongs() -> None:
    agent = make_agent()
    data: Any = collect(agent).exclude("collector")
    recurrent_loss(GAE(gamma=0.9, lmbda=0.8, value_network=agent.critic))(data)
    loss = recurrent_loss(ClipPPOLoss(agent.actor, agent.critic))
    split = split_trajectories(data)
    assert not split["mask"].all()
    check_raises(loss, split, ValueError, r"\('collector', 'mask'\).*\[mask-key\]")
    split[MASK] = split["mask"]
    split, whole = loss(split), loss(data)
    for name in ("loss_objective", "loss_critic", "loss_entropy"):
        torch.testing.assert_close(split[name], whole[name])


@pytest.mark.parametrize("key", ["action", "action_log_prob"])
def test_wired_loss_of_a_batch_collected_with_gradient_names_the_remedy(key: str) -> None:
    agent = make_agent("continuous")
    data: Any = collect(agent)
    recurrent_loss(GAE(gamma=0.9, lmbda=0.8, value_network=agent.critic))(data)
    data[key] = data[key].clone().requires_grad_() * 1
    loss = recurrent_loss(ClipPPOLoss(agent.actor, agent.critic))
    message = rf"'{key}' .*torch.no_grad\(\).*\[collected-with-gradient\]"
    check_raises(loss, data, RuntimeError, message)
    loss(data.detach())


def test_wired_loss_without_an_entry_that_it_reads_names_it() -> None:
    agent = make_agent()
    data: Any = collect(agent)
    recurrent_loss(GAE(gamma=0.9, lmbda=0.8, value_network=agent.critic))(data)
    loss = recurrent_loss(ClipPPOLoss(agent.actor, agent.critic))
    message = r"missing, \[.*action_log_prob.*\], or name its key.*set_keys\(\).*\[network-input\]"
    check_raises(loss, data.exclude("action_log_prob"), KeyError, message)


def test_wired_ppo_of_states_before_the_reset_warns() -> None:
    """Other libraries store the state that the episode before ended with."""
    agent = make_agent()
    data: Any = collect(agent, steps=30)
    recurrent_loss(GAE(gamma=0.9, lmbda=0.8, value_network=agent.critic))(data)
    loss = recurrent_loss(ClipPPOLoss(agent.actor, agent.critic))
    loss(data)
    for key in ("actor_h", "value_h"):
        data[key][:, 1:] = data["next", key][:, :-1]
    with pytest.warns(UserWarning, match=r"batch.get\(.*\)\] = 0.*\[episode-state\]"):
        loss(data)


@pytest.mark.filterwarnings("ignore:The name target_actor_network_params:UserWarning")
def test_wired_behavior_cloning_without_next_runs() -> None:
    agent = make_agent("continuous")
    data: Any = collect(agent)
    loss: Any = BCLoss(agent.actor, loss_function="l2")
    out = recurrent_loss(loss)(data.exclude("next"))
    assert out["loss_bc"].isfinite()


def make_tied_dqn(space: str, double: bool) -> tuple[Any, TensorDict]:
    """A wired DQN whose three actions all have the value 1, and a batch of two rows."""
    head = torch.nn.Linear(4, 3)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.ones_(head.bias)
    policy = chain(
        GRUModule(2, 4, in_key="observation", out_key="embed"),
        TensorDictModule(head, ["embed"], ["action_value"]),
        QValueModule(space),
    )
    loss = DQNLoss(policy, action_space=space, double_dqn=double, delay_value=True)
    loss.make_value_estimator(gamma=0.25)
    SoftUpdate(loss, tau=0.5)
    batch = TensorDict({"observation": torch.randn(2, 5, 2)}, [2, 5])
    batch["is_init"] = torch.zeros(2, 5, 1, dtype=torch.bool)
    batch["is_init"][:, 0] = True
    batch["action"] = torch.zeros(2, 5, dtype=torch.long)
    batch["next"] = {"observation": torch.randn(2, 5, 2), "reward": torch.zeros(2, 5, 1)}
    batch["next", "done"] = batch["next", "terminated"] = torch.zeros(2, 5, 1, dtype=torch.bool)
    return recurrent_loss(loss), batch


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("space", ["one_hot", "categorical"])
def test_wired_loss_of_tied_values_bootstraps_from_one_of_them(space: str, double: bool) -> None:
    loss, batch = make_tied_dqn(space, double)
    if space == "one_hot":
        batch["action"] = one_hot(batch["action"], 3)
    # The value is 1 and its target 0 + 0.25 * 1.
    torch.testing.assert_close(loss(batch)["loss"], torch.tensor((1 - 0.25) ** 2))


def test_wired_loss_makes_its_policy_choose_one_of_tied_actions() -> None:
    policy = chain(
        GRUModule(2, 4, in_key="observation", out_key="embed"),
        TensorDictModule(lambda x: torch.zeros(len(x), 3), ["embed"], ["action_value"]),
        QValueModule("one_hot"),
    )
    recurrent_loss(DQNLoss(policy, action_space="one_hot"))
    step = TensorDict(observation=torch.zeros(2, 2), batch_size=[2])
    step["is_init"] = torch.ones(2, 1, dtype=torch.bool)
    assert policy(step)["action"].tolist() == [[1, 0, 0]] * 2


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda index: index, "action-shape"),
        (lambda index: index.unsqueeze(-1), "action-shape"),
        (lambda index: torch.ones(*index.shape, 3), "action-one-hot"),
    ],
    ids=["indices", "indices with a last dimension", "several ones"],
)
def test_wired_loss_of_one_hot_actions_rejects_others(change: Any, check: str) -> None:
    loss, batch = make_tied_dqn("one_hot", False)
    batch["action"] = change(batch["action"])
    with pytest.raises(ValueError, match=rf"\[{check}\]"):
        loss(batch)


@pytest.fixture(scope="module")
def collected() -> Any:
    """An agent, and a square batch ``[5, 5]``, in which wrong shapes broadcast."""
    agent = make_agent()
    batch = collect(agent, steps=5, envs=5)
    batch["advantage"] = torch.randn(5, 5, 1)
    batch["value_target"] = torch.randn(5, 5, 1)
    batch["is_init"][:, 0] = True  # of rows that are laid end to end
    return agent, batch


@pytest.mark.parametrize("key", ["advantage", "value_target"])
@pytest.mark.parametrize("kind", [ClipPPOLoss, A2CLoss, ReinforceLoss])
@pytest.mark.parametrize("shape", [(5, 5), (25,)], ids=str)
def test_wired_policy_loss_rejects_advantages_without_last_dimension(
    collected: Any, shape: tuple[int, ...], kind: Any, key: str
) -> None:
    agent, batch = collected
    batch = batch.reshape(shape).copy()
    loss = recurrent_loss(kind(agent.actor, agent.critic))
    loss(batch.clone())
    batch[key] = batch[key].squeeze(-1)
    with pytest.raises(ValueError, match=rf"'{key}' must .* Got \[.*\[advantage-shape\]"):
        loss(batch)


@pytest.mark.parametrize("shape", [(5, 5), (25,)], ids=str)
def test_wired_ppo_rejects_log_probabilities_of_another_shape(
    collected: Any, shape: tuple[int, ...]
) -> None:
    agent, batch = collected
    batch = batch.reshape(shape).copy()
    batch["action_log_prob"] = batch["action_log_prob"].unsqueeze(-1)
    loss = recurrent_loss(ClipPPOLoss(agent.actor, agent.critic))
    with pytest.raises(ValueError, match=r"'action_log_prob' .* \[log-prob-shape\]"):
        loss(batch)
