"""Wired losses: what keeps working, what stays unchanged, and what raises."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchrl.modules
from tensordict import TensorDictBase
from torch import nn
from torchrl.envs.transforms import MultiStepTransform
from torchrl.objectives import (
    A2CLoss,
    CQLLoss,
    DiscreteCQLLoss,
    DQNLoss,
    HardUpdate,
    SACLoss,
    SoftUpdate,
    TD3Loss,
    ValueEstimators,
)
from torchrl.objectives.value import GAE, VTrace

import rnnkeys
from rnnkeys.objectives import recurrent_loss
from tests.support import target_cases as cases
from tests.support.target_cases import CASES, Case, Setup

BY_NAME = {case.name: case for case in CASES}
# Of the cases whose networks share keys on purpose: their targets are compared all the same.
pytestmark = pytest.mark.filterwarnings("ignore:.*keep their states under one key")
DQN, DDPG, TD3, SAC = (BY_NAME[n] for n in ("DQN double delayed TD0", "DDPG", "TD3", "SAC"))
THEIRS: Any = torchrl.modules


def wired(case: Case, cell: str = "gru") -> Setup:
    setup = case.make(rnnkeys, cell)
    recurrent_loss(setup.loss)
    return setup


def batch_of(case: Case, setup: Setup) -> TensorDictBase:
    return cases.flat(case, setup.policy)


def losses(loss: Any, batch: TensorDictBase) -> dict[str, torch.Tensor]:
    """Run a loss on a copy, from the same random numbers, and return its scalars."""
    torch.manual_seed(1)
    out = loss(batch.clone())
    return {key: out.get(key).detach() for key in out.keys() if not out.get(key).ndim}


def assert_same_losses(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and any("loss" in key for key in a)
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_wired_loss_keeps_state_dict_and_parameters(case: Case) -> None:
    loss = case.make(rnnkeys, "gru").loss
    base, state = type(loss), {k: v.clone() for k, v in loss.state_dict().items()}
    parameters = list(loss.parameters())
    out = recurrent_loss(loss)
    assert out is loss and isinstance(loss, base)
    assert [id(p) for p in loss.parameters()] == [id(p) for p in parameters]
    after = loss.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    plain = case.make(rnnkeys, "gru").loss
    plain.load_state_dict(after)
    loss.load_state_dict(plain.state_dict())


def test_recurrent_loss_of_wired_loss_returns_it() -> None:
    loss = wired(TD3).loss
    kind, read = type(loss), list(loss.actor_network.in_keys)
    assert recurrent_loss(loss) is loss
    assert type(loss) is kind and list(loss.actor_network.in_keys) == read


# TorchRL's losses that map over several critics (TD3, SAC) cannot be pickled, wired or not.
@pytest.mark.parametrize(
    "how, case",
    [
        *(("deepcopy", case) for case in (DQN, DDPG, TD3, SAC, BY_NAME["GAE"])),
        *(("pickle", case) for case in (DQN, DDPG, BY_NAME["GAE"])),
        ("torch.save", DQN),
    ],
    ids=str,
)
def test_wired_loss_copies_are_wired(case: Case, how: str) -> None:
    setup = wired(case)
    batch = batch_of(case, setup)
    other: Any = COPIES[how](setup.loss)
    assert type(other) is type(setup.loss)
    if isinstance(other, GAE):
        a, b = setup.loss(batch.clone()), other(batch.clone())
        assert torch.equal(a["value_target"], b["value_target"])
    else:
        assert_same_losses(losses(other, batch), losses(setup.loss, batch))


def _through_file(loss: Any) -> Any:
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "torch.save": _through_file,
}


# The compiler warns about tensordict and itself, and under tests that would be an error.
@pytest.mark.filterwarnings("ignore")
def test_wired_loss_compiled_equals_eager() -> None:
    setup = wired(DQN)
    batch = batch_of(DQN, setup)
    eager = losses(setup.loss, batch)
    compiled = torch.compile(setup.loss, backend="eager")
    assert_same_losses(losses(compiled, batch), eager)


@pytest.mark.parametrize("updater", [SoftUpdate, HardUpdate])
def test_wired_loss_accepts_target_updaters(updater: Any) -> None:
    loss = wired(DDPG).loss
    if updater is SoftUpdate:
        step = updater(loss, tau=0.25)
    else:
        step = updater(loss, value_network_update_interval=1)
    before = loss.target_value_network_params.clone()
    online = loss.value_network_params.data.clone()
    step.step()
    tau = 0.25 if updater is SoftUpdate else 1.0
    expected = before.lerp(online, tau)
    after = loss.target_value_network_params
    for key in expected.keys(True, True):
        torch.testing.assert_close(after.get(key).data, expected.get(key).data)


def test_wired_loss_set_keys_works_before_and_after() -> None:
    setup = wired(DQN)
    batch = batch_of(DQN, setup)
    truth = losses(setup.loss, batch)
    setup.loss.set_keys(reward="gain", done="over", terminated="fell")
    renamed = batch.clone()
    for old, new in (("reward", "gain"), ("done", "over"), ("terminated", "fell")):
        renamed.rename_key_(("next", old), ("next", new))
    assert_same_losses(losses(setup.loss, renamed), truth)


def test_wired_loss_accepts_another_estimator() -> None:
    first, second = cases.make_dqn, ValueEstimators.TDLambda
    torch.manual_seed(0)
    early = first(rnnkeys, "gru", True, True, second)
    torch.manual_seed(0)
    late = first(rnnkeys, "gru", True, True, ValueEstimators.TD0)
    recurrent_loss(early.loss)
    recurrent_loss(late.loss).make_value_estimator(second, gamma=0.9)
    late.loss.load_state_dict(early.loss.state_dict())
    batch = batch_of(DQN, early)
    assert_same_losses(losses(late.loss, batch), losses(early.loss, batch))


def test_wired_loss_accepts_separate_entries() -> None:
    setup = wired(DQN)
    batch = batch_of(DQN, setup)
    entries = {
        "_".join(key) if isinstance(key, tuple) else key: batch.get(key)
        for key in setup.loss.in_keys
    }
    assert_same_losses({"loss": setup.loss(**entries)}, losses(setup.loss, batch))


def test_wired_loss_parts_are_wired() -> None:
    """Training loops with separate actor and critic steps call the parts of a loss."""
    setup = wired(DDPG)
    batch = batch_of(DDPG, setup)
    together = losses(setup.loss, batch)["loss_value"]
    alone, _ = setup.loss.loss_value(batch.clone())
    torch.testing.assert_close(alone.detach(), together)
    unwired = DDPG.make(rnnkeys, "gru").loss
    unwired.load_state_dict(setup.loss.state_dict())
    with rnnkeys.set_recurrent_mode(True):
        wrong, _ = unwired.loss_value(batch.clone())
    assert not torch.allclose(wrong, together, rtol=1e-4)


def test_wired_estimator_value_estimate_equals_its_targets() -> None:
    setup = wired(BY_NAME["GAE"])
    batch = batch_of(BY_NAME["GAE"], setup)
    expected = setup.loss(batch.clone())["value_target"]
    torch.testing.assert_close(setup.loss.value_estimate(batch.clone()), expected)


def test_wired_loss_restores_the_recurrent_mode() -> None:
    setup = wired(BY_NAME["GAE"])
    batch = batch_of(BY_NAME["GAE"], setup)
    assert rnnkeys.recurrent_mode() is None
    setup.loss(batch)
    assert rnnkeys.recurrent_mode() is None
    with pytest.raises(KeyError):
        setup.loss(batch.exclude("is_init"))
    assert rnnkeys.recurrent_mode() is None
    setup.loss(batch)


# What losses and estimators themselves write, wired or not.
WRITES = {"td_error", "advantage", "value_target", "state_value", "shifted_valid", "_log_prob"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_wired_loss_leaves_the_batch_unchanged(case: Case) -> None:
    setup = wired(case)
    data = "[B, T]" if CASES.index(case) % 2 else "flat"
    batch = cases.DATA[data](case, setup.policy)
    before = batch.clone()
    setup.loss(batch)
    new = set(batch.keys(True, True)) - set(before.keys(True, True))
    assert {key if isinstance(key, str) else key[-1] for key in new} <= WRITES
    for key in before.keys(True, True):
        name = key if isinstance(key, str) else key[-1]
        assert name in WRITES or torch.equal(batch.get(key), before.get(key)), key


def random_actor_and_critic() -> tuple[Any, Any]:
    return cases._random_actor(rnnkeys, "gru"), cases._critic(rnnkeys, "gru", "critic")


def make_cql() -> Any:
    return CQLLoss(*random_actor_and_critic(), target_entropy=cases._ENTROPY)


def make_discrete_cql() -> Any:
    return DiscreteCQLLoss(cases._q_network(rnnkeys, "gru"), action_space="categorical")


def make_skipping_sac() -> Any:
    options: Any = {"target_entropy": cases._ENTROPY, "skip_done_states": True}
    return SACLoss(*random_actor_and_critic(), **options)


def make_vtrace() -> Any:
    actor, value = cases._random_actor(rnnkeys, "gru"), cases._value(rnnkeys, "gru")
    return VTrace(gamma=0.9, actor_network=actor, value_network=value)


def make_theirs() -> Any:
    return DQNLoss(cases._q_network(THEIRS, "gru"), action_space="categorical")


def make_attached() -> Any:
    network = cases._q_network(rnnkeys, "gru")
    network.module[0].state_grad = True
    return DQNLoss(network, action_space="categorical")


class Bare(cases.TensorDictModule):
    """An actor that is not a sequence of modules."""


def make_bare_td3() -> Any:
    actor = Bare(nn.Linear(3, 2), ["observation"], ["action"])
    bounds: Any = (-1.0, 1.0)
    return TD3Loss(actor, cases._critic(rnnkeys, "gru", "critic"), bounds=bounds)


def make_feed_forward() -> Any:
    head = cases.Mod(nn.Linear(3, 2), ["observation"], ["action_value"])
    values = cases.QValueModule(action_space="categorical")
    return DQNLoss(cases.Seq(head, values), action_space="categorical")


UNSUPPORTED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "CQL": (make_cql, ValueError, "repeats every step num_random times.*Use SACLoss or IQLLoss"),
    "discrete CQL": (make_discrete_cql, ValueError, "never uses its target network.*Use DQNLoss"),
    "SAC that skips": (make_skipping_sac, ValueError, "Leave skip_done_states=False"),
    "V-trace": (make_vtrace, ValueError, "freshly drawn action.*Use GAE"),
    "TorchRL's module in DQN": (
        make_theirs,
        ValueError,
        r"torchrl's GRU.*rnnkeys\.GRU",
    ),
    "states with gradients": (make_attached, ValueError, "reach the target.*state_grad=False"),
    "an actor that cannot keep": (make_bare_td3, ValueError, "critic_h.*TensorDictSequential"),
    "no recurrent layer": (
        make_feed_forward,
        ValueError,
        "no recurrent module inside DQNLoss.*init_key=",
    ),
    "no loss": (lambda: nn.Linear(1, 1), TypeError, "expects a LossModule.*Got Linear"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_recurrent_loss_of_unsupported_loss_raises(name: str) -> None:
    make, error, text = UNSUPPORTED[name]
    loss = make()
    kind = type(loss)
    with pytest.raises(error, match=text):
        recurrent_loss(loss)
    assert type(loss) is kind


def test_wired_loss_with_vtrace_set_later_raises() -> None:
    setup = wired(BY_NAME["GAE"])
    batch = batch_of(BY_NAME["GAE"], setup)
    actor, value = cases._random_actor(rnnkeys, "gru"), setup.networks["value"]
    loss = recurrent_loss(A2CLoss(actor, value))
    loss.make_value_estimator(ValueEstimators.VTrace, gamma=0.9)
    with pytest.raises(ValueError, match="VTrace cannot be right"):
        loss(batch.set("action_log_prob", torch.zeros(len(batch))))


@pytest.mark.parametrize("name", ["QMIX", "TD3+BC"])
def test_wired_loss_that_ignores_the_mask_raises(name: str) -> None:
    case = BY_NAME[name]
    setup = wired(case)
    batch = batch_of(case, setup)
    batch.set(("collector", "mask"), torch.arange(len(batch)) < 10)
    with pytest.raises(ValueError, match="ignores the mask.*pad_output=False"):
        setup.loss(batch)


@pytest.mark.parametrize("named", [False, True])
def test_iql_padding_has_no_effect(named: bool) -> None:
    """The critic's loss gets the mask from an entry that IQL would drop."""
    case = BY_NAME["IQL"]
    setup = wired(case)
    batch: Any = batch_of(case, setup)
    if named:
        setup.loss.loss_mask_key = "learned"
    batch.set("learned" if named else ("collector", "mask"), torch.arange(len(batch)) < 10)
    other = batch.clone()
    other["next", "reward"][10:] += 50
    losses = []
    for data in (batch, other):
        torch.manual_seed(0)
        losses.append(setup.loss(data)["loss_qvalue"])
    assert torch.equal(*losses)


