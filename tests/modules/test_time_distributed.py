"""``TimeDistributed``, and the error of encoders that would need it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ConvNet, QValueModule
from torchrl.objectives import DQNLoss

from rnnkeys import GRUModule, TimeDistributed
from rnnkeys.modules import RecurrentNetwork
from rnnkeys.objectives import recurrent_loss
from tests.support.recurrent import chain


def _conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 6))


def _flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 6))


def _policy(encoder: nn.Module) -> Any:
    return chain(
        TensorDictModule(encoder, ["observation"], ["features"]),
        GRUModule(6, 8, in_key="features", out_key="embed"),
        TensorDictModule(nn.Linear(8, 2), ["embed"], ["action_value"]),
        QValueModule(action_space="categorical"),
    )


def _batch(shape: tuple[int, ...] = (3, 7)) -> TensorDict:
    flags = torch.zeros(*shape, 1, dtype=torch.bool)
    root = {"observation": torch.rand(*shape, 1, 12, 12), "is_init": flags}
    after = {**root, "reward": torch.zeros(*shape, 1), "done": flags, "terminated": flags}
    action = torch.zeros(shape, dtype=torch.long)
    return TensorDict({**root, "action": action, "next": TensorDict(after, shape)}, shape)


@pytest.mark.parametrize("shape", [(), (3,), (3, 7), (0, 7)])
def test_time_distributed_with_any_batch_equals_one_observation_at_a_time(shape):
    encoder = _conv()
    x = torch.rand(*shape, 1, 12, 12)
    out = TimeDistributed(encoder, 3)(x)
    assert out.shape == (*shape, 6)
    expected = [encoder(one.unsqueeze(0)) for one in x.reshape(-1, 1, 12, 12)] if x.numel() else []
    if expected:
        torch.testing.assert_close(out.reshape(-1, 6), torch.cat(expected))


def test_time_distributed_with_too_few_dimensions_is_rejected():
    with pytest.raises(ValueError, match=r"observation_ndim=3.*\(12, 12\)"):
        TimeDistributed(_conv(), 3)(torch.zeros(12, 12))


@pytest.mark.parametrize("encoder", [_conv, _flat])
def test_encoder_without_time_is_rejected_with_the_remedy(encoder):
    policy = _policy(encoder())
    policy(_batch((3,)).set("recurrent_state", torch.zeros(3, 1, 8)))  # a single step runs
    words = r"(?s)Flatten.*one batch dimension.*\[3, 7\].*TimeDistributed.*encoder-time"
    loss: Any = recurrent_loss(DQNLoss(policy, action_space="categorical", delay_value=False))
    with pytest.raises(RuntimeError, match=words):
        loss(_batch())
    with pytest.raises(RuntimeError, match=words):
        RecurrentNetwork(policy).run_sequences(_batch())


@pytest.mark.parametrize("encoder", [_conv, _flat])
def test_encoder_that_is_wrapped_learns(encoder):
    policy = _policy(TimeDistributed(encoder(), 3))
    loss: Any = recurrent_loss(DQNLoss(policy, action_space="categorical", delay_value=False))
    loss(_batch())["loss"].backward()
    parameters = [p for p in loss.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in parameters)


@pytest.mark.parametrize(
    "encoder",
    [
        lambda: TimeDistributed(_conv(), 3),
        lambda: nn.Sequential(
            ConvNet(in_features=1, num_cells=[4], kernel_sizes=3), nn.Linear(400, 6)
        ),
    ],
    ids=["wrapped", "torchrl"],
)
def test_other_errors_keep_their_words(encoder):
    policy = _policy(encoder())
    batch = _batch()
    batch["recurrent_state"] = torch.zeros(3, 7, 1, 9)
    with pytest.raises(RuntimeError, match="state 'recurrent_state'") as caught:
        RecurrentNetwork(policy).run_sequences(batch)
    assert "TimeDistributed" not in str(caught.value)
