"""Every number that a wired loss reports is that of the same steps without padding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.modules import PopArtValueNorm, RunningValueNorm
from torchrl.objectives import A2CLoss, ClipPPOLoss, KLPENPPOLoss, PPOLoss, REDQLoss, ReinforceLoss
from torchrl.objectives.multiagent import IPPOLoss, MAPPOLoss
from torchrl.objectives.value import GAE, MultiAgentGAE

import rnnkeys
from rnnkeys import set_recurrent_mode
from rnnkeys.objectives import recurrent_loss
from rnnkeys.sequences import cut_windows, find_segment_starts, find_spans, flag_padding
from tests.support import target_cases as cases
from tests.support.policy_gradients import collect, make_agent, move
from tests.support.target_cases import CASES

MASK = ("collector", "mask")
BY_STEP = ("explained_variance", "ESS")
BY_NAME = {case.name: case for case in CASES}


def padded(flat: TensorDictBase) -> Any:
    """Return the segments of a flat batch as padded rows, with other numbers at padding."""
    starts = find_segment_starts(flat, "is_init").flatten(1).any(-1)
    row: Any = flat.unsqueeze(0)
    spans = find_spans(starts.unsqueeze(0))
    windows, mask = cut_windows(row, spans)
    windows.set(MASK, mask)
    flag_padding(windows, "is_init", spans.length)
    for key, value in windows.items(True, True):
        if value.is_floating_point() and key != MASK:
            value[~mask] += 3 * torch.randn_like(value[~mask])
    assert not mask.all()
    return windows


@pytest.fixture(autouse=True)
def no_noise() -> Iterator[None]:
    """Draw the mean of every normal distribution, which does not depend on the shape."""

    def zeros(shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    with (
        mock.patch("torch.distributions.normal._standard_normal", zeros),
        mock.patch("torch.normal", lambda loc, scale: loc.clone()),
    ):
        yield


def reported(loss: Any, batch: TensorDictBase) -> dict[str, Tensor]:
    """Return the numbers that a loss reports and the gradients that it leaves."""
    loss.zero_grad()
    torch.manual_seed(0)  # REDQ draws its critics
    out = loss(batch.clone())
    total: Any = sum(value for key, value in out.items() if key.startswith("loss"))
    total.backward()
    # Of rows, TorchRL reports the explained variance and ESS of every time step.
    numbers = {k: v.detach() for k, v in out.items() if v.numel() == 1 and k not in BY_STEP}
    grads = {k: p.grad.clone() for k, p in loss.named_parameters() if p.grad is not None}
    assert grads
    return numbers | grads


def assert_near(actual: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=1e-4, atol=1e-6, msg=lambda text: f"{name}: {text}"
    )


def check_same(loss: Any, flat: TensorDictBase) -> set[str]:
    """Check that padding changes nothing that a loss reports or keeps; return what it reports."""
    rows = padded(flat)
    other = copy.deepcopy(loss)
    expected, actual = reported(loss, flat), reported(other, rows)
    assert not other._wiring.seen  # held for one call only
    for key, value in expected.items():
        assert_near(actual[key].reshape(value.shape), value, key)
    for key, value in loss.named_buffers():
        assert_near(dict(other.named_buffers())[key], value, key)
    return set(expected)


@pytest.mark.parametrize(
    "name",
    [
        "DQN double delayed TD0",
        "DQN delayed TDLambda",
        "C51",
        "DDPG",
        "TD3",
        "SAC",
        "discrete SAC",
        "CrossQ",
        "IQL",
        "REDQ",
    ],
)
def test_off_policy_loss_of_a_padded_batch_reports_the_numbers_of_its_valid_steps(
    name: str,
) -> None:
    if name == "REDQ":
        actor, critic = cases._random_actor(rnnkeys, "gru"), cases._critic(rnnkeys, "gru", "critic")
        options: Any = {"num_qvalue_nets": 2, "sub_sample_len": 2, "target_entropy": -1.0}
        loss: Any = REDQLoss(actor, critic, **options)
        setup = cases._finish(loss, cases.Seq(actor, critic))
        case = BY_NAME["SAC"]
    else:
        case = BY_NAME[name]
        setup = case.make(rnnkeys, "gru")
    loss = recurrent_loss(setup.loss)
    if name == "TD3":
        loss.policy_noise = 0.0
    flat = cases.flat(case, setup.policy)
    seen = check_same(loss, flat)
    if name in ("SAC", "discrete SAC", "CrossQ", "IQL", "REDQ"):
        assert "entropy" in seen


def collected(kind: str = "discrete") -> tuple[Any, TensorDictBase]:
    """Return an agent and its flat rollout with advantages, after its weights have moved."""
    agent = make_agent(kind)
    data: Any = collect(agent, steps=20)
    recurrent_loss(GAE(gamma=0.9, lmbda=0.8, value_network=agent.critic))(data)
    data["is_init"][:, 0] = True
    with set_recurrent_mode(True), torch.no_grad():
        key = "logits" if kind == "discrete" else "loc"
        data[key] = agent.actor(data.clone())[key]
    move(agent)
    return agent, data.reshape(-1)


PPO_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalized": {"normalize_advantage": True},
    "clipped values": {"clip_value": 0.05},
    "apart": {"clip_value": 0.05, "separate_losses": True},
}
FIGURES = {"kl_approx", "entropy"}


@pytest.mark.parametrize("options", PPO_OPTIONS.values(), ids=PPO_OPTIONS)
@pytest.mark.parametrize("kind", [PPOLoss, ClipPPOLoss, KLPENPPOLoss], ids=lambda k: k.__name__)
def test_ppo_of_a_padded_batch_reports_the_numbers_of_its_valid_steps(
    kind: Any, options: dict[str, Any]
) -> None:
    agent, flat = collected()
    options = {**options, "log_explained_variance": True}
    more: dict[str, Any] = {"dtarg": 0.05} if kind is KLPENPPOLoss else {}
    loss = recurrent_loss(kind(agent.actor, agent.critic, **options, **more))
    seen = check_same(loss, flat)
    assert seen >= FIGURES
    if kind is ClipPPOLoss:
        assert seen >= {"clip_fraction", "max_ratio", "mean_ratio"}
    if "clip_value" in options:
        assert "value_clip_fraction" in seen


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("apart", [True, False])
def test_a2c_of_a_padded_batch_reports_the_numbers_of_its_valid_steps(
    clip: Any, apart: bool
) -> None:
    agent, flat = collected()
    loss = A2CLoss(agent.actor, agent.critic, clip_value=clip, separate_losses=apart)
    assert "entropy" in check_same(recurrent_loss(loss), flat)


def test_reinforce_of_a_padded_batch_reports_the_numbers_of_its_valid_steps() -> None:
    agent, flat = collected()
    check_same(recurrent_loss(ReinforceLoss(agent.actor, agent.critic)), flat)


@pytest.mark.parametrize("norm", [None, RunningValueNorm, PopArtValueNorm])
@pytest.mark.parametrize("kind", [MAPPOLoss, IPPOLoss])
def test_mappo_of_a_padded_batch_reports_the_numbers_of_its_valid_steps(
    kind: Any, norm: Any
) -> None:
    agent, flat = collected()
    options: dict[str, Any] = {"normalize_advantage_exclude_dims": (), "clip_value": 0.05}
    if norm is not None:
        options["value_norm"] = norm(shape=1)
    check_same(recurrent_loss(kind(agent.actor, agent.critic, **options)), flat)


@pytest.mark.parametrize(("margin", "expected"), [(0.99, 2.0), (1.01, 1.0)])
def test_klpen_of_a_padded_batch_adapts_beta_by_its_valid_steps(
    margin: float, expected: float
) -> None:
    """The mean KL of valid steps is just above or below the one that raises beta."""
    agent, flat = collected()

    def run(batch: TensorDictBase, dtarg: float) -> tuple[float, float]:
        loss: Any = KLPENPPOLoss(agent.actor, agent.critic, dtarg=dtarg)
        return recurrent_loss(loss)(batch)["kl"].mean().item(), loss.beta.item()

    dtarg = margin * run(flat, 1.0)[0] / 1.5
    assert [run(batch, dtarg)[1] for batch in (flat, padded(flat))] == [expected] * 2


@pytest.mark.parametrize("kind", [GAE, MultiAgentGAE])
def test_gae_of_a_padded_batch_normalizes_over_its_valid_steps(kind: Any) -> None:
    agent, flat = collected()
    flat = flat.exclude("advantage", "value_target", "state_value", ("next", "state_value"))
    options: dict[str, Any] = {"deactivate_vmap": True} if kind is GAE else {"agent_dim": -1}
    gae: Any = kind(gamma=0.9, lmbda=0.8, value_network=agent.critic, average_gae=True, **options)
    gae = recurrent_loss(gae)
    rows = padded(flat)
    expected = gae(flat)["advantage"]
    actual = gae(rows)["advantage"]
    torch.testing.assert_close(actual[rows[MASK]], expected, rtol=1e-4, atol=1e-5)


def test_loss_mask_of_single_agents_normalizes_over_agents_that_count() -> None:
    """Dead agents are left out by a mask of their own."""
    agent, flat = collected()
    loss: Any = recurrent_loss(ClipPPOLoss(agent.actor, agent.critic, normalize_advantage=True))
    alive = torch.rand(len(flat)) < 0.6
    first = flat["is_init"].flatten()
    loss.loss_mask_key = "alive"
    flat.set("alive", alive)
    advantage = flat["advantage"].clone()
    wanted = (advantage - advantage[alive].mean()) / advantage[alive].std()
    given = loss(flat.clone())["loss_objective"]
    loss.normalize_advantage = False
    torch.testing.assert_close(given, loss(flat.set("advantage", wanted))["loss_objective"])
    assert first.any()
