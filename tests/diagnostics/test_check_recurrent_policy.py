"""Every planted mistake is found alone, and a right wiring gives an empty report."""

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
from torchrl.objectives import A2CLoss, DiscreteCQLLoss, SACLoss, ValueEstimators
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
    """A wiring; parts that are None are not passed to the check."""

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
def test_check_right_wiring_gives_empty_report(case: cases.Case, data: str) -> None:
    wiring = right(case, "lstm" if data == "flat" else "gru")
    wiring.batch = cases.DATA[data](case, wiring.policy)
    report = wiring.check()
    assert not report and len(report) == 0, str(report)
    assert report.looked_at == ["policy", "env", "batch", "loss"]
    assert report.measured["single_step_difference"] < 1e-5
    assert report.measured["staleness"] < 1e-5
    assert str(report).startswith("Nothing is wrong with the policy, the env, the batch, the loss.")


def test_check_right_estimator_gives_empty_report() -> None:
    wiring = right(GAE_CASE)
    assert not wiring.check()


def test_check_flagged_next_without_wiring_gives_empty_report() -> None:
    setup = DQN.make(rnnkeys, "gru")
    batch = set_next_is_init(cases.flat(DQN, setup.policy))
    assert not Wiring(setup.policy, batch=batch, loss=setup.loss).check()


def test_check_windows_with_r2d2_loss_gives_empty_report() -> None:
    policy = cases._q_network(rnnkeys, "gru")
    windows = Windows(6, "null", state_keys=["actor_h"])(cases.collect(DQN, policy, 80))
    assert not windows["collector", "mask"].all()
    report = Wiring(policy, batch=windows, loss=R2D2Loss(policy, burn_in=2, n_steps=2)).check()
    assert not report, str(report)
    assert "staleness" not in report.measured


def test_check_each_part_alone_gives_empty_report() -> None:
    wiring = right()
    for part in ("env", "batch", "loss"):
        alone = Wiring(wiring.policy, **{part: getattr(wiring, part)})
        assert not alone.check(), part
    assert not check_recurrent_policy(None, batch=wiring.batch)
    assert not Wiring(wiring.policy).check()


def test_check_rollout_with_gradients_gives_empty_report() -> None:
    wiring = right()
    rows = [wiring.env.rollout(6, wiring.policy, break_when_any_done=False) for _ in range(2)]
    rollout: Any = torch.stack(rows)
    assert rollout["actor_embed"].requires_grad
    assert not Wiring(wiring.policy, batch=rollout).check()


@pytest.mark.parametrize("inside", [False, True])
def test_check_batched_environment_gives_empty_report(inside: bool) -> None:
    policy = right().policy

    def wrap(env: Any) -> Any:
        compose: Any = Compose
        return TransformedEnv(env, compose(InitTracker(), get_primers_from_module(policy)))

    def one() -> Any:
        return ShortEpisodes("discrete")

    env = SerialEnv(2, lambda: wrap(one())) if inside else wrap(SerialEnv(2, one))
    assert not Wiring(policy, env).check()
    env.close()


def test_check_torchrl_modules_give_empty_report() -> None:
    setup = cases.make_ddpg(THEIRS, "gru", False)
    recurrent_loss(setup.loss)
    batch = cases.flat(BY_NAME["DDPG"], setup.policy)
    env = make_env(InitTracker(), get_primers_from_module(setup.policy), kind="continuous")
    assert not Wiring(setup.policy, env, batch, setup.loss).check()


def test_check_leaves_policy_environment_and_batch() -> None:
    wiring = right()
    wiring.policy.train()
    before, state = wiring.batch.clone(), torch.get_rng_state()
    check_recurrent_policy(wiring.policy, batch=wiring.batch, loss=wiring.loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in wiring.policy.modules())
    assert set(wiring.batch.keys(True, True)) == set(before.keys(True, True))
    assert all(torch.equal(wiring.batch[k], before[k]) for k in before.keys(True, True))
    assert rnnkeys.recurrent_mode() is None


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


def without_flags(case: cases.Case = DQN) -> Wiring:
    setup = case.make(rnnkeys, "gru")
    return Wiring(setup.policy, batch=cases.flat(case, setup.policy), loss=setup.loss)


