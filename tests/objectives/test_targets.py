"""Bootstrapped next values of every loss against the step-by-step oracle, and no leak anywhere."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import SliceSampler
from torchrl.objectives import (
    A2CLoss,
    ClipPPOLoss,
    DistributionalDQNLoss,
    DQNLoss,
    ReinforceLoss,
    ValueEstimators,
)
from torchrl.objectives.value import GAE, TD1Estimator, TDLambdaEstimator

import rnnkeys
from benchmarks import targets
from rnnkeys import set_recurrent_mode
from rnnkeys.objectives import recurrent_loss
from rnnkeys.replay import PrioritizedSliceSampler
from rnnkeys.sequences import set_next_is_init
from tests.support import target_cases as cases
from tests.support import target_oracle as oracle
from tests.support.target_cases import CASES, DATA, Case, Setup
from tests.support.target_watch import perturbed, run
from tests.support.tolerances import TOLERANCE, assert_equal

BY_NAME = {case.name: case for case in CASES}
# Of the cases whose networks share keys on purpose: their targets are compared all the same.
pytestmark = pytest.mark.filterwarnings("ignore:.*keep their states under one key")


def cell_of(case: Case, data: str) -> str:
    """Give every loss both cells and every kind of data both cells, at half the price."""
    return "lstm" if (CASES.index(case) + list(DATA).index(data)) % 2 else "gru"


_collected: dict[tuple[Any, ...], TensorDictBase] = {}


def data_of(name: str, case: Case, setup: Setup) -> TensorDictBase:
    """Return a copy of data for a case; cases whose policies keep the same entries share it.

    Collecting takes most of a test's time, and no test depends on which weights collected.
    """
    kept = tuple(sorted(map(str, setup.policy.out_keys)))
    key = (name, case.kind, kept, torch.get_default_dtype())
    if key not in _collected:
        _collected[key] = DATA[name](case, setup.policy)
    return _collected[key].clone()


def wired(case: Case, cell: str) -> Setup:
    setup = case.make(rnnkeys, cell)
    recurrent_loss(setup.loss)
    return setup


def expected(case: Case, setup: Setup, batch: TensorDictBase) -> Tensor:
    torch.manual_seed(1)
    return case.expect(setup, batch, oracle.starts_of(batch)).detach()


def check_next_values(case: Case, setup: Setup, batch: TensorDictBase) -> None:
    """Compare every next value that is bootstrapped from, element by element and as a whole."""
    truth = expected(case, setup, batch)
    seen = run(setup.loss, batch)
    assert seen.next_value is not None
    live = ~batch.get(("next", "terminated"))
    truth, value = truth[live], seen.next_value.reshape(truth.shape)[live]
    assert truth.std() > 1e-3, "values hardly differ: nothing is compared"
    wrong = (value - truth).abs() > TOLERANCE[truth.dtype] * truth.abs().max()
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} next values are wrong"
    assert_equal(value, truth, truth.dtype, f"next values of {case}")


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_next_values_equal_single_steps(case: Case, data: str) -> None:
    setup = wired(case, cell_of(case, data))
    check_next_values(case, setup, data_of(data, case, setup))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_next_values_in_float64_equal_single_steps(case: Case, float64: None) -> None:
    setup = wired(case, cell_of(case, "[B, T]"))
    check_next_values(case, setup, data_of("flat", case, setup))


def test_flat_data_contains_every_kind_of_cut() -> None:
    """Slices contain starts, insides and both kinds of ends, and episodes of one step."""
    case = BY_NAME["DQN double delayed TD0"]
    policy = case.make(rnnkeys, "gru").policy
    # Not every draw has all of it; together a few have.
    batch: Any = torch.cat([cases.flat(case, policy) for _ in range(8)])
    starts = oracle.starts_of(batch)
    ends = torch.cat([starts[1:], torch.ones(1, dtype=torch.bool)])
    first = batch.get("step_count").flatten() == 0
    terminated = batch.get(("next", "terminated")).flatten()
    episode_ends = (batch.get("step_count").flatten() + 1).unsqueeze(-1) == torch.tensor(
        cases.LENGTHS
    )
    assert (starts & first).any() and (starts & ~first).any()
    assert (ends & terminated).any() and (ends & ~terminated).any()
    assert (ends & ~terminated & ~episode_ends.any(-1)).any()
    assert (starts & ends & first).any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_targets_do_not_depend_on_other_slices(case: Case) -> None:
    setup = wired(case, cell_of(case, "flat"))
    check_no_leak(setup.loss, data_of("flat", case, setup))


def check_no_leak(loss: Any, batch: TensorDictBase) -> None:
    before = run(loss, batch.clone())
    other, outside = perturbed(batch)
    after = run(loss, other)
    assert before.target is not None and after.target is not None
    shape = (len(batch), -1)
    targets = before.target.reshape(shape), after.target.reshape(shape)
    assert not torch.equal(targets[0][~outside], targets[1][~outside])
    assert torch.equal(targets[0][outside], targets[1][outside])


@pytest.mark.parametrize("name", ["DQN delayed TDLambda", "GAE", "TD1Estimator"])
def test_returns_end_at_slices_without_done(name: str) -> None:
    case = BY_NAME[name]
    setup = wired(case, "gru")
    data = cases.collect(case, setup.policy, 80)
    sampler = SliceSampler(slice_len=4, truncated_key=None)
    batch = cases.sampled(data, 40, sampler)
    assert not batch.get(("next", "done")).flatten()[3::4].all()
    check_no_leak(setup.loss, batch)
    # Where nothing says terminated, done does; a slice's end must not become one.
    batch.del_(("next", "terminated"))
    check_no_leak(setup.loss, batch)


def test_leak_check_without_wiring_fails() -> None:
    """The same check, on the same data, fails without the wiring."""
    case = BY_NAME["DDPG"]
    setup = case.make(rnnkeys, "gru")
    with pytest.raises(AssertionError, match="next values are wrong"):
        check_next_values(case, setup, data_of("flat", case, setup))


@pytest.mark.parametrize("name", ["DQN double delayed TD0", "DDPG"])
def test_prioritized_slices_without_flags_are_flagged(name: str) -> None:
    case = BY_NAME[name]
    setup = wired(case, "lstm")
    data = cases.collect(case, setup.policy, 80)
    sampler = PrioritizedSliceSampler(80, 0.7, 0.9, slice_len=4)
    batch = cases.sampled(data, 40, sampler)
    assert not batch.get("is_init").flatten()[::4].all()
    check_next_values(case, setup, batch)
    assert batch.get("td_error").shape[0] == 40


# From TorchRL 0.15 on a sampler can lay slices out as rows; it pads by the last step of a slice.
PADDED: dict[str, dict[str, Any]] = {"flat": {"pad_output": True}}
if "output_layout" in inspect.signature(SliceSampler).parameters:
    PADDED["rows"] = {"output_layout": "batch_time"}


@pytest.mark.parametrize("layout", PADDED)
@pytest.mark.parametrize("name", ["DQN double delayed TD0", "DDPG", "SAC", "GAE"])
def test_next_values_with_padding_are_unchanged(name: str, layout: str) -> None:
    case = BY_NAME[name]
    setup = wired(case, "gru")
    data = cases.collect(case, setup.policy, 80)
    padded = cases.sampled(data, 40, _slices(**PADDED[layout]))
    mask = padded.get(("collector", "mask"))
    assert mask.any() and not mask.all()
    plain: Any = padded[mask]
    plain = plain.exclude(("collector", "mask"))
    truth = expected(case, setup, plain)
    seen = run(setup.loss, padded)
    assert seen.next_value is not None
    live = ~plain.get(("next", "terminated"))
    if name != "SAC":  # its noise is drawn for every step, padding included
        value = seen.next_value.reshape(*padded.shape, 1)[mask]
        assert_equal(value[live], truth[live], torch.float32)
        if name != "GAE":
            padded_out, plain_out = setup.loss(padded), setup.loss(plain)
            losses = [key for key in plain_out.keys() if key.startswith("loss")]
            assert losses
            for key in losses:
                torch.testing.assert_close(
                    padded_out.get(key), plain_out.get(key), rtol=1e-5, atol=1e-6
                )


def _slices(**options: Any) -> SliceSampler:
    return SliceSampler(slice_len=5, strict_length=False, **options)


@pytest.mark.parametrize("name", ["DQN double delayed TD0", "DDPG", "SAC", "discrete SAC"])
def test_next_values_with_flags_alone_are_right(name: str) -> None:
    """Flags in ``next``, without wiring, suffice for losses that drop no state."""
    case = BY_NAME[name]
    setup = case.make(rnnkeys, "gru")
    batch = set_next_is_init(data_of("flat", case, setup))
    check_next_values(case, setup, batch)


@pytest.mark.parametrize("name", ["TD0Estimator", "TD1Estimator", "TDLambdaEstimator", "GAE"])
def test_estimators_in_recurrent_mode_are_right_without_wiring(name: str) -> None:
    case = BY_NAME[name]
    setup = case.make(rnnkeys, "gru")
    batch = data_of("flat", case, setup).exclude("state_value")
    with set_recurrent_mode(True):
        check_next_values(case, setup, batch)


@pytest.mark.parametrize("kind", [A2CLoss, ClipPPOLoss, ReinforceLoss], ids=lambda k: k.__name__)
def test_losses_that_compute_advantages_have_the_oracles_targets(kind: Any) -> None:
    setup = make_policy_loss(kind)
    case = dataclasses.replace(BY_NAME["GAE"], expect=expect_critic)
    recurrent_loss(setup.loss)
    batch = data_of("flat", case, setup)
    batch.set("action_log_prob", torch.zeros(len(batch)))
    check_next_values(case, setup, batch)
    assert ("advantage" in batch) == (kind is ReinforceLoss)


def make_policy_loss(kind: Any) -> Setup:
    actor, value = cases._random_actor(rnnkeys, "gru"), cases._value(rnnkeys, "lstm")
    policy = cases.Seq(actor, value)
    loss = kind(actor, value)
    loss.make_value_estimator(ValueEstimators.GAE, gamma=0.9, lmbda=0.8)
    return cases._finish(loss, policy, value=value)


def expect_critic(setup: Setup, batch: TensorDictBase, starts: Tensor) -> Tensor:
    view = oracle.next_view(batch)
    params = setup.loss.target_critic_network_params
    return oracle.with_params(setup.networks["value"], params, view, starts).get("state_value")


def test_c51_learns_the_projected_distribution(float64: None) -> None:
    case = BY_NAME["C51"]
    setup = wired(case, "lstm")
    batch = data_of("flat", case, setup)
    starts = oracle.starts_of(batch)
    support = torch.linspace(-2, 2, cases.ATOMS)
    keep = 0.9 * (~batch.get(("next", "terminated"))).double()
    probs = cases.next_distribution(setup, batch, starts)
    target = oracle.project(probs, batch.get(("next", "reward")), keep, support)
    network, params = setup.networks["value"], setup.loss.value_network_params
    log_p = oracle.with_params(network, params, batch, starts).get("action_value")
    action = batch.get("action").reshape(-1, 1, 1).expand(*log_p.shape[:-1], 1)
    cross_entropy = -(target * log_p.gather(-1, action).squeeze(-1)).sum(-1)
    setup.loss(batch)
    # TorchRL projects in float32, whatever the networks compute in.
    assert_equal(batch.get("td_error").flatten(), cross_entropy.detach(), torch.float32)


@pytest.mark.parametrize("name", ["TD3", "TD3+BC"])
def test_actor_loss_keeps_states_of_the_critic(name: str) -> None:
    case = BY_NAME[name]
    setup = wired(case, "lstm")
    batch = data_of("flat", case, setup)
    starts, loss, nets = oracle.starts_of(batch), setup.loss, setup.networks
    view = oracle.with_params(nets["actor"], loss.actor_network_params, batch, starts)
    view.update(batch.select("critic_h", "critic_c"))
    params = loss.qvalue_network_params
    truth = oracle.ensemble(nets["critic"], params, view, starts, "state_action_value")
    value = loss(batch).get("state_action_value_actor")
    assert_equal(value, truth.squeeze(-1) if name == "TD3" else truth[0].squeeze(-1), torch.float32)


def test_sac_value_loss_keeps_all_states() -> None:
    case = BY_NAME["SAC with value"]
    setup = wired(case, "gru")
    batch = data_of("flat", case, setup)
    starts, loss, nets = oracle.starts_of(batch), setup.loss, setup.networks
    torch.manual_seed(1)
    view = oracle.with_params(nets["actor"], loss.target_actor_network_params, batch, starts)
    action, log_prob = cases.compute_rsample_log_prob(nets["actor"].build_dist_from_params(view))
    view.set("action", action)
    params = loss.target_qvalue_network_params
    q = oracle.ensemble(nets["critic"], params, view, starts, "state_action_value")
    target = q.squeeze(-1).min(0).values - loss._alpha * log_prob
    params = loss.value_network_params
    value = oracle.with_params(nets["value"], params, batch, starts).get("state_value").squeeze(-1)
    truth = torch.nn.functional.smooth_l1_loss(value, target)
    torch.manual_seed(1)
    assert_equal(loss.value_loss(batch)[0], truth, torch.float32)


@pytest.mark.parametrize("kind", [GAE, TDLambdaEstimator, TD1Estimator])
def test_targets_with_padding_are_unchanged(kind: Any, float64: None) -> None:
    """The last slice is cut without done, so only the mask shows its end."""
    options = {} if kind is TD1Estimator else {"lmbda": 0.8}
    setup = cases.make_bare_estimator(rnnkeys, "gru", kind, **options)
    recurrent_loss(setup.loss)
    case = BY_NAME["GAE"]
    batch: Any = data_of("flat", case, setup)[:5]
    for key in ("done", "terminated", "truncated"):
        if ("next", key) in batch.keys(True):
            batch["next", key].zero_()
    junk: Any = torch.cat([batch[:1]] * 3).clone()
    junk["next", "reward"] += 100
    junk["is_init"].zero_()
    padded: Any = torch.cat([batch, junk]).unsqueeze(0)
    padded["collector", "mask"] = (torch.arange(8) < 5).unsqueeze(0)
    setup.loss(batch)
    setup.loss(padded)
    assert_equal(padded["value_target"][0, :5], batch["value_target"], torch.float64)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_loss_gradient_is_the_semi_gradient(double: bool, cell: str, float64: None) -> None:
    """No gradient reaches the target, and the one of the values is that of step-by-step code."""
    setup = cases.make_dqn(rnnkeys, cell, double, True, ValueEstimators.TD0)
    loss = recurrent_loss(setup.loss)
    case = BY_NAME["DQN double delayed TD0"]
    batch = data_of("flat", case, setup)
    starts, network = oracle.starts_of(batch), setup.networks["value"]
    keep = 0.9 * (~batch.get(("next", "terminated"))).double()
    bootstrap = cases.expect_dqn(setup, batch, starts).detach()
    target = batch.get(("next", "reward")) + keep * bootstrap
    root = oracle.with_params(network, loss.value_network_params, batch, starts)
    value = root.get("action_value").gather(-1, batch.get("action").unsqueeze(-1))
    parameters = list(loss.parameters())
    assert isinstance(loss, DQNLoss)
    truth = torch.autograd.grad(
        torch.nn.functional.mse_loss(value, target), parameters, allow_unused=True
    )
    result = torch.autograd.grad(loss(batch).get("loss"), parameters, allow_unused=True)
    assert sum(g is not None for g in truth) >= 6
    for mine, true in zip(result, truth, strict=True):
        assert (mine is None) == (true is None)
        if true is not None:
            assert_equal(mine, true, torch.float64, "gradient")


def test_next_values_with_two_batch_dimensions_are_right() -> None:
    case = BY_NAME["DDPG"]
    setup = wired(case, "gru")
    batch = cases.windows(case, setup.policy).reshape(2, -1, 4)
    check_next_values(case, setup, batch)


def test_next_values_with_several_init_keys_are_right() -> None:
    """Actor and critic each have their own is_init flags, under other names than TorchRL's."""
    case = BY_NAME["DDPG"]
    setup = rename_flags(cases.make_ddpg, {"actor": ("flags", "a"), "critic": "first"})
    recurrent_loss(setup.loss)
    batch = data_of("flat", case, setup)
    for key in (("flags", "a"), "first"):
        batch.set(key, batch.get("is_init"))
        batch.set(("next", *([key] if isinstance(key, str) else key)), batch["next", "is_init"])
    truth = expected(case, setup, batch)
    batch = batch.exclude("is_init", ("next", "is_init"))
    seen = run(setup.loss, batch)
    assert seen.next_value is not None
    assert_equal(seen.next_value, truth, torch.float32)


