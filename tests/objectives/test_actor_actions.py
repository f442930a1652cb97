"""Wired losses reject actions whose shape is not that of the actor's; tensors broadcast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.nn.functional import cross_entropy, one_hot
from torchrl.data import Bounded
from torchrl.modules import OneHotCategorical, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import (
    A2CLoss,
    BCLoss,
    ClipPPOLoss,
    DDPGLoss,
    IQLLoss,
    PPOLoss,
    REDQLoss,
    ReinforceLoss,
    SACLoss,
    TD3BCLoss,
    TD3Loss,
)

from rnnkeys import GRUModule, set_recurrent_mode
from rnnkeys.objectives import recurrent_loss
from tests.support.recurrent import chain
from tests.support.sequence_data import assert_untouched, tensors

B, T, I, H = 5, 5, 2, 4
pytestmark = pytest.mark.filterwarnings("ignore:(No target network|The name target_):UserWarning")


class Product(nn.Module):
    """A critic whose product with the action broadcasts."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.slope = nn.Linear(H, size)

    def forward(self, embed: Tensor, action: Tensor) -> Tensor:
        """Return ``[*, 1]``."""
        return (self.slope(embed) * action).sum(-1, keepdim=True)


def gru(name: str) -> GRUModule:
    return GRUModule(
        I, H, in_keys=["observation", f"{name}_h"], out_keys=[name, ("next", f"{name}_h")]
    )


def make_actor(size: int) -> Any:
    net = nn.Sequential(nn.Linear(H, 2 * size), NormalParamExtractor())
    body = chain(gru("actor"), TensorDictModule(net, ["actor"], ["loc", "scale"]))
    return ProbabilisticActor(body, ["loc", "scale"], distribution_class=TanhNormal)


def make_player(size: int) -> Any:
    """A deterministic actor."""
    return chain(gru("actor"), TensorDictModule(nn.Linear(H, size), ["actor"], ["action"]))


def make_discrete_actor(kind: Any) -> Any:
    body = chain(gru("actor"), TensorDictModule(nn.Linear(H, 3), ["actor"], ["logits"]))
    return ProbabilisticActor(body, ["logits"], distribution_class=kind)


def make_critic() -> Any:
    return chain(gru("value"), ValueOperator(nn.Linear(H, 1), ["value"]))


def make_q(size: int) -> Any:
    keys = {"in_keys": ["q", "action"], "out_keys": ["state_action_value"]}
    return chain(gru("q"), ValueOperator(Product(size), **keys))


BOUNDS: dict[str, Any] = {"bounds": (-1, 1)}
LOSSES: dict[str, Callable[[int], Any]] = {
    "ppo": lambda size: PPOLoss(make_actor(size), make_critic()),
    "a2c": lambda size: A2CLoss(make_actor(size), make_critic()),
    "reinforce": lambda size: ReinforceLoss(make_actor(size), make_critic()),
    "bc": lambda size: BCLoss(make_actor(size)),
    "bc_l2": lambda size: BCLoss(make_player(size), loss_function="l2"),
    "sac": lambda size: SACLoss(make_actor(size), make_q(size), action_spec=Bounded(-1, 1, size)),
    "redq": lambda size: REDQLoss(make_actor(size), make_q(size), action_spec=Bounded(-1, 1, size)),
    "iql": lambda size: IQLLoss(make_actor(size), make_q(size), value_network=make_critic()),
    "td3": lambda size: TD3Loss(make_player(size), make_q(size), **BOUNDS),
    "td3_bc": lambda size: TD3BCLoss(make_player(size), make_q(size), **BOUNDS),
    "ddpg": lambda size: DDPGLoss(make_player(size), make_q(size)),
}


def make_batch(action: Tensor) -> TensorDict:
    batch = TensorDict({"observation": torch.randn(B, T, I), "action": action}, [B, T])
    flags = torch.zeros(B, T, 1, dtype=torch.bool)
    batch["is_init"] = flags.index_fill(1, torch.tensor(0), True)
    batch["action_log_prob"] = torch.randn(B, T)
    batch["advantage"] = torch.randn(B, T, 1)
    batch["value_target"] = torch.randn(B, T, 1)
    batch["next"] = {"observation": torch.randn(B, T, I), "reward": torch.randn(B, T, 1)}
    batch["next", "done"] = batch["next", "terminated"] = flags.clone().fill_(False)
    return batch