def test_sac_slices_cut_for_its_critics_raise() -> None:
    case = BY_NAME["SAC with value"]
    setup = wired(case)
    nets = setup.networks
    loss = recurrent_loss(SACLoss(nets["actor"], nets["critic"], nets["value"], target_entropy=0.0))
    SoftUpdate(loss, tau=0.1)
    batch: Any = batch_of(case, setup)
    # Without the stored states, which would show that the flags are moved.
    states = [key for one in setup.loss._wiring.layers for key in one.state_keys]
    batch = batch[:12].exclude("collector", "step_count", "index", *states)
    batch = batch.exclude(*(("next", key) for key in states))
    batch["is_init"][:] = (torch.arange(12) % 4 == 0).unsqueeze(-1)
    batch["next", "done"][:] = (torch.arange(12) % 4 == 3).unsqueeze(-1)
    with pytest.raises(ValueError, match=r"critics.*\[12\].*inside a slice.*[Rr]eshape"):
        loss(batch)
    # Nine steps do not fit two critics, although a slice starts at the fourth.
    with pytest.raises(ValueError, match=r"critics.*\[9\].*inside a slice"):
        loss(batch[:9])
    batch["is_init"][6] = True
    loss(batch)


def test_wired_loss_multi_step_transitions_raise() -> None:
    setup = wired(DQN)
    data = cases.collect(DQN, setup.policy, 40)
    several = MultiStepTransform(n_steps=3, gamma=0.9)._inv_call(data)
    assert several is not None and "steps_to_next_obs" in several
    with pytest.raises(ValueError, match=r"MultiStepTransform.*TDLambda.*\[multi-step\]"):
        setup.loss(several)


