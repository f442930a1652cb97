"""Noise that lasts: how it moves in time, and what a policy gradient may rely on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal, ProbabilisticActor, TanhNormal

from rnnkeys.exploration import CorrelatedNoise, StateDependentNoise, StateDependentScale


def make_actor(kind: type, scale: nn.Module | None = None, features: int = 3) -> Any:
    out: Any = ["loc", "scale"]
    modules: list[Any]
    if scale is None:
        layers = nn.Sequential(nn.Linear(features, 2), AddStateIndependentNormalScale(2))
        modules = [TensorDictModule(layers, ["features"], out)]
    else:
        modules = [
            TensorDictModule(nn.Linear(features, 2), ["features"], ["mean"]),
            TensorDictModule(scale, ["mean", "features"], out),
        ]
    options = {"low": -2.0, "high": 2.0, "tanh_loc": False} if kind is TanhNormal else {}
    return ProbabilisticActor(
        TensorDictSequential(*modules),
        in_keys=["loc", "scale"],
        distribution_class=kind,
        distribution_kwargs=options,
        return_log_prob=True,
    )


def run(actor: Any, noise: Any, steps: int, starts: dict[int, list[bool]]) -> TensorDictBase:
    """Return ``[steps, 2]`` steps of two environments; each starts an episode at step 0."""
    rows = []
    for t in range(steps):
        is_init = torch.tensor(starts.get(t, [t == 0, t == 0])).unsqueeze(-1)
        step = TensorDict(features=torch.ones(2, 3), is_init=is_init, batch_size=[2])
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            rows.append(noise(actor(step)))
    return torch.stack(rows)  # pyright: ignore[reportArgumentType, reportReturnType]


@pytest.mark.parametrize("kind", [TanhNormal, IndependentNormal])
def test_correlated_noise_log_prob_is_the_actors(kind: type) -> None:
    actor = make_actor(kind)
    steps = run(actor, CorrelatedNoise(actor, 0.9), 20, {})
    want = actor.build_dist_from_params(steps).log_prob(steps["action"])
    torch.testing.assert_close(steps["action_log_prob"], want)
    if kind is TanhNormal:
        assert steps["action"].abs().max() <= 2


def test_correlated_noise_has_unit_variance_and_given_correlation() -> None:
    actor = make_actor(IndependentNormal)
    steps = run(actor, CorrelatedNoise(actor, 0.8), 1500, {})
    noise = ((steps["action"] - steps["loc"]) / steps["scale"]).flatten(1)
    assert noise.std() == pytest.approx(1, abs=0.1)
    correlation = (noise[1:] * noise[:-1]).mean() / noise.var()
    assert correlation == pytest.approx(0.8, abs=0.06)


def test_correlated_noise_is_independent_across_an_episode_start() -> None:
    actor = make_actor(IndependentNormal)
    starts = {t: [True, False] for t in range(800)}
    steps = run(actor, CorrelatedNoise(actor, 1.0), 800, {**starts, 0: [True, True]})
    noise = (steps["action"] - steps["loc"]) / steps["scale"]
    pairs = (noise[1:, 0] * noise[:-1, 0]).mean()
    assert pairs.abs() < 0.12
    torch.testing.assert_close(noise[1:, 1], noise[:1, 1].expand(799, 2))


def test_correlated_noise_without_exploration_keeps_the_action() -> None:
    actor = make_actor(TanhNormal)
    noise = CorrelatedNoise(actor, 0.9)
    step = TensorDict(features=torch.ones(2, 3), is_init=torch.ones(2, 1).bool(), batch_size=[2])
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        step = actor(step)
        action = step["action"].clone()
        assert torch.equal(noise(step)["action"], action)


@pytest.mark.parametrize("correlation", [-0.1, 1.1])
def test_correlated_noise_out_of_range_raises(correlation: float) -> None:
    with pytest.raises(ValueError, match=f"correlation={correlation}"):
        CorrelatedNoise(make_actor(TanhNormal), correlation)


def test_lasting_noise_registers_no_weights() -> None:
    scale = StateDependentScale(3, 2)
    actor = make_actor(TanhNormal, scale)
    assert not list(StateDependentNoise(actor, scale).parameters())
    assert not list(CorrelatedNoise(actor, 0.5).parameters())


@pytest.mark.parametrize(("every", "changes"), [(None, []), (4, [4, 8])])
def test_state_dependent_noise_is_drawn_per_episode_and_period(
    every: int | None, changes: list[int]
) -> None:
    scale = StateDependentScale(3, 2)
    actor = make_actor(IndependentNormal, scale)
    steps = run(actor, StateDependentNoise(actor, scale, every), 10, {6: [True, False]})
    deviation = steps["action"] - steps["loc"]
    same = torch.isclose(deviation[1:], deviation[:-1]).all(-1)
    for environment, own in ((0, [6]), (1, [])):
        found = (~same[:, environment]).nonzero().flatten() + 1
        assert found.tolist() == sorted([*changes, *own])


def test_state_dependent_noise_marginal_deviation_is_the_scale() -> None:
    scale = StateDependentScale(3, 2, log_std_init=-0.5)
    actor = make_actor(IndependentNormal, scale)
    starts = {t: [True, True] for t in range(800)}
    steps = run(actor, StateDependentNoise(actor, scale), 800, starts)
    deviation = ((steps["action"] - steps["loc"]) / steps["scale"]).std()
    assert deviation == pytest.approx(1, abs=0.08)
    want = 3**0.5 * torch.tensor(-0.5).exp()
    torch.testing.assert_close(steps["scale"], want.expand(800, 2, 2))


def test_state_dependent_scale_does_not_train_the_features() -> None:
    features = torch.ones(4, 3, requires_grad=True)
    scale = StateDependentScale(3, 2)
    _, std = scale(torch.zeros(4, 2), features)
    std.sum().backward()
    assert features.grad is None and scale.log_sigma.grad is not None