def without_flags_loss_alone() -> Wiring:
    return dataclasses.replace(without_flags(), batch=None)


def without_flags_of_torchrls_prioritized_sampler() -> Wiring:
    wiring = without_flags()
    data = cases.collect(DQN, wiring.policy, 80)
    sampler = PrioritizedSliceSampler(80, 0.7, 0.9, slice_len=4)
    wiring.batch = cases.sampled(data, 40, sampler)
    return wiring


def target_without_states() -> Wiring:
    wiring = right(BY_NAME["DDPG"])
    wiring.batch = wiring.batch.exclude(("next", "critic_h"))
    return wiring


def dropped_critic_state() -> Wiring:
    wiring = without_flags(TD3)
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
    return without_flags(GAE_CASE)


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
    "random primer": (random_primer, "episode-state", "in place of the primer"),
    "state not handed on": (lost_state, "state-lost", "last of all transforms"),
    "keys that do not meet": (keys_that_do_not_meet, "keys", "RenameTransform"),
    "policy that fails": (policy_that_fails, "rollout", "env.rollout"),
    "two modules, one key": (two_modules_one_key, "shared-key", "in_keys=.*other_h"),
    "a head writes a state": (head_that_writes_a_state, "shared-key", "another out key"),
    "out key without next": (state_not_carried, "state-not-carried", r"\('next', 'actor_h'\)"),
    "no memory": (no_memory, "no-recurrent-module", "LSTMModule"),
    "frozen in the wrong mode": (frozen, "mode", "default_recurrent_mode=None"),
    "no flags in the batch": (
        batch_with(lambda batch: batch.exclude("is_init")),
        "init-key",
        "InitTracker",
    ),
    "float flags": (
        batch_with(lambda batch: batch.set("is_init", batch["is_init"].float())),
        "init-dtype",
        "bool",
    ),
    "time first": (time_first, "time-not-last", r"batch.transpose\(0, 1\)"),
    "time first, no clock": (time_first_told_by_states_alone, "time-not-last", "transpose"),
    "single transitions": (
        batch_with(lambda batch: batch[torch.randperm(len(batch))]),
        "continuity",
        "SliceSampler",
    ),
    "states not stored": (states_not_stored, "state-missing", "actor_h.*with the primer"),
    "states not stored, loss alone": (
        lambda: dataclasses.replace(states_not_stored(), policy=None),
        "state-missing",
        "actor_h.*with the primer",
    ),
    "half a state": (half_a_state, "state-missing", "Store .'actor_c'"),
    "no flags in next": (without_flags, "next-is-init", "recurrent_loss"),
    "loss alone": (without_flags_loss_alone, "next-is-init", "recurrent_loss"),
    "no slice flagged": (
        without_flags_of_torchrls_prioritized_sampler,
        "next-is-init",
        "recurrent_loss",
    ),
    "target without states": (target_without_states, "next-state-missing", "'next', 'critic_h'"),
    "critic's state dropped": (dropped_critic_state, "critic-state", "recurrent_loss"),
    "multi-step data": (multi_step, "multi-step", "TDLambda"),
    "unsupported loss": (loss_that_cannot_be_right, "unsupported-loss", ""),
    "unsupported estimator": (estimator_that_changed, "unsupported-loss", ""),
    "chunks of time": (chunks_of_time, "chunks-of-time", ""),
    "estimator in single steps": (estimator_in_single_steps, "mode", "recurrent_loss"),
    "steps mixed": (mixed_steps, "single-step", "mixes steps"),
    "cannot be run": (cannot_be_run, "run", "set_recurrent_mode"),
}


@pytest.mark.filterwarnings("ignore:GRUModule finds no state:UserWarning")
@pytest.mark.parametrize("name", FAULTS)
def test_check_finds_one_mistake(name: str) -> None:
    make, check, remedy = FAULTS[name]
    report = make().check()
    assert report.checks() == [check], str(report)
    [problem] = report
    assert re.search(remedy, problem.remedy), problem.remedy
    assert problem.message in str(report) and problem.remedy in str(report)