def rename_flags(make: Any, keys: dict[str, Any]) -> Setup:
    class Renaming:
        @staticmethod
        def GRUModule(**kwargs: Any) -> Any:
            name = kwargs["out_keys"][0].removesuffix("_embed")
            return rnnkeys.GRUModule(**kwargs, init_key=keys[name])

    setup = make(Renaming, "gru", False)
    # What collects keeps the usual name.
    setup.policy = cases.make_ddpg(rnnkeys, "gru", False).policy
    return setup


def test_table_of_targets_shows_errors_of_torchrl_only(tmp_path: Path) -> None:
    page = tmp_path / "targets.md"
    targets.main(["--seeds", "1", "--only", "DDPG TDLambda", "--output", str(page)])
    [row] = [line for line in page.read_text().splitlines() if line.startswith("| DDPG")]
    _, theirs, error, leak, *ours = [cell.strip() for cell in row.strip("|").split("|")]
    assert int(theirs.split("%")[0]) > 20 and float(error.strip("%")) > 1 and float(leak) > 0.01
    assert [cell.split(" of ")[0] for cell in ours[::3]] == ["0", "0"]
    assert float(ours[1]) < 1e-5 and float(ours[4]) < 1e-12
    assert ours[2::3] == ["0", "0"]


def test_cases_cover_every_loss_and_estimator() -> None:
    covered = {type(case.make(rnnkeys, "gru").loss) for case in CASES}
    assert {DQNLoss, DistributionalDQNLoss, GAE, TDLambdaEstimator} <= covered
    assert len(covered) >= 14
