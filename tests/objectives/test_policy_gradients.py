"""Advantages and ratios of recurrent actors and critics on what they collected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import A2CLoss, ClipPPOLoss, ReinforceLoss, ValueEstimators
from torchrl.objectives.value import GAE, TD0Estimator, TD1Estimator, TDLambdaEstimator
from torchrl.trainers.algorithms import PPOTrainer

from rnnkeys import set_recurrent_mode
from rnnkeys.objectives import SequenceMinibatches, recurrent_loss
from tests.support.policy_gradients import SHAPES, Agent, collect, make_agent
from tests.support.target_cases import ShortEpisodes
from tests.support.tolerances import assert_equal

GAMMA, LAMBDA = 0.9, 0.8
ESTIMATORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "GAE": (GAE, {"lmbda": LAMBDA}),
    "GAE without vmap": (GAE, {"lmbda": LAMBDA, "deactivate_vmap": True}),
    "TD(lambda)": (TDLambdaEstimator, {"lmbda": LAMBDA}),
    "TD(0)": (TD0Estimator, {}),
    "TD(1)": (TD1Estimator, {}),
}
# From TorchRL 0.15 on.
if hasattr(GAE, "for_recurrent"):
    options = {"lmbda": LAMBDA, "average_gae": False}
    ESTIMATORS["GAE for recurrent networks"] = getattr(GAE, "for_recurrent"), options  # noqa: B009
in_every_shape = pytest.mark.parametrize("shared", SHAPES.values(), ids=SHAPES)
for_both_cells = pytest.mark.parametrize("cell", ["lstm", "gru"])


def single_step_values(agent: Agent, data: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Values that the critic gives one step at a time, before and after each step."""
    after: Any = data.get("next").select(*agent.critic.in_keys, strict=False)
    after.set("is_init", torch.zeros_like(data.get("is_init")))
    with torch.no_grad(), set_recurrent_mode(False):
        after = agent.critic(after.reshape(-1)).reshape(data.shape)
    return data.get("state_value"), after.get("state_value")


def expected_advantage(data: TensorDictBase, value: Tensor, after: Tensor, lmbda: float) -> Tensor:
    """GAE as the paper's sum, backwards, episode by episode."""
    reward, done, terminated = (data["next", k] for k in ("reward", "done", "terminated"))
    error = reward + GAMMA * after * ~terminated - value
    advantage = torch.zeros_like(error)
    ahead = torch.zeros_like(error[:, 0])
    for t in reversed(range(data.shape[1])):
        ahead = error[:, t] + GAMMA * lmbda * ahead * ~done[:, t]
        advantage[:, t] = ahead
    return advantage


@in_every_shape
@for_both_cells
@pytest.mark.parametrize("name", ESTIMATORS)
def test_values_and_advantages_equal_single_steps(name: str, cell: str, shared: bool) -> None:
    agent = make_agent("discrete", cell, shared)
    data = collect(agent)
    check_every_kind_of_end(data)
    value, after = single_step_values(agent, data)
    lmbda = {"TD(0)": 0.0, "TD(1)": 1.0}.get(name, LAMBDA)
    truth = expected_advantage(data, value, after, lmbda)
    kind, options = ESTIMATORS[name]
    estimate = recurrent_loss(kind(gamma=GAMMA, value_network=agent.critic, **options))
    result = estimate(data.clone())
    assert_equal(result["state_value"], value, torch.float32, "values")
    assert_equal(result["next", "state_value"], after, torch.float32, "next values")
    assert_equal(result["advantage"], truth, torch.float32, "advantages")
    assert_equal(result["value_target"], truth + value, torch.float32, "returns")


