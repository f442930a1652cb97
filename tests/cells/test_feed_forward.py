"""The feed-forward layer: a recurrent module without state, the baseline of comparisons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import OneHot
from torchrl.envs import GymEnv, TransformedEnv
from torchrl.objectives import DQNLoss, SoftUpdate

from rnnkeys import (
    RecurrentModule,
    drqn_policy,
    get_env_transforms_from_module,
    get_primers_from_module,
    recurrent_module,
    set_recurrent_mode,
)
from rnnkeys.objectives import recurrent_loss
from tests.support.recurrent import BACKENDS, F64
from tests.support.tolerances import assert_equal


def _make(**arguments: Any) -> RecurrentModule:
    keys: Any = {"in_key": "observation", "out_key": "embed"}
    return recurrent_module("feed_forward", 3, 5, **keys, **arguments)


def _reference(module: RecurrentModule) -> nn.Sequential:
    """Return the same function as torch's own layers, with the same parameters."""
    parameters = dict(module.layers.named_parameters())
    layers: list[nn.Module] = []
    for layer in range(module.layers.num_layers):
        weight, bias = (parameters.get(f"{n}_l{layer}") for n in ("weight_ih", "bias_ih"))
        assert weight is not None
        linear = nn.Linear(*weight.shape[::-1], bias=bias is not None, dtype=weight.dtype)
        linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("sizes", [{}, {"num_layers": 3}, {"bias": False}], ids=str)
@pytest.mark.parametrize("mode", [True, False], ids=["sequences", "one step"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_feed_forward_module_equals_linear_and_tanh_with_gradients(backend, mode, sizes):
    module = _make(recurrent_backend=backend, dtype=F64, **sizes)
    reference = _reference(module)
    x = torch.randn(2, 7, 3, dtype=F64)
    with set_recurrent_mode(mode):
        actual = module(TensorDict(observation=x, batch_size=[2, 7]))["embed"]
    expected = reference(x)
    assert_equal(actual, expected, F64)
    cotangent = torch.randn_like(expected)
    grads = (
        torch.autograd.grad(y, list(m.parameters()), cotangent)
        for y, m in ((actual, module), (expected, reference))
    )
    for a, b in zip(*grads, strict=True):
        assert_equal(a, b, F64)


@pytest.mark.parametrize("shape", [(), (4,), (0, 3), (2, 3, 4)])
def test_feed_forward_module_accepts_any_batch_shape(shape):
    module = _make()
    x = torch.randn(*shape, 3)
    for mode in (True, False):
        with set_recurrent_mode(mode):
            out = module(TensorDict(observation=x, batch_size=shape))["embed"]
        assert out.shape == (*shape, 5)


def test_feed_forward_module_has_no_state_and_reads_no_is_init():
    module = _make()
    assert module.in_keys == ["observation"] and module.out_keys == ["embed"]
    assert module.state_keys == ()
    assert get_primers_from_module(module, warn=False) is None


def test_feed_forward_module_runs_in_torch_compile_and_vmap():
    module = _make()
    data = TensorDict(observation=torch.randn(2, 7, 3), batch_size=[2, 7])
    with set_recurrent_mode(True):
        expected = module(data.clone())["embed"]

        def run(x: Tensor) -> Tensor:
            return module(TensorDict(observation=x, batch_size=[7]))["embed"]

        assert_equal(torch.vmap(run)(data["observation"]), expected, torch.float32)
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        assert_equal(compiled(data.clone())["embed"], expected, torch.float32)


def test_feed_forward_policy_collects_and_trains_in_a_wired_loss():
    """The baseline takes the place of a recurrent layer with no other change."""
    policy = drqn_policy(OneHot(2), (4,), cell="feed_forward", hidden_size=8)
    env = TransformedEnv(GymEnv("CartPole-v1"), get_env_transforms_from_module(policy))
    data = env.rollout(20, policy, break_when_any_done=False)
    loss = recurrent_loss(DQNLoss(policy, action_space="one-hot", delay_value=True))
    SoftUpdate(loss, tau=0.5)
    loss(data)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in policy[1].parameters())
