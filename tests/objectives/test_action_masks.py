"""Action masks: no target takes an action that is not allowed, and wrong masks raise by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import (
    MaskedCategorical,
    MaskedOneHotCategorical,
    ProbabilisticActor,
    QValueModule,
)
from torchrl.objectives import ClipPPOLoss, DiscreteSACLoss, DQNLoss, PPOLoss, SoftUpdate

from rnnkeys import GRUModule, get_env_transforms_from_module
from rnnkeys.environments import make_gym_env
from rnnkeys.objectives import R2D2Loss, SequenceMinibatches, recurrent_loss
from tests.support.odd_environments import masked_id
from tests.support.r2d2 import (
    ARGUMENTS,
    MASK,
    A,
    B,
    H,
    I,
    T,
    add_action_masks,
    as_numpy,
    expect,
    make_loss,
    make_network,
    make_windows,
)
from tests.support.recurrent import F64, chain
from tests.support.tolerances import assert_equal

KEYS: Any = {"logits": "logits", "mask": "action_mask"}
CASES: dict[str, dict[str, Any]] = {
    "as in the paper": {},
    "no double Q": {"double_dqn": False},
    "starts in the burn-in": {"learn_starts": True},
    "one step": {"n_steps": 1, "burn_in": 0, "eps": None},
    "greedy returns": {"n_steps": 5, "greedy_returns": True},
}


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_r2d2_with_action_masks_equals_numpy(case: str, one_hot: bool) -> None:
    online, target = (make_network(seed, "action_mask") for seed in (0, 1))
    windows = add_action_masks(make_windows(one_hot=one_hot))
    expected, priorities, _ = expect(
        as_numpy(online), as_numpy(target), windows, **{**ARGUMENTS, **CASES[case]}
    )
    free, *_ = expect(
        as_numpy(online),
        as_numpy(target),
        windows.exclude(("next", "action_mask")),
        **{**ARGUMENTS, **CASES[case]},
    )
    assert abs(free - expected) > 1e-5  # the masks matter
    loss = make_loss(online, target, **CASES[case])
    actual = loss(windows)["loss"]
    assert_equal(actual, torch.tensor(expected), F64, "loss")
    assert_equal(windows["td_error"][:, 0], torch.from_numpy(priorities), torch.float32, "priority")
    actual.backward()
    gradients = [p.grad for p in loss.parameters() if p.grad is not None]
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("space", ["one_hot", "categorical"])
def test_dqn_with_action_masks_equals_numpy(space: str, double: bool) -> None:
    # One network, so that states after each step are those of the target network, too.
    network = chain(*make_network(), QValueModule(space, action_mask_key="action_mask"))
    windows = add_action_masks(make_windows(one_hot=space == "one_hot"))
    expected, *_ = expect(
        as_numpy(network),
        as_numpy(network),
        windows,
        burn_in=0,
        n_steps=1,
        gamma=0.875,  # exact in float32, in which TorchRL keeps it
        eps=None,
        double_dqn=double,
        weighted=False,
    )
    loss: Any = DQNLoss(
        network, action_space=space, double_dqn=double, delay_value=True, loss_function="l2"
    )
    loss.make_value_estimator(loss.default_value_estimator, gamma=0.875)
    SoftUpdate(loss, tau=0.5)
    recurrent_loss(loss)
    batch = windows.exclude("priority_weight")
    actual = loss(batch)["loss"]
    assert_equal(actual, torch.tensor(expected), F64, "loss")
    actual.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in loss.parameters())


def _make_actor(distribution: type) -> Any:
    torch.manual_seed(0)
    network = chain(
        GRUModule(I, H, in_key="observation", out_key="embed", dtype=F64),
        TensorDictModule(nn.Linear(H, A, dtype=F64), ["embed"], ["logits"]),
    )
    return ProbabilisticActor(
        network,
        in_keys=KEYS,
        distribution_class=distribution,
        return_log_prob=True,
    )


def _make_rollout(one_hot: bool) -> TensorDict:
    data = add_action_masks(make_windows(one_hot=one_hot))
    torch.manual_seed(7)
    data["action_log_prob"] = -torch.rand(B, T, dtype=F64)
    data["advantage"] = torch.randn(B, T, 1, dtype=F64)
    data["value_target"] = torch.randn(B, T, 1, dtype=F64)
    return data


@pytest.mark.parametrize(
    ("distribution", "one_hot"), [(MaskedCategorical, False), (MaskedOneHotCategorical, True)]
)
def test_ppo_with_action_masks_and_padding_equals_log_softmax_of_allowed(
    distribution: type, one_hot: bool
) -> None:
    actor = _make_actor(distribution)
    critic = TensorDictModule(nn.Linear(I, 1, dtype=F64), ["observation"], ["state_value"])
    loss: Any = PPOLoss(actor, critic, entropy_coeff=0.01)
    data = _make_rollout(one_hot)
    result = recurrent_loss(loss)(data)
    terms = [value for key, value in result.items() if key.startswith("loss_")]
    torch.stack(terms).sum().backward()
    gradients = [p.grad for p in loss.parameters() if p.grad is not None]
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)
    logits = _unroll_logits(actor, data)
    log_prob = logits.masked_fill(~data["action_mask"], -torch.inf).log_softmax(-1)
    index = data["action"].argmax(-1) if one_hot else data["action"]
    taken = log_prob.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    gain = (taken - data["action_log_prob"]).exp() * data["advantage"].squeeze(-1)
    assert_equal(result["loss_objective"], -gain[data[MASK]].mean(), F64, "objective")


def _unroll_logits(actor: Any, data: Any) -> Tensor:
    """Run the network in single steps, from the stored state where a segment starts."""
    network, state, rows = actor[0], data["recurrent_state"][:, 0], []
    for t in range(T):
        step = data[:, t].select("observation", "is_init", "recurrent_state").clone()
        starts = step["is_init"].reshape(-1, 1, 1)
        state = torch.where(starts, step["recurrent_state"], state)
        step["recurrent_state"], step["is_init"] = state, torch.zeros_like(step["is_init"])
        out = network(step)
        state = out["next", "recurrent_state"]
        rows.append(out["logits"])
    return torch.stack(rows, 1).detach()


def test_minibatches_of_masked_actions_in_ppo_are_finite_with_padding() -> None:
    actor = _make_actor(MaskedCategorical)
    data = _make_rollout(one_hot=False).exclude(MASK)
    data["action_mask"] |= nn.functional.one_hot(data["action"], A).bool()
    critic = TensorDictModule(nn.Linear(I, 1, dtype=F64), ["observation"], ["state_value"])
    recurrent_loss(loss := ClipPPOLoss(actor, critic, entropy_coeff=0.01))
    padded = 0
    for batch in SequenceMinibatches(seq_len=4, by_episode=True)(data):
        padded += int((~batch[MASK]).sum())
        assert all(bool(value.isfinite().all()) for value in loss(batch).values())
    assert padded


def test_discrete_sac_gives_actions_that_are_not_allowed_no_weight() -> None:
    torch.manual_seed(0)
    env = make_gym_env(masked_id("entry", "Choice"), 2, discrete_actions=True)
    actor = ProbabilisticActor(
        chain(
            GRUModule(I, H, in_key="observation", out_key="embed"),
            TensorDictModule(nn.Linear(H, 4), ["embed"], ["logits"]),
        ),
        in_keys=KEYS,
        distribution_class=MaskedOneHotCategorical,
    )
    values = nn.Linear(H, 4)
    qvalue = chain(
        GRUModule(I, H, in_keys=["observation", "q_h"], out_keys=["q", ("next", "q_h")]),
        TensorDictModule(values, ["q"], ["action_value"]),
    )
    env.append_transform(get_env_transforms_from_module(chain(actor, qvalue)))
    data = env.rollout(30, chain(actor, qvalue), break_when_any_done=False)
    data["next", "action_mask"][..., 0] = False  # at all steps but those that are terminated
    data["next", "action_mask"][..., 1] = ~data["next", "terminated"].squeeze(-1)
    loss: Any = DiscreteSACLoss(actor, qvalue, action_space="one-hot", num_actions=4)
    loss.make_value_estimator(gamma=0.9)
    SoftUpdate(loss, tau=0.5)
    losses = []
    for bias in (0.0, 1e3):
        for key, value in loss.target_qvalue_network_params.items(True, True):
            if key[-1] == "bias" and "1" in key:
                value.data[..., 0] += bias
        losses.append(recurrent_loss(loss)(data.clone())["loss_qvalue"])
    assert losses[0].isfinite() and torch.equal(*losses)


@pytest.mark.parametrize("learner", ["R2D2Loss", "DQNLoss"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("ints", TypeError, r"'action_mask' must be bool. Got torch.int8.*\[action-mask-dtype\]"),
        ("masked", ValueError, r"not allowed by 'action_mask' at 1 steps, first at \[0, 6\]"),
        ("empty", ValueError, r"allows no action at 1 steps that are not.*\[action-mask-empty\]"),
    ],
)
def test_losses_wrong_action_mask_raises_and_leaves_the_batch(
    learner: str, change: str, error: type[Exception], message: str
) -> None:
    network = make_network(0, "action_mask")
    loss: Any = R2D2Loss(network, burn_in=0)
    if learner == "DQNLoss":
        loss = recurrent_loss(DQNLoss(network, action_space="one_hot", delay_value=True))
    SoftUpdate(loss, tau=0.5)
    windows = add_action_masks(make_windows()).exclude("priority_weight")
    if change == "ints":
        windows["action_mask"] = windows["action_mask"].to(torch.int8)
    if change == "masked":
        windows["action_mask"][0, 6] = ~windows["action"][0, 6].bool()
    if change == "empty":
        windows["next", "action_mask"][0, 6] = False
    before = windows.clone()
    with pytest.raises(error, match=message):
        loss(windows)
    assert set(windows.keys(True, True)) == set(before.keys(True, True))
    assert bool((windows == before).all())