@pytest.mark.parametrize("sizes", [(1, ()), (3, (1,)), (1, (3,)), (1, (1, 1))], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_wired_loss_rejects_actions_that_broadcast(name: str, sizes: Any) -> None:
    size, stored = sizes
    loss = recurrent_loss(LOSSES[name](size))
    assert loss(make_batch(torch.rand(B, T, size) - 0.5)) is not None
    batch = make_batch(torch.rand(B, T, *stored) - 0.5)
    before = tensors(batch)
    shape = rf"'action' must .* \[5, 5, {size}\] .* Got \[.*\[action-shape\]"
    with pytest.raises(ValueError, match=shape):
        loss(batch)
    assert_untouched(batch, before)


@pytest.mark.parametrize("kind", [Categorical, OneHotCategorical])
@pytest.mark.parametrize("loss_kind", [ClipPPOLoss, A2CLoss, ReinforceLoss])
def test_wired_loss_rejects_another_form_of_discrete_actions(loss_kind: Any, kind: Any) -> None:
    index = torch.randint(3, (B, T))
    forms = {"index": index, "with 1": index.unsqueeze(-1), "one-hot": one_hot(index, 3)}
    right = "index" if kind is Categorical else "one-hot"
    loss = recurrent_loss(loss_kind(make_discrete_actor(kind), make_critic()))
    loss(make_batch(forms.pop(right)))
    for action in forms.values():
        with pytest.raises(ValueError, match=r"'action' must .*\[action-shape\]"):
            loss(make_batch(action))


@pytest.mark.parametrize("key", ["advantage", "value_target"])
@pytest.mark.parametrize("kind", [Categorical, OneHotCategorical])
@pytest.mark.parametrize("loss_kind", [ClipPPOLoss, A2CLoss, ReinforceLoss])
def test_wired_loss_rejects_advantages_of_one_dimension_too_many(
    loss_kind: Any, kind: Any, key: str
) -> None:
    index = torch.randint(3, (B, T))
    loss = recurrent_loss(loss_kind(make_discrete_actor(kind), make_critic()))
    batch = make_batch(index if kind is Categorical else one_hot(index, 3))
    assert loss(batch.clone()) is not None
    batch[key] = batch[key].unsqueeze(-1)
    with pytest.raises(ValueError, match=rf"'{key}' must .*\[5, 5, 1, 1\].*\[advantage-shape\]"):
        loss(batch)


class UsersNormal(Independent):
    """A distribution of a user, whose shapes are not known to be those of its samples."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(Normal(loc.unsqueeze(-1), scale.unsqueeze(-1)), 2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Take ``[*, n]``."""
        return super().log_prob(value.unsqueeze(-1))


def test_wired_loss_leaves_distributions_of_the_user_alone() -> None:
    actor = make_actor(3)
    actor[-1].distribution_class = UsersNormal
    loss: Any = recurrent_loss(ReinforceLoss(actor, make_critic()))
    assert loss(make_batch(torch.randn(B, T, 3)))["loss_actor"].isfinite()
    assert "get_dist" not in vars(actor[-1])


@pytest.mark.parametrize("function", [None, "cross_entropy"])
@pytest.mark.parametrize("last", [False, True])
def test_wired_cross_entropy_of_rows_is_that_of_steps(function: Any, last: bool) -> None:
    """TorchRL's takes the dimension after the first for that of the classes, here time."""
    player = make_player(T)
    action = torch.randint(T, (B, T))
    batch = make_batch(action.unsqueeze(-1) if last else action)
    batch["collector", "mask"] = torch.arange(T).expand(B, T) < 3
    before = tensors(batch)
    loss: Any = recurrent_loss(BCLoss(player, loss_function=function))(batch)["loss_bc"]
    with set_recurrent_mode(True):
        logits = player(batch.clone())["action"]
    assert_untouched(batch, before)
    torch.testing.assert_close(
        loss, cross_entropy(logits[:, :3].flatten(0, 1), action[:, :3].flatten())
    )
