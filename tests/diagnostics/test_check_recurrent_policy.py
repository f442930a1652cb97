"""The doctor: each fault planted alone is found, and a right wiring gives an empty report."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchrl.modules
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import Compose, InitTracker, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.transforms import MultiStepTransform, TensorDictPrimer, Transform
from torchrl.objectives import A2CLoss, DiscreteCQLLoss, ValueEstimators
from torchrl.objectives.value import GAE

import rnnkeys
from rnnkeys import check_recurrent_policy, get_primers_from_module, set_recurrent_mode
from rnnkeys.diagnostics import Report, staleness_by_step
from rnnkeys.objectives import R2D2Loss, recurrent_loss
from rnnkeys.replay import PrioritizedSliceSampler
from rnnkeys.sequences import set_next_is_init
from rnnkeys.transforms import Windows
from tests.support import target_cases as cases
from tests.support.target_cases import Mod, Seq, ShortEpisodes

BY_NAME = {case.name: case for case in cases.CASES}
DQN, TD3, GAE_CASE = BY_NAME["DQN double delayed TD0"], BY_NAME["TD3"], BY_NAME["GAE"]
THEIRS: Any = torchrl.modules


def make_env(*transforms: Any, kind: str = "discrete") -> Any:
    wrap, compose = TransformedEnv, Compose
    chosen: Any = transforms
    return wrap(ShortEpisodes(kind), compose(*chosen))  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass
class Wiring:
    """A wiring; what is None is not shown to the doctor."""

    policy: Any
    env: Any = None
    batch: Any = None
    loss: Any = None

    def check(self, **options: Any) -> Report:
        return check_recurrent_policy(self.policy, self.env, self.batch, self.loss, **options)


def right(case: cases.Case = DQN, cell: str = "gru", **shown: bool) -> Wiring:
    """Return a wiring in which nothing is wrong: what collects is what learns."""
    setup = case.make(rnnkeys, cell)
    loss = recurrent_loss(setup.loss)
    policy = setup.policy
    env = make_env(InitTracker(), StepCounter(), get_primers_from_module(policy), kind=case.kind)
    return Wiring(policy, env, cases.flat(case, policy), loss)


def policy_of(*modules: Any) -> Any:
    head = Mod(nn.Linear(cases.HIDDEN, 3), ["actor_embed"], ["action_value"])
    return Seq(*modules, head, cases.QValueModule(action_space="categorical"))


def gru(**options: Any) -> Any:
    return cases.recurrent(rnnkeys, "gru", **options)


# --- nothing is wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, data",
    [
        *((DQN, data) for data in cases.DATA),
        *((TD3, data) for data in ("flat", "collector")),
        (BY_NAME["SAC"], "[B, T]"),
        (BY_NAME["QMIX"], "flat"),
        (BY_NAME["DDPG shared"], "collector"),
    ],
    ids=str,
)
def test_a_right_wiring_gives_an_empty_report(case: cases.Case, data: str) -> None:
    wiring = right(case, "lstm" if data == "flat" else "gru")
    wiring.batch = cases.DATA[data](case, wiring.policy)
    report = wiring.check()
    assert not report and len(report) == 0, str(report)
    assert report.looked_at == ["policy", "env", "batch", "loss"]
    assert report.measured["single_step_difference"] < 1e-5
    assert report.measured["staleness"] < 1e-5
    assert str(report).startswith("Nothing is wrong with the policy, the env, the batch, the loss.")


def test_a_right_wiring_of_an_estimator() -> None:
    wiring = right(GAE_CASE)
    assert not wiring.check()


def test_marks_alone_are_right_too() -> None:
    setup = DQN.make(rnnkeys, "gru")
    batch = set_next_is_init(cases.flat(DQN, setup.policy))
    assert not Wiring(setup.policy, batch=batch, loss=setup.loss).check()


def test_windows_with_one_state_each_and_a_loss_of_the_package() -> None:
    policy = cases._q_network(rnnkeys, "gru")
    windows = Windows(6, "null", state_keys=["actor_h"])(cases.collect(DQN, policy, 80))
    assert not windows["collector", "mask"].all()
    report = Wiring(policy, batch=windows, loss=R2D2Loss(policy, burn_in=2, n_steps=2)).check()
    assert not report, str(report)
    assert "staleness" not in report.measured


def test_each_part_alone() -> None:
    wiring = right()
    for part in ("env", "batch", "loss"):
        alone = Wiring(wiring.policy, **{part: getattr(wiring, part)})
        assert not alone.check(), part
    assert not check_recurrent_policy(None, batch=wiring.batch)
    assert not Wiring(wiring.policy).check()


@pytest.mark.parametrize("inside", [False, True])
def test_batched_environments_with_the_primer_inside_or_outside(inside: bool) -> None:
    policy = right().policy

    def wrap(env: Any) -> Any:
        compose: Any = Compose
        return TransformedEnv(env, compose(InitTracker(), get_primers_from_module(policy)))

    def one() -> Any:
        return ShortEpisodes("discrete")

    env = SerialEnv(2, lambda: wrap(one())) if inside else wrap(SerialEnv(2, one))
    assert not Wiring(policy, env).check()
    env.close()


def test_torchrls_modules_and_environment_may_be_right() -> None:
    setup = cases.make_ddpg(THEIRS, "gru", False)
    recurrent_loss(setup.loss)
    batch = cases.flat(BY_NAME["DDPG"], setup.policy)
    env = make_env(InitTracker(), get_primers_from_module(setup.policy), kind="continuous")
    assert not Wiring(setup.policy, env, batch, setup.loss).check()


def test_everything_stays_as_it_was() -> None:
    wiring = right()
    wiring.policy.train()
    before, state = wiring.batch.clone(), torch.get_rng_state()
    check_recurrent_policy(wiring.policy, batch=wiring.batch, loss=wiring.loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in wiring.policy.modules())
    assert set(wiring.batch.keys(True, True)) == set(before.keys(True, True))
    assert all(torch.equal(wiring.batch[k], before[k]) for k in before.keys(True, True))
    assert rnnkeys.recurrent_mode() is None


# --- one fault at a time --------------------------------------------------------------------------


def no_tracker() -> Wiring:
    policy = right().policy
    return Wiring(policy, make_env(get_primers_from_module(policy)))


def no_primer() -> Wiring:
    return Wiring(right().policy, make_env(InitTracker()))


def primer_of_another() -> Wiring:
    policy = right().policy
    other = rnnkeys.GRUModule(3, 4, in_keys=["o", "actor_h"], out_keys=["e", ("next", "actor_h")])
    return Wiring(policy, make_env(InitTracker(), get_primers_from_module(other)))


def random_primer() -> Wiring:
    policy = right().policy
    made: Any = policy.module[0].make_tensordict_primer().primers
    primer = TensorDictPrimer(primers=made, random=True)
    return Wiring(policy, make_env(InitTracker(), primer))


class _Forgets(Transform):
    """An environment that hands no state on, like one behind shared memory without its keys."""

    def _step(self, tensordict: Any, next_tensordict: Any) -> Any:
        return next_tensordict.set("actor_h", torch.zeros(1, cases.HIDDEN))


def lost_state() -> Wiring:
    policy = right().policy
    forgets = _Forgets(in_keys=[], out_keys=[])
    return Wiring(policy, make_env(InitTracker(), get_primers_from_module(policy), forgets))


def keys_that_do_not_meet() -> Wiring:
    policy = policy_of(gru(key="pixels"))
    return Wiring(policy, make_env(InitTracker(), get_primers_from_module(policy)))


def policy_that_fails() -> Wiring:
    policy = Seq(gru(), Mod(nn.Linear(cases.HIDDEN + 1, 3), ["actor_embed"], ["values"]))
    return Wiring(policy, make_env(InitTracker(), get_primers_from_module(policy)))


def two_modules_one_key() -> Wiring:
    second = cases.recurrent(rnnkeys, "gru", key="actor_embed", width=cases.HIDDEN)
    return Wiring(policy_of(gru(), second))


def head_that_writes_a_state() -> Wiring:
    head = Mod(nn.Linear(cases.HIDDEN, cases.HIDDEN), ["actor_embed"], [("next", "actor_h")])
    return Wiring(policy_of(gru(), head))


def state_not_carried() -> Wiring:
    keys: Any = {"in_keys": ["observation", "actor_h"], "out_keys": ["actor_embed", "new_h"]}
    return Wiring(policy_of(rnnkeys.GRUModule(3, cases.HIDDEN, **keys)))


def no_memory() -> Wiring:
    return Wiring(policy_of(Mod(nn.Linear(3, cases.HIDDEN), ["observation"], ["actor_embed"])))


def frozen() -> Wiring:
    policy = policy_of(gru(default_recurrent_mode=True))
    return Wiring(policy, make_env(InitTracker(), get_primers_from_module(policy)))


def batch_with(change: Callable[[TensorDictBase], Any]) -> Callable[[], Wiring]:
    def make() -> Wiring:
        wiring = right()
        return Wiring(wiring.policy, batch=change(wiring.batch))

    return make


def time_first() -> Wiring:
    policy = right().policy
    return Wiring(policy, batch=cases.straight(DQN, policy).transpose(0, 1))


def time_first_told_by_states_alone() -> Wiring:
    wiring = time_first()
    wiring.batch = wiring.batch.exclude("step_count", "collector", ("next", "done"))
    return wiring


def states_not_stored() -> Wiring:
    wiring = right()
    return Wiring(wiring.policy, batch=wiring.batch.exclude("actor_h"), loss=wiring.loss)


def half_a_state() -> Wiring:
    wiring = right(cell="lstm")
    return Wiring(wiring.policy, batch=wiring.batch.exclude("actor_c"))


def unmarked(case: cases.Case = DQN) -> Wiring:
    setup = case.make(rnnkeys, "gru")
    return Wiring(setup.policy, batch=cases.flat(case, setup.policy), loss=setup.loss)


def unmarked_loss_alone() -> Wiring:
    return dataclasses.replace(unmarked(), batch=None)


def unmarked_by_torchrls_prioritised_sampler() -> Wiring:
    wiring = unmarked()
    data = cases.collect(DQN, wiring.policy, 80)
    sampler = PrioritizedSliceSampler(80, 0.7, 0.9, slice_len=4)
    wiring.batch = cases.sampled(data, 40, sampler)
    return wiring


def target_without_states() -> Wiring:
    wiring = right(BY_NAME["DDPG"])
    wiring.batch = wiring.batch.exclude(("next", "critic_h"))
    return wiring


def dropped_critic_state() -> Wiring:
    wiring = unmarked(TD3)
    wiring.batch = set_next_is_init(wiring.batch)
    return wiring


def multi_step() -> Wiring:
    wiring = right()
    data = cases.collect(DQN, wiring.policy, 40)
    wiring.batch = MultiStepTransform(n_steps=3, gamma=0.9)._inv_call(data)
    return wiring


def loss_that_cannot_be_right() -> Wiring:
    network = cases._q_network(rnnkeys, "gru")
    return Wiring(network, loss=DiscreteCQLLoss(network, action_space="categorical"))


def estimator_that_changed() -> Wiring:
    setup = cases.make_estimator(rnnkeys, "gru", GAE, lmbda=0.8)
    actor = cases._random_actor(rnnkeys, "gru")
    loss = recurrent_loss(A2CLoss(actor, setup.networks["value"]))
    loss.make_value_estimator(ValueEstimators.VTrace, gamma=0.9)
    return Wiring(actor, loss=loss)


def estimator_in_single_steps() -> Wiring:
    return unmarked(GAE_CASE)


def chunks_of_time() -> Wiring:
    options: dict[str, Any] = {"lmbda": 0.8, "num_chunks": 2}
    setup = cases.make_bare_estimator(rnnkeys, "gru", GAE, **options)
    loss = recurrent_loss(setup.loss)
    return Wiring(setup.policy, batch=cases.flat(GAE_CASE, setup.policy), loss=loss)


def stale() -> Wiring:
    wiring = right()
    with torch.no_grad():
        for parameter in wiring.policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.7)
    return Wiring(wiring.policy, batch=wiring.batch)


class _MixesSteps(nn.Module):
    def forward(self, embed: torch.Tensor) -> torch.Tensor:
        return embed - embed.mean(-2, keepdim=True) if embed.ndim > 1 else embed


def mixed_steps() -> Wiring:
    policy = policy_of(gru(), Mod(_MixesSteps(), ["actor_embed"], ["actor_embed"]))
    return Wiring(policy, batch=right().batch)


def cannot_be_run() -> Wiring:
    wiring = right()
    return Wiring(wiring.policy, batch=wiring.batch.exclude("observation"))


FAULTS: dict[str, tuple[Callable[[], Wiring], str, str]] = {
    "no InitTracker": (no_tracker, "init-tracker", "get_env_transforms_from_module"),
    "no primer": (no_primer, "primer", "get_primers_from_module"),
    "primer of another module": (primer_of_another, "state-shape", "get_primers_from_module"),
    "random primer": (random_primer, "start-state", "in place of the primer"),
    "state not handed on": (lost_state, "state-lost", "last of all transforms"),
    "keys that do not meet": (keys_that_do_not_meet, "keys", "RenameTransform"),
    "policy that fails": (policy_that_fails, "rollout", "env.rollout"),
    "two modules, one key": (two_modules_one_key, "shared-key", "in_keys=.*other_h"),
    "a head writes a state": (head_that_writes_a_state, "shared-key", "another out key"),
    "out key without next": (state_not_carried, "state-not-carried", r"\('next', 'actor_h'\)"),
    "no memory": (no_memory, "no-recurrent-module", "LSTMModule"),
    "frozen in the wrong mode": (frozen, "mode", "default_recurrent_mode=None"),
    "no marks in the batch": (
        batch_with(lambda batch: batch.exclude("is_init")),
        "init-key",
        "InitTracker",
    ),
    "float marks": (
        batch_with(lambda batch: batch.set("is_init", batch["is_init"].float())),
        "init-key",
        "bool",
    ),
    "time first": (time_first, "time-not-last", r"batch.transpose\(0, 1\)"),
    "time first, no clock": (time_first_told_by_states_alone, "time-not-last", "transpose"),
    "single transitions": (
        batch_with(lambda batch: batch[torch.randperm(len(batch))]),
        "single-transitions",
        "SliceSampler",
    ),
    "states not stored": (states_not_stored, "state-not-stored", "actor_h.*with the primer"),
    "half a state": (half_a_state, "state-not-stored", "store .'actor_c'"),
    "next view not marked": (unmarked, "next-view", "recurrent_loss"),
    "loss alone": (unmarked_loss_alone, "next-view", "recurrent_loss"),
    "no slice marked": (unmarked_by_torchrls_prioritised_sampler, "next-view", "recurrent_loss"),
    "target without states": (target_without_states, "next-state-missing", "'next', 'critic_h'"),
    "critic's state dropped": (dropped_critic_state, "critic-state", "recurrent_loss"),
    "multi-step data": (multi_step, "multi-step", "TDLambda"),
    "refused loss": (loss_that_cannot_be_right, "unsupported-loss", ""),
    "refused estimator": (estimator_that_changed, "unsupported-loss", ""),
    "chunks of time": (chunks_of_time, "chunks-of-time", ""),
    "estimator in single steps": (estimator_in_single_steps, "mode", "recurrent_loss"),
    "stale states": (stale, "staleness", "burn sequences in"),
    "steps mixed": (mixed_steps, "single-step", "mixes steps"),
    "cannot be run": (cannot_be_run, "run", "set_recurrent_mode"),
}


@pytest.mark.filterwarnings("ignore:GRUModule finds no state:UserWarning")
@pytest.mark.parametrize("name", FAULTS)
def test_finds(name: str) -> None:
    make, check, remedy = FAULTS[name]
    report = make().check()
    assert report.checks() == [check], str(report)
    [finding] = report
    assert re.search(remedy, finding.remedy), finding.remedy
    assert finding.problem in str(report) and finding.remedy in str(report)


def test_finds_a_mode_that_is_left_on() -> None:
    wiring = right()
    with set_recurrent_mode(True):
        report = Wiring(wiring.policy, wiring.env).check()
    assert report.checks() == ["mode"]
    assert "in force" in next(iter(report)).problem


def test_finds_all_faults_together() -> None:
    wiring = unmarked(TD3)
    env = make_env(kind="continuous")
    report = check_recurrent_policy(wiring.policy, env, wiring.batch, wiring.loss)
    assert set(report.checks()) == {"init-tracker", "primer", "critic-state", "next-view"}
    assert str(report).startswith(f"{len(report)} wrong with")


def test_states_may_be_left_out_where_sequences_start_with_episodes() -> None:
    policy = right().policy
    data: Any = cases.collect(DQN, policy, 80)
    first = int(data["is_init"].flatten().nonzero()[0])
    batch = data[first:].exclude("actor_h", ("next", "actor_h"))
    assert not Wiring(policy, batch=batch).check()
    # Without a step count, rows of a collector are known to go on, and slices may.
    later = data[first + 1 :].exclude("actor_h", "step_count", "collector")
    assert Wiring(policy, batch=later).check().checks() == ["state-not-stored"]


# --- numbers --------------------------------------------------------------------------------------


def test_staleness_is_that_of_the_definition() -> None:
    """One GRU by hand: the stored state against the state that today's weights make."""
    wiring = stale()
    batch: Any = cases.windows(DQN, wiring.policy)
    with torch.no_grad():
        for parameter in wiring.policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.7)
    found = staleness_by_step(wiring.policy, batch)
    assert found.key == "action_value"
    with torch.no_grad():
        with set_recurrent_mode(True):
            q = wiring.policy(batch.exclude("next"))["action_value"]
        view = batch.exclude("next").reshape(-1)
        view["is_init"] = torch.zeros_like(view["is_init"])
        stored = wiring.policy(view)["action_value"].reshape(q.shape)
    expected = (stored - q).norm(dim=-1) / q.abs().max()
    torch.testing.assert_close(found.difference.reshape(batch.shape), expected)
    starts = batch["is_init"].squeeze(-1)
    assert (found.difference[found.age == 0] < 1e-6).all()
    assert torch.equal(found.age.reshape(starts.shape) == 0, starts)
    assert int(found.is_last.sum()) == int(starts.sum())


def test_staleness_needs_states() -> None:
    wiring = right()
    with pytest.raises(KeyError, match="no state 'actor_h'.*Store it"):
        staleness_by_step(wiring.policy, wiring.batch.exclude("actor_h"))
    silent = Seq(gru().select_out_keys(("next", "actor_h")))
    with pytest.raises(ValueError, match="nothing that could be compared"):
        staleness_by_step(silent, wiring.batch)


def test_limits_may_be_set() -> None:
    wiring = stale()
    report = wiring.check(max_staleness=10.0)
    assert not report and report.measured["staleness"] > 0.1
    assert wiring.check(max_staleness=report.measured["staleness"] / 2).checks() == ["staleness"]


def test_random_entries_are_not_compared() -> None:
    wiring = right(BY_NAME["SAC"])
    explore = TensorDictModule(torch.nn.Dropout(0.5), ["actor_embed"], ["noise"])
    report = Wiring(Seq(wiring.policy, explore).train(), batch=wiring.batch).check()
    assert not report and report.measured["single_step_difference"] < 1e-5