@pytest.mark.skipif(not hasattr(GAE, "for_recurrent"), reason="needs TorchRL 0.15")
@pytest.mark.parametrize("masks", [True, False], ids=["both masks", "its own mask"])
def test_gae_for_recurrent_networks_with_a_mask_ignores_padding(masks: bool) -> None:
    agent = make_agent()
    data = collect(agent)
    lengths = [data.shape[1] - 3 * row for row in range(len(data))]
    mask = torch.arange(data.shape[1]) < torch.tensor(lengths)[:, None]
    make: Any = getattr(GAE, "for_recurrent")  # noqa: B009
    options: dict[str, Any] = {"gamma": GAMMA, "lmbda": LAMBDA, "value_network": agent.critic}
    each = recurrent_loss(make(average_gae=False, **options))
    rows = [each(row[None, :length].clone())[0] for row, length in zip(data, lengths, strict=True)]
    advantage = torch.cat([row["advantage"] for row in rows])
    advantage = (advantage - advantage.mean()) / advantage.std()
    padded = data.clone().set("valid", mask)
    if masks:
        padded.set(("collector", "mask"), mask)
    padded["observation"][~mask] = padded["next", "observation"][~mask] = 1e3
    result = recurrent_loss(make(valid="valid", **options))(padded)
    torch.testing.assert_close(result["advantage"][mask], advantage)
    target = torch.cat([row["value_target"] for row in rows])
    torch.testing.assert_close(result["value_target"][mask], target)
    assert not result["advantage"][~mask].any() and not result["value_target"][~mask].any()


def check_every_kind_of_end(data: TensorDictBase) -> None:
    """Episodes terminate and are truncated inside, and some continue across the batch's ends."""
    terminated, done = (data["next", key][:, :-1] for key in ("terminated", "done"))
    assert terminated.any() and (done & ~terminated).any()
    assert not data["next", "done"][:, -1].all() and not data["is_init"][:, 0].all()


@in_every_shape
@for_both_cells
@pytest.mark.parametrize(
    ("kind", "double"),
    [("discrete", False), ("continuous", True)],
    ids=["discrete", "continuous"],
)
@pytest.mark.parametrize("seq_len", [None, 4, 7])
def test_ppo_ratios_in_the_first_epoch_are_one(
    kind: str,
    double: bool,
    cell: str,
    shared: bool,
    seq_len: int | None,
    request: pytest.FixtureRequest,
) -> None:
    """In float64 where the tanh's inverse enlarges rounding without bound."""
    if double:
        request.getfixturevalue("float64")
    atol = 1e-9 if double else 1e-5
    agent = make_agent(kind, cell, shared)
    data = collect(agent)
    recurrent_loss(GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=agent.critic))(data)
    loss = recurrent_loss(ClipPPOLoss(agent.actor, agent.critic))
    steps = 0
    for batch in SequenceMinibatches(None if seq_len is None else 2 * seq_len, seq_len)(data):
        with set_recurrent_mode(True):
            log_prob = agent.actor.get_dist(batch.clone()).log_prob(batch["action"])
        torch.testing.assert_close(log_prob, batch["action_log_prob"], rtol=0, atol=atol)
        out = loss(batch)
        for name in ("max_ratio", "mean_ratio"):
            torch.testing.assert_close(out[name], torch.ones(()), rtol=0, atol=atol)
        steps += int(batch.get(("collector", "mask"), torch.ones(batch.shape)).sum())
    assert steps == data.numel()


def test_log_probs_from_zero_states_are_wrong() -> None:
    """The checks above fail for an update from zero states."""
    agent = make_agent()
    data = collect(agent)
    data["actor_h"].zero_()
    with set_recurrent_mode(False):
        log_prob = agent.actor.get_dist(data.reshape(-1)).log_prob(data["action"].reshape(-1))
    assert (log_prob - data["action_log_prob"].reshape(-1)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [ClipPPOLoss, ReinforceLoss], ids=lambda k: k.__name__)
def test_policy_gradient_padding_changes_no_loss_and_no_gradient(kind: Any) -> None:
    agent = make_agent()
    data = collect(agent, steps=20)
    recurrent_loss(GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=agent.critic))(data)
    loss = recurrent_loss(kind(agent.actor, agent.critic))
    [whole] = SequenceMinibatches()(data)
    [padded] = SequenceMinibatches(by_episode=True)(data)
    mask = padded["collector", "mask"]
    assert ("collector", "mask") not in whole and not mask.all()
    padded["action_log_prob"][~mask] = 5.0
    assert_same_loss(loss, whole, padded)