def test_check_dropped_states_are_found_with_and_without_a_batch() -> None:
    wiring = dropped_critic_state()
    assert "critic-state" in Wiring(None, loss=wiring.loss).check().checks()
    assert "critic-state" in wiring.check().checks()


def test_check_mode_in_force_is_found() -> None:
    wiring = right()
    with set_recurrent_mode(True):
        report = Wiring(wiring.policy, wiring.env).check()
    assert report.checks() == ["mode"]
    assert "in force" in next(iter(report)).message


def test_check_finds_all_mistakes_together() -> None:
    wiring = without_flags(TD3)
    env = make_env(kind="continuous")
    report = check_recurrent_policy(wiring.policy, env, wiring.batch, wiring.loss)
    assert set(report.checks()) == {"init-tracker", "primer", "critic-state", "next-is-init"}
    assert str(report).startswith(f"{len(report)} problems with")


def test_check_states_are_optional_where_sequences_start_with_episodes() -> None:
    policy = right().policy
    data: Any = cases.collect(DQN, policy, 80)
    first = int(data["is_init"].flatten().nonzero()[0])
    batch = data[first:].exclude("actor_h", ("next", "actor_h"))
    assert not Wiring(policy, batch=batch).check()
    # Without a step count, rows of a collector are known to continue, and slices may.
    later = data[first + 1 :].exclude("actor_h", "step_count", "collector")
    assert Wiring(policy, batch=later).check().checks() == ["state-missing"]


def test_staleness_by_step_equals_the_definition() -> None:
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
    expected = (stored - q).norm(dim=-1) / q.amax((1, 2)).abs().unsqueeze(1)
    torch.testing.assert_close(found.difference.reshape(batch.shape), expected)
    starts = batch["is_init"].squeeze(-1)
    assert (found.difference[found.age == 0] < 1e-4).all()
    assert torch.equal(found.age.reshape(starts.shape) == 0, starts)
    assert int(found.is_last.sum()) == int(starts.sum())


def test_staleness_by_step_without_states_raises() -> None:
    wiring = right()
    with pytest.raises(KeyError, match="no state 'actor_h'.*Store it"):
        staleness_by_step(wiring.policy, wiring.batch.exclude("actor_h"))
    silent = Seq(gru().select_out_keys(("next", "actor_h")))
    with pytest.raises(ValueError, match="nothing that can be compared"):
        staleness_by_step(silent, wiring.batch)


def test_check_max_staleness_reports_stale_states() -> None:
    wiring = stale()
    report = wiring.check()
    rounding = report.measured["single_step_difference"]
    assert not report and report.measured["staleness"] > 1000 * rounding
    assert not wiring.check(max_staleness=2 * report.measured["staleness"])
    assert wiring.check(max_staleness=report.measured["staleness"] / 2).checks() == ["staleness"]


def test_check_random_entries_are_not_compared() -> None:
    wiring = right(BY_NAME["SAC"])
    explore = TensorDictModule(torch.nn.Dropout(0.5), ["actor_embed"], ["noise"])
    report = Wiring(Seq(wiring.policy, explore).train(), batch=wiring.batch).check()
    assert not report and report.measured["single_step_difference"] < 1e-5


def make_sac(*, own_keys: bool) -> Wiring:
    """SAC whose actor alone collects; the critics start sequences from zeros."""
    actor = cases._random_actor(rnnkeys, "gru")
    name = "critic" if own_keys else "actor"
    critic = cases._critic(rnnkeys, "gru", name)
    loss = recurrent_loss(SACLoss(actor, critic, target_entropy=cases._ENTROPY, num_qvalue_nets=2))
    case = BY_NAME["SAC"]
    env = make_env(InitTracker(), StepCounter(), get_primers_from_module(actor), kind=case.kind)
    return Wiring(actor, env, cases.flat(case, actor), loss)


@pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
def test_check_critic_with_own_keys_need_not_collect() -> None:
    report = make_sac(own_keys=True).check()
    assert not report, str(report)


@pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
@pytest.mark.filterwarnings("ignore:.*keep their states under one key:UserWarning")
def test_check_critic_with_the_actors_keys_is_found() -> None:
    report = make_sac(own_keys=False).check()
    assert report.checks() == ["shared-key"], str(report)
    [problem] = report
    assert "'actor_h'" in problem.message and "parameters of their own" in problem.message
    assert re.search("state keys of its own: in_keys=", problem.remedy)