@pytest.mark.parametrize("options", [{"value_chunk_size": 4}, {"num_chunks": 2}])
def test_wired_estimator_chunks_of_time_raise(options: dict[str, int]) -> None:
    case = BY_NAME["GAE"]
    setup = cases.make_bare_estimator(rnnkeys, "gru", GAE, lmbda=0.8, **options)
    recurrent_loss(setup.loss)
    with pytest.raises(ValueError, match="along time.*value_chunk_size"):
        setup.loss(batch_of(case, setup))


def test_wired_loss_states_in_one_half_only_raise() -> None:
    setup = wired(DDPG)
    batch = batch_of(DDPG, setup).exclude(("next", "critic_h"))
    with pytest.raises(KeyError, match=r"'critic_h' is in the batch and .*'next'.*Store"):
        setup.loss(batch)


def test_wired_estimator_of_steps_without_a_primer_raises() -> None:
    case = BY_NAME["GAE"]
    setup = wired(case)
    batch = batch_of(case, setup)
    key = setup.loss._wiring.state_keys[0][0]
    with pytest.raises(KeyError, match=rf"'{key}'.*Without a primer.*\[primer-missing\]"):
        setup.loss(batch.exclude(key))


def test_wired_dqn_of_steps_without_a_primer_warns() -> None:
    setup = wired(DQN)
    batch = batch_of(DQN, setup)
    states = [key for key, _ in setup.loss._wiring.state_keys]
    whole = batch.exclude(*states, *(("next", key) for key in states))
    setup.loss(whole)  # it starts from zeros, in both halves
    setup.loss(batch.exclude("collector", *states))  # as after a run in recurrent mode
    with pytest.warns(
        UserWarning, match=r"Without a primer.*drop that of next.*\[primer-missing\]"
    ):
        setup.loss(batch.exclude(*states))


def test_wired_loss_transitions_out_of_order_raise() -> None:
    setup = wired(DQN)
    batch = batch_of(DQN, setup)
    shuffled = batch[torch.randperm(len(batch))]
    with pytest.raises(ValueError, match="Time is not contiguous.*SliceSampler"):
        setup.loss(shuffled)


def test_wired_loss_without_init_key_entry_raises() -> None:
    setup = DQN.make(rnnkeys, "gru")
    loss = recurrent_loss(setup.loss, init_key=("agents", "fresh"))
    with pytest.raises(KeyError, match=r"The init key \('agents', 'fresh'\)"):
        loss(batch_of(DQN, setup))