def assert_same_loss(loss: Any, one: TensorDictBase, other: TensorDictBase) -> None:
    results = []
    for batch in (one, other):
        out = loss(batch)
        terms = {k: v for k, v in out.items() if k.startswith("loss_")}
        gradient = torch.autograd.grad(sum(terms.values()), list(loss.parameters()))  # pyright: ignore[reportArgumentType, reportCallIssue]
        results.append((terms, gradient))
    (terms, gradient), (others, other_gradient) = results
    assert len(terms) >= 2
    for key, value in terms.items():
        torch.testing.assert_close(others[key], value, rtol=1e-5, atol=1e-6)
    for mine, true in zip(other_gradient, gradient, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reader", ["GAE", "ClipPPOLoss"])
def test_critic_without_collected_states_raises(reader: str) -> None:
    agent = make_agent()
    data = collect(agent)
    bare = data.exclude("value_h", ("next", "value_h"))
    assert not data["is_init"][:, 0].all()
    gae: Any = GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=agent.critic)
    loss = ClipPPOLoss(agent.actor, agent.critic)
    loss.make_value_estimator(ValueEstimators.GAE, gamma=GAMMA, lmbda=LAMBDA)
    wired: Any = recurrent_loss(gae if reader == "GAE" else loss)
    with pytest.raises(KeyError, match=f"{reader} would run GRUModule from zeros.*value_h"):
        wired(bare)
    # Rows that start with their episode need none at the root, but after their first step.
    bare["is_init"][:, 0] = True
    with pytest.raises(
        KeyError,
        match=r"from zeros.*shifted=True.*\[next-state-missing\]",
    ):
        wired(bare)


def test_shifted_gae_needs_no_states_of_the_critic() -> None:
    """Values and targets of an episode equal those of one pass over all its observations."""
    critic, steps = make_agent().critic, 6
    layer: Any = critic[0]
    x = torch.randn(steps + 1, layer.layers.input_size)
    is_init = torch.zeros(steps + 1, 1, dtype=torch.bool)
    is_init[0] = True
    whole = TensorDict({layer.in_keys[0]: x, layer.init_key: is_init}, [steps + 1])
    batch: Any = whole[:-1].clone()
    ahead: Any = whole[1:].clone()
    batch["next"] = ahead.set("reward", torch.zeros(steps, 1))
    for key in ("done", "terminated", "truncated"):
        batch["next", key] = is_init[1:].clone()
    batch["next", "done"][-1] = batch["next", "truncated"][-1] = True
    gae: Any = GAE(gamma=1.0, lmbda=0.0, value_network=critic, shifted=True)
    recurrent_loss(gae)(batch)
    with torch.no_grad(), set_recurrent_mode(True):
        values = critic(whole)["state_value"]
    torch.testing.assert_close(batch["state_value"], values[:-1])
    torch.testing.assert_close(batch["value_target"], values[1:])


# The trainer warns that it is experimental, and about its own hooks.
@pytest.mark.filterwarnings("ignore:PPOTrainer is an experimental:UserWarning")
@pytest.mark.filterwarnings("ignore:The '\\w+' hook stage will be replaced:FutureWarning")
@pytest.mark.skipif(not hasattr(PPOTrainer, "from_env"), reason="needs TorchRL 0.15")
def test_ppo_trainer_trains_a_wired_loss() -> None:
    agent = make_agent("discrete", "gru", shared=True)
    env = ShortEpisodes("discrete", (2,))
    trainer = getattr(PPOTrainer, "from_env")(  # noqa: B009
        env,
        actor=agent.actor,
        critic=agent.critic,
        total_frames=64,
        frames_per_batch=32,
        minibatch_size=16,
        sub_traj_len=8,
        progress_bar=False,
    )
    recurrent_loss(trainer.loss_module)
    before = [p.detach().clone() for p in agent.both.parameters()]
    trainer.train()
    for parameter, old in zip(agent.both.parameters(), before, strict=True):
        assert parameter.isfinite().all() and not torch.equal(parameter, old)


def test_wired_critic_loss_alone_equals_that_of_the_whole_loss() -> None:
    agent = make_agent()
    data = collect(agent)
    recurrent_loss(GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=agent.critic))(data)
    loss: Any = recurrent_loss(A2CLoss(agent.actor, agent.critic))
    value, clip_fraction = loss.loss_critic(data.clone())
    assert clip_fraction is None
    torch.testing.assert_close(value.mean(), loss(data.clone())["loss_critic"])