@pytest.mark.parametrize("name", ["DQN double delayed TD0", "TD3", "SAC", "DDPG", "QMIX"])
def test_check_right_wiring_after_three_updates_gives_empty_report(name: str) -> None:
    wiring = right(BY_NAME[name])
    optimizer = torch.optim.Adam(wiring.policy.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.square().sum() for p in wiring.policy.parameters()).backward()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    report = wiring.check()
    assert not report, str(report)
    assert report.measured["staleness"] > 1e-4


def test_check_dropout_in_the_policy_is_no_lost_state() -> None:
    head = Mod(nn.Dropout(0.5), ["observation"], ["observation"])
    policy = Seq(head, policy_of(gru())).train()
    env = make_env(InitTracker(), get_primers_from_module(policy))
    report = Wiring(policy, env).check()
    assert not report, str(report)


@pytest.mark.parametrize("key", ["step_count", "index"])
def test_check_entry_of_the_environment_named_like_a_counter_is_no_evidence(key: str) -> None:
    wiring = right()
    for place in (key, ("next", key)):
        wiring.batch[place] = torch.randint(100, (*wiring.batch.shape, 1))
    report = Wiring(wiring.policy, batch=wiring.batch, loss=wiring.loss).check()
    assert not report, str(report)


def test_check_compact_observations_with_zero_next_states_are_found() -> None:
    wiring = right()
    wiring.batch["next", "actor_h"] = torch.zeros_like(wiring.batch["actor_h"])
    report = Wiring(wiring.policy, batch=wiring.batch).check()
    assert report.checks() == ["continuity"]
    assert "NextStateReconstructor" in next(iter(report)).remedy


class _StepsInReset(Transform):
    """Takes a step in every reset, after InitTracker has set its flag, as NoopResetEnv does."""

    def _reset(self, tensordict: Any, tensordict_reset: Any) -> Any:
        flags = tensordict_reset.get("is_init")
        return tensordict_reset.set("is_init", torch.zeros_like(flags))


def test_check_environment_that_steps_in_resets_is_found() -> None:
    policy = right().policy
    late = _StepsInReset(in_keys=[], out_keys=[])
    env = make_env(InitTracker(), get_primers_from_module(policy), late)
    report = Wiring(policy, env).check()
    assert report.checks() == ["init-flags"], str(report)
    assert "NoopResetEnv" in next(iter(report)).message


def test_check_random_warm_up_is_found() -> None:
    wiring = right()
    for key in ("actor_h", ("next", "actor_h")):
        wiring.batch[key] = torch.zeros_like(wiring.batch[key])
    report = Wiring(wiring.policy, batch=wiring.batch).check()
    assert report.checks() == ["zero-state"], str(report)
    assert "init_random_frames" in next(iter(report)).remedy


def test_check_batch_collected_in_recurrent_mode_is_found() -> None:
    policy = right().policy
    wrap: Any = TransformedEnv
    compose: Any = Compose
    transforms = compose(InitTracker(), get_primers_from_module(policy))
    env = wrap(ShortEpisodes("discrete", (3,)), transforms)
    with torch.no_grad(), set_recurrent_mode(True):
        data = env.rollout(20, policy, break_when_any_done=False)
    report = Wiring(policy, batch=data).check()
    assert "collected-in-recurrent-mode" in report.checks(), str(report)
    with torch.no_grad():
        data = env.rollout(20, policy, break_when_any_done=False)
    assert not Wiring(policy, batch=data).check()


def test_check_runs_the_policy_on_the_batch_or_else_on_a_rollout() -> None:
    wiring = right()
    report = Wiring(wiring.policy, wiring.env).check()
    assert report.measured["single_step_difference"] < 1e-5
    bad = wiring.batch.exclude("is_init")
    assert not Wiring(wiring.policy, wiring.env, bad).check().measured


def test_check_environment_of_single_steps_loses_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "LENGTHS", (1,))
    wiring = right()
    assert wiring.env.rollout(8, break_when_any_done=False)["is_init"].all()
    report = Wiring(wiring.policy, wiring.env).check()
    assert not report, str(report)
