"""Policy gradients raise, before they learn, for data from which nothing can be learned."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torchrl.objectives import A2CLoss, ClipPPOLoss, ReinforceLoss
from torchrl.objectives.value import GAE, TD0Estimator, TD1Estimator, TDLambdaEstimator

from rnnkeys.objectives import recurrent_loss
from tests.support.policy_gradients import Agent, collect, make_agent

MASK = ("collector", "mask")
LOSSES = {"ClipPPOLoss": ClipPPOLoss, "A2CLoss": A2CLoss, "ReinforceLoss": ReinforceLoss}
ESTIMATORS: dict[str, Any] = {
    "GAE": partial(GAE, lmbda=0.8),
    "TD(lambda)": partial(TDLambdaEstimator, lmbda=0.8),
    "TD(0)": TD0Estimator,
    "TD(1)": TD1Estimator,
}
READERS = [*ESTIMATORS, *LOSSES]


def make_reader(name: str, agent: Agent) -> Any:
    if name in LOSSES:
        return recurrent_loss(LOSSES[name](agent.actor, agent.critic))
    return recurrent_loss(ESTIMATORS[name](gamma=0.9, value_network=agent.critic))


def check_raises(reader: Any, data: TensorDictBase, error: type[Exception], message: str) -> None:
    """Check that a call raises and leaves the data unchanged."""
    before = data.clone()
    with pytest.raises(error, match=message):
        reader(data)
    assert set(data.keys(True, True)) == set(before.keys(True, True))
    for key, value in before.items(True, True):
        torch.testing.assert_close(data.get(key), value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", READERS)
def test_policy_gradient_without_steps_raises(name: str) -> None:
    agent = make_agent()
    reader, data = make_reader(name, agent), advantages_of(agent)
    empties: list[Any] = [data[:, :0], data[:0]]
    for empty in empties:
        check_raises(reader, empty, ValueError, r"at least one step. Got batch size .*\[no-steps\]")
    data[MASK] = torch.zeros(data.shape, dtype=torch.bool)
    check_raises(reader, data, ValueError, r"is False everywhere.*\[mask-empty\]")
    data[MASK] = torch.ones(data.shape)
    check_raises(reader, data, TypeError, r"must be bool. Got torch.float32.*\[mask-dtype\]")


def advantages_of(agent: Agent) -> TensorDictBase:
    data = collect(agent, steps=12)
    return make_reader("GAE", agent)(data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(
    ("name", "key"),
    [
        *((name, ("next", "reward")) for name in READERS),
        *((name, "advantage") for name in LOSSES),
        *((name, "value_target") for name in LOSSES),
    ],
)
def test_policy_gradient_entry_not_finite_at_valid_step_raises(
    name: str, key: Any, bad: float
) -> None:
    agent = make_agent()
    reader, data = make_reader(name, agent), advantages_of(agent)
    data.get(key)[1, 4] = bad
    check_raises(
        reader, data, ValueError, r"is not finite at 1 of 36 valid steps, first at \[1, 4\]"
    )
    flat: Any = data.clone()
    flat["is_init"][:, 0] = True
    flat = flat.reshape(-1)
    check_raises(reader, flat, ValueError, r"is not finite at 1 of 36 valid steps, first at \[16\]")
    data[MASK] = torch.ones(data.shape, dtype=torch.bool)
    data[MASK][1, 4] = False
    reader(data)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_policy_gradient_recomputed_advantages_are_not_checked(name: str) -> None:
    agent = make_agent()
    data = advantages_of(agent)
    data["advantage"].fill_(float("nan"))
    assert make_reader(name, agent)(data)["advantage"].isfinite().all()


@pytest.mark.parametrize("name", READERS)
def test_policy_gradient_shuffled_steps_raise(name: str) -> None:
    """Minibatches of single steps, as a buffer without slices returns them."""
    agent = make_agent()
    reader, data = make_reader(name, agent), advantages_of(agent)
    shuffled: Any = data.reshape(-1)[torch.randperm(data.numel())]
    for batch in (shuffled, shuffled.reshape(6, -1)):
        check_raises(reader, batch, ValueError, "Time is not contiguous in this batch")
