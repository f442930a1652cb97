"""Encoders of observations and distributions of actions, made from specs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.modules import IndependentNormal, TanhNormal

from rnnkeys.environments import make_gym_env
from rnnkeys.spaces import (
    ActionParameters,
    Choices,
    ImageEncoder,
    Layers,
    RunningNorm,
    action_distribution,
    find_action_keys,
)
from tests.support.odd_environments import ACTIONS, action_id


@pytest.mark.parametrize("name", ACTIONS)
def test_action_distribution_of_any_spec_plays_and_learns(name: str) -> None:
    spec = make_gym_env(action_id(name), 5).action_spec
    kind, options, outputs = action_distribution(spec)
    make: Any = kind
    parameters = torch.randn(5, outputs, requires_grad=True)
    given: Any = (parameters,) if kind is Choices else (parameters, torch.ones(5, outputs))
    distribution: Any = make(*given, **options)
    action = distribution.sample()
    assert spec.is_in(action) or name == "BoxBoundedBelow"  # the environment clips
    log_prob = distribution.log_prob(action)
    assert log_prob.shape == (5,)
    log_prob.sum().backward()
    assert parameters.grad is not None and parameters.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "squash", "kind"),
    [
        ("BoxShifted", True, TanhNormal),
        ("BoxShifted", False, IndependentNormal),
        ("BoxUnbounded", True, IndependentNormal),
        ("BoxBoundedBelow", True, IndependentNormal),
        ("Choice", True, Choices),
    ],
)
def test_action_distribution_squashes_where_all_bounds_are_finite(
    name: str, squash: bool, kind: type
) -> None:
    spec = make_gym_env(action_id(name), 1).action_spec
    assert action_distribution(spec, squash=squash)[0] is kind


def test_action_distribution_of_several_actions_is_that_of_each() -> None:
    spec = make_gym_env("OddActionDict-v0", 4).action_spec
    kind, options, outputs = action_distribution(spec)
    parameters = ActionParameters(spec, log_std_init=0.5)
    assert outputs == 5 and parameters.distribution_keys == ["params"]
    data = TensorDict(batch_size=[4])
    numbers = torch.randn(4, outputs)
    Layers(parameters, ["numbers"], parameters.out_keys)(data.set("numbers", numbers))
    make: Any = kind
    distribution = make(data["params"], **options)
    action = distribution.sample()
    assert spec.is_in(action)
    loc, logits = numbers.split([2, 3], -1)
    low, high = -torch.ones(2), torch.ones(2)
    move = TanhNormal(loc, torch.full_like(loc, 0.5).exp(), low=low, high=high, tanh_loc=False)
    tool = Categorical(logits=logits).log_prob(action["action", "tool"].squeeze(-1))
    log_prob = distribution.log_prob(action)
    torch.testing.assert_close(log_prob["action", "tool_log_prob"], tool)
    wanted = move.log_prob(action["action", "move"])
    torch.testing.assert_close(log_prob["action", "move_log_prob"], wanted)


def test_find_action_keys_are_those_that_an_actor_writes() -> None:
    assert find_action_keys(make_gym_env(action_id("Box"), 1).action_spec) == {
        "action": "action",
        "sample_log_prob": "action_log_prob",
    }
    assert find_action_keys(make_gym_env("OddActionDict-v0", 1).action_spec) == {
        "action": [("action", "move"), ("action", "tool")],
        "sample_log_prob": [("action", "move_log_prob"), ("action", "tool_log_prob")],
    }


def test_choices_equal_independent_categoricals() -> None:
    logits = torch.randn(6, 7)
    choices = Choices(logits, [2, 4, 1])
    action = choices.sample()
    parts = [Categorical(logits=part) for part in logits.split([2, 4, 1], -1)]
    log_probs = [part.log_prob(action[:, i]) for i, part in enumerate(parts)]
    torch.testing.assert_close(choices.log_prob(action), torch.stack(log_probs).sum(0))
    entropies = torch.stack([part.entropy() for part in parts])
    torch.testing.assert_close(choices.entropy(), entropies.sum(0))
    modes = torch.stack([part.logits.argmax(-1) for part in parts], -1)
    assert torch.equal(choices.mode, modes)


def test_choices_with_a_mask_equal_categoricals_of_the_allowed() -> None:
    logits, sizes = torch.randn(50, 6, requires_grad=True), [2, 4]
    allowed = torch.rand(50, 6) < 0.5
    allowed[:, [0, 2]] |= ~torch.stack([p.any(-1) for p in allowed.split(sizes, -1)], -1)
    choices = Choices(logits, sizes, allowed)
    action = torch.stack([choices.sample() for _ in range(20)])
    assert allowed.expand(20, -1, -1).gather(-1, action + torch.tensor([0, 2])).all()
    parts = zip(logits.split(sizes, -1), allowed.split(sizes, -1), strict=True)
    wanted = [Categorical(logits=part.masked_fill(~mask, -1e30)) for part, mask in parts]
    log_probs = torch.stack([one.log_prob(action[0, :, i]) for i, one in enumerate(wanted)])
    torch.testing.assert_close(choices.log_prob(action[0]), log_probs.sum(0))
    entropies = torch.stack([one.entropy() for one in wanted])
    torch.testing.assert_close(choices.entropy(), entropies.sum(0))
    (choices.entropy().sum() + choices.log_prob(action[0]).sum()).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert not logits.grad[~allowed].any()


def test_choices_entry_without_an_allowed_choice_draws_among_its_own() -> None:
    choices = Choices(torch.zeros(400, 5), [2, 3], torch.zeros(400, 5).bool())
    assert choices.sample().amax(0).tolist() == [1, 2]


def test_choices_entropy_has_finite_gradients() -> None:
    logits = torch.randn(6, 5, requires_grad=True)
    Choices(logits, [2, 3]).entropy().sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_running_norm_equals_the_moments_of_all_values() -> None:
    parts = [torch.randn(n, 3) * 4 + 7 for n in (1, 5, 40)]
    norm = RunningNorm((3,))
    for part in parts:
        norm.update(part)
    values = torch.cat(parts)
    torch.testing.assert_close(norm.mean, values.mean(0))
    torch.testing.assert_close(norm.var, values.var(0, correction=0))
    want = (values - values.mean(0)) / values.std(0, correction=0)
    torch.testing.assert_close(norm(values), want)


def test_running_norm_without_values_keeps_its_moments() -> None:
    norm = RunningNorm((3,))
    norm.update(torch.zeros(0, 3))
    norm.update(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    norm.update(torch.zeros(2, 0, 3))
    assert norm.mean.tolist() == [2, 2, 2] and norm.var.tolist() == [1, 0, 1]


def test_running_norm_limits_values() -> None:
    norm = RunningNorm((), limit=2.0)
    norm.update(torch.tensor([-1.0, 1.0]))
    assert norm(torch.tensor([50.0, -50.0])).tolist() == [2, -2]


@pytest.mark.parametrize("shape", [(1, 84, 84), (3, 36, 50)])
def test_image_encoder_any_batch_shape_scales_bytes(shape: tuple[int, ...]) -> None:
    encoder = ImageEncoder(shape)
    image = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    features = encoder(image)
    assert features.shape == (2, 3, encoder.num_features)
    torch.testing.assert_close(features[1, 2], encoder(image[1, 2]))
    torch.testing.assert_close(features, encoder.linear(encoder.convolutions(image / 255)).relu())


def test_image_encoder_ortho_init_makes_rows_orthogonal() -> None:
    encoder = ImageEncoder((1, 84, 84), ortho_init=True)
    layers = [m for m in encoder.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 4
    for layer in layers:
        weight = layer.weight.flatten(1)
        torch.testing.assert_close(
            weight @ weight.mT, 2 * torch.eye(len(weight)), atol=1e-4, rtol=0
        )
        assert layer.bias is not None and not layer.bias.any()


def test_layers_write_what_a_tensordict_module_writes() -> None:
    data = TensorDict(a=torch.randn(2, 3), b=torch.randn(2, 3), batch_size=[2])
    layers = nn.Bilinear(3, 3, 4)
    keys: Any = ["a", "b"], [("next", "c")]
    want = TensorDictModule(layers, *keys)(data.clone())
    assert torch.equal(Layers(layers, *keys)(data)["next", "c"], want["next", "c"])


def test_layers_with_a_missing_output_raises() -> None:
    data = TensorDict(a=torch.randn(2, 3), batch_size=[2])
    with pytest.raises(ValueError, match="shorter"):
        Layers(nn.Linear(3, 4), ["a"], ["loc", "scale"])(data)


@pytest.mark.parametrize("method", ["update", "forward"])
@pytest.mark.parametrize("shape", [(4,), (3, 1), ()])
def test_running_norm_values_of_another_shape_raise(method: str, shape: tuple[int, ...]) -> None:
    norm = RunningNorm((2,))
    with pytest.raises(ValueError, match=r"values must have the shape \[\*, 2\]"):
        getattr(norm, method)(torch.zeros(shape))
