"""The loss of R2D2 equals an implementation in NumPy, on windows with every kind of end."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives import HardUpdate, SoftUpdate

from rnnkeys import GRUModule
from rnnkeys.checks import set_value_checks
from rnnkeys.objectives import R2D2Loss, value_rescale, value_rescale_inverse
from rnnkeys.replay import PrioritizedSampler
from rnnkeys.transforms import Windows
from tests.support.r2d2 import (
    ARGUMENTS,
    MASK,
    A,
    B,
    H,
    I,
    T,
    as_numpy,
    expect,
    make_loss,
    make_network,
    make_windows,
    rescale,
)
from tests.support.recurrent import F64, chain, recurrently
from tests.support.tolerances import assert_equal

F32 = torch.float32
CASES: dict[str, dict[str, Any]] = {
    "as in the paper": {},
    "no burn-in": {"burn_in": 0},
    "one step": {"n_steps": 1},
    "longer than windows": {"n_steps": 40},
    "no rescaling": {"eps": None},
    "no double Q": {"double_dqn": False},
    "mean priorities": {"eta": 0.0},
    "one step left": {"burn_in": T - 1},
    "no discount": {"gamma": 1.0},
    "starts in the burn-in": {"learn_starts": True},
    "greedy returns": {"n_steps": 40, "greedy_returns": True},
    "greedy returns, starts": {"n_steps": 2, "greedy_returns": True, "learn_starts": True},
    "one step left, starts": {"learn_starts": True, "burn_in": T - 1},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_r2d2_loss_and_priorities_equal_numpy(case, masked):
    online, target = make_network(0), make_network(1)
    windows = make_windows(masked=masked)
    loss = make_loss(online, target, **CASES[case])
    expected, priorities, _ = expect(
        as_numpy(online), as_numpy(target), windows, **{**ARGUMENTS, **CASES[case]}
    )
    actual = loss(windows)["loss"]
    assert_equal(actual, torch.tensor(expected), F64, "loss")
    assert windows["td_error"].shape == (B, T)
    assert_equal(windows["td_error"][:, 0], torch.from_numpy(priorities), F32, "priorities")
    assert (windows["td_error"] == windows["td_error"][:, :1]).all()


def test_r2d2_done_without_a_flag_ends_an_episode():
    network, windows = make_network(), make_windows(masked=False)
    bare = windows.clone()
    over = windows["next", "done"][:, :-1]
    windows["is_init"][:, 1:] |= over
    bare["is_init"][:, 1:] &= ~over
    loss = make_loss(network, make_network(1))
    assert not torch.equal(bare["is_init"], windows["is_init"])
    assert torch.equal(loss(bare)["loss"], loss(windows)["loss"])


ENTRIES: list[Any] = ["observation", ("next", "observation"), ("next", "reward"), "recurrent_state"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ENTRIES, ids=str)
def test_r2d2_entry_not_finite_raises_by_name_and_writes_no_priority(key, value):
    loss = make_loss(make_network(), make_network(1))
    windows = make_windows()
    if key == "recurrent_state":
        windows[key][0] = value
    else:
        windows[key][0, -1] = value
    before = windows.clone()
    name = re.escape(repr(key))
    with pytest.raises(ValueError, match=f"{name} is not finite.*first at .0, (0|10)"):
        loss(windows)
    assert set(windows.keys(True, True)) == set(before.keys(True, True))
    with set_value_checks(False):
        assert not loss(windows)["loss"].isfinite()


def test_r2d2_parameter_not_finite_raises_by_name():
    loss = make_loss(make_network(), make_network(1))
    for parameter in loss.parameters():
        parameter.data.fill_(float("nan"))
    windows = make_windows()
    with pytest.raises(ValueError, match="because the parameter 'value_network_params.*is not"):
        loss(windows)
    assert "td_error" not in windows.keys()


def test_r2d2_overflow_raises():
    windows = make_windows()
    windows["priority_weight"] = torch.full((B, T), float("nan"))
    with pytest.raises(ValueError, match="every entry and parameter is.*importance weights"):
        make_loss(make_network(), make_network(1))(windows)


def _one_hot(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def write(windows: Any) -> None:
        windows["action"] = change(windows["action"].clone())

    return write


def _index(value: Any) -> Callable[[Any], Any]:
    def write(windows: Any) -> None:
        windows["action"] = windows["action"].argmax(-1).to(torch.as_tensor(value).dtype)
        windows["action"][0, 5] = value

    return write


def _done(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def write(windows: Any) -> None:
        windows["next", "done"] = change(windows["next", "done"])

    return write


WRONG: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "all sevens": (_one_hot(lambda a: a * 0 + 7), ValueError, "'action' is not one-hot at 57"),
    "all zero": (_one_hot(lambda a: a * 0), ValueError, "'action' is not one-hot at 57 steps"),
    "two ones": (_one_hot(lambda a: a * 0 + 1), ValueError, "choose_one_action"),
    "probabilities": (_one_hot(lambda a: a.float().softmax(-1)), ValueError, "is not one-hot"),
    "index of .9": (_index(0.9), TypeError, "'action' .* must be an integer.*Got torch.float32"),
    "index too large": (_index(A), ValueError, "from 0 to 2 at 1 steps, first at .0, 5"),
    "index negative": (_index(-1), ValueError, "'action' is not an index from 0 to 2"),
    "other actions": (
        _one_hot(lambda a: a[..., :2]),
        ValueError,
        r"3 actions.*\[7, 11, 2\]",
    ),
    "done uint8": (_done(lambda d: d.to(torch.uint8)), TypeError, "'done'.*bool. Got torch.uint8"),
    "done int64": (_done(lambda d: d.long()), TypeError, "'done'.*bool. Got torch.int64"),
    "done [B, T]": (_done(lambda d: d.squeeze(-1)), ValueError, r"'done'.*shape.*\.unsqueeze"),
    "done per agent": (
        _done(lambda d: d.unsqueeze(-2).expand(B, T, 2, 1)),
        ValueError,
        "one value for each step.*'done'.*QMixerLoss",
    ),
    "mask of two columns": (
        lambda windows: windows.set(MASK, windows[MASK].unsqueeze(-1).expand(B, T, 2)),
        ValueError,
        r"mask .* one value for each step, \[7, 11\]. Got \[7, 11, 2\]",
    ),
    "mask of integers": (
        lambda windows: windows.set(MASK, windows[MASK].long()),
        TypeError,
        "mask .* must be bool. Got torch.int64",
    ),
    "nothing valid": (
        lambda windows: windows.set(MASK, windows[MASK] & False),
        ValueError,
        "False everywhere, so R2D2Loss has no step",
    ),
    "trajectories change": (
        lambda windows: windows.set(("collector", "traj_ids"), torch.arange(B * T).view(B, T)),
        ValueError,
        "not contiguous.*traj_ids",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_r2d2_invalid_entry_raises_and_batch_is_unchanged(name):
    change, error, text = WRONG[name]
    windows = make_windows()
    change(windows)
    before = windows.clone()
    with pytest.raises(error, match=text):
        make_loss(make_network(), make_network(1))(windows)
    assert set(windows.keys(True, True)) == set(before.keys(True, True))
    assert all(torch.equal(windows[k], before[k]) for k in before.keys(True, True))


def test_r2d2_agents_in_the_value_network_raise():
    gru = GRUModule(I, H, in_key="observation", out_key="embed", dtype=F64)
    network = chain(gru, TensorDictModule(nn.Linear(H, A, dtype=F64), ["embed"], ["action_value"]))
    windows = make_windows(masked=False).exclude("recurrent_state")
    for key in ("observation", ("next", "observation")):
        windows[key] = windows[key].unsqueeze(-2).expand(B, T, 2, I)
    with pytest.raises(
        ValueError, match=r"'action_value' of shape.*Got \[7, 7, 2, 3\].*QMixerLoss"
    ):
        make_loss(network, network)(windows)


def test_r2d2_numpy_numbers_are_accepted():
    windows = make_windows()
    numbers: Any = {"burn_in": np.int64(4), "n_steps": np.int32(3), "gamma": np.float32(0.5)}
    loss = make_loss(make_network(), make_network(1), **numbers)
    other = make_loss(make_network(), make_network(1), burn_in=4, n_steps=3, gamma=0.5)
    assert torch.equal(loss(windows)["loss"], other(windows)["loss"])


@pytest.mark.parametrize(("name", "value"), [("gamma", 7.0), ("n_steps", 0), ("n_steps", True)])
def test_r2d2_value_estimator_out_of_range_raises(name, value):
    loss = make_loss(make_network(), make_network(1))
    with pytest.raises(ValueError, match=f"{name} must be .*Got {name}={value}"):
        loss.make_value_estimator(**{name: value})


def test_r2d2_priorities_may_be_changed_in_place():
    windows = make_windows()
    make_loss(make_network(), make_network(1))(windows)
    windows["td_error"][0, 0] = 5.0
    assert windows["td_error"][0, 1] != 5.0


def test_r2d2_multi_step_transitions_raise():
    windows = make_windows()
    windows["steps_to_next_obs"] = torch.ones(B, T, 1)
    with pytest.raises(ValueError, match="multi-step transitions.*n_steps="):
        make_loss(make_network(), make_network(1))(windows)


def test_r2d2_squared_priorities_indices_and_no_target_network():
    online, target = make_network(0), make_network(1)
    windows = make_windows(one_hot=False)
    loss = make_loss(online, target, squared_priority=True)
    expected, priorities, _ = expect(as_numpy(online), as_numpy(target), windows, squared=True)
    assert_equal(loss(windows)["loss"], torch.tensor(expected), F64)
    assert_equal(windows["td_error"][:, 0], torch.from_numpy(priorities), F32)
    alone = make_loss(online, online, delay_value=False, double_dqn=False)
    expected, *_ = expect(as_numpy(online), as_numpy(online), windows, double_dqn=False)
    assert_equal(alone(windows)["loss"], torch.tensor(expected), F64)


def test_r2d2_gradient_is_that_of_the_learned_values():
    """Only the learned part's predictions are differentiated: the rest is data."""
    online, target = make_network(0), make_network(1)
    windows = make_windows()
    loss = make_loss(online, target)
    loss(windows)["loss"].backward()
    *_, errors = expect(as_numpy(online), as_numpy(target), windows)
    fixed = torch.from_numpy(errors)
    with torch.no_grad():
        plain = recurrently(online, windows)
    mask = ~fixed.isnan()
    index = windows["action"].argmax(-1, keepdim=True)
    returns = fixed + plain["action_value"].gather(-1, index).squeeze(-1)
    # The same by autograd through single steps from the state after the burn-in.
    state = plain["next", "recurrent_state"][:, 3]
    total = torch.zeros((), dtype=F64)
    for t in range(4, T):
        stored = windows["recurrent_state"][:, t]
        state = torch.where(windows["is_init"][:, t].unsqueeze(-1), stored, state)
        step = TensorDict(
            {
                "observation": windows["observation"][:, t],
                "recurrent_state": state,
                "is_init": torch.zeros(B, 1, dtype=torch.bool),
            },
            [B],
        )
        out = online(step)
        state = out["next", "recurrent_state"]
        q = out["action_value"].gather(-1, index[:, t]).squeeze(-1)
        wrong = torch.where(mask[:, t], returns[:, t] - q, 0.0)
        total = total + (windows["priority_weight"][:, 0] * wrong**2).sum()
    (total / mask.sum()).backward()
    expected = dict(online.named_parameters())
    found = {
        ".".join(key) if isinstance(key, tuple) else key: value.grad
        for key, value in loss.value_network_params.items(True, True)
    }
    assert found
    for name, grad in found.items():
        assert_equal(grad, expected[name].grad, F64, name)
    assert all(p.grad is None for p in loss.target_value_network_params.values(True, True))


def test_r2d2_padding_has_no_effect_even_if_nan():
    online, target = make_network(0), make_network(1)
    results = []
    for dirty in (False, True):
        windows = make_windows()
        if dirty:
            gone = ~windows[MASK]
            for key in ("observation", ("next", "observation"), ("next", "reward")):
                windows[key][gone] = float("nan")
            windows["recurrent_state"][5] = float("nan")
        loss = make_loss(online, target)
        value = loss(windows)["loss"]
        value.backward()
        grads = [p.grad for p in loss.parameters() if p.grad is not None]
        results.append((value.detach(), windows["td_error"], *grads))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty) and clean.any()
    assert (results[0][1][5] == 0).all()


def test_r2d2_no_step_after_burn_in_warns_and_is_zero():
    windows = make_windows()
    windows[MASK][:, 4:] = False
    loss = make_loss(make_network(0), make_network(1))
    with pytest.warns(UserWarning, match="No valid step .* remains after the burn-in of 4"):
        value = loss(windows)["loss"]
    value.backward()
    assert value == 0 and (windows["td_error"] == 0).all()
    assert all(not p.grad.any() for p in loss.parameters() if p.grad is not None)


def test_r2d2_learn_starts_learns_from_episodes_shorter_than_the_burn_in():
    windows = cast(Any, make_windows(masked=False)[:2].clone())
    windows[MASK] = torch.ones(2, T, dtype=torch.bool)
    windows[MASK][:, 3:] = False
    loss = make_loss(make_network(0), make_network(1), learn_starts=True)
    assert loss(windows)["loss"] > 0 and (windows["td_error"] > 0).all()
    windows["is_init"][:, 0] = False
    with pytest.warns(UserWarning, match="No valid step .* remains after the burn-in of 4"):
        assert loss(windows)["loss"] == 0


def test_r2d2_null_and_repeated_steps_give_one_loss():
    """An episode's terminal reward is learned from, however its window is filled."""
    episode = cast(Any, make_windows(masked=False)[0].clone())
    del episode["priority_weight"]
    episode["next", "done"][-1] = episode["next", "terminated"][-1] = True
    values = []
    for residual in ("null", "repeat"):
        windows = Windows(8, residual)(episode)
        loss = make_loss(make_network(0), make_network(1), burn_in=2)
        values.append(loss(windows)["loss"])
        priority = windows["td_error"][:, 0]
        windows["next", "reward"][1, 2] += 10  # the last step of 11
        loss(windows)
        assert windows["td_error"][0, 0] == priority[0]
        assert windows["td_error"][1, 0] != priority[1]
    assert_equal(values[0], values[1], F64)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_r2d2_priorities_reach_a_prioritized_buffer(dtype):
    episode = make_windows(masked=False).exclude("priority_weight")
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(50),
        sampler=PrioritizedSampler(50, alpha=1.0, beta=0.4, dtype=dtype),
        transform=Windows(5, "last"),
        priority_key="td_error",
        batch_size=16,
    )
    index = buffer.extend(episode)
    loss = make_loss(make_network(0), make_network(1), burn_in=1, importance_weights=True)
    unseen = set(index.flatten().tolist())
    while unseen:
        sample = buffer.sample()
        loss(sample)
        buffer.update_tensordict_priority(sample)
        unseen -= set(sample["index"].flatten().tolist())
    everything = buffer[:]
    everything["priority_weight"] = torch.ones(everything.shape)
    loss(everything)
    tree: Any = buffer.sampler
    stored = torch.as_tensor([tree._sum_tree[int(i)] for i in index.flatten()])
    expected = everything["td_error"][:, 0]
    assert_equal(stored, expected, F32)


def test_r2d2_missing_importance_weights_raise_or_are_one():
    online, target = make_network(0), make_network(1)
    windows = make_windows()
    plain, *_ = expect(as_numpy(online), as_numpy(target), windows, weighted=False)
    ignoring = make_loss(online, target, importance_weights=False)
    assert_equal(ignoring(windows)["loss"], torch.tensor(plain), F64)
    del windows["priority_weight"]
    assert_equal(make_loss(online, target)(windows)["loss"], torch.tensor(plain), F64)
    with pytest.raises(KeyError, match="importance_weights=True.*prioritized sampler"):
        make_loss(online, target, importance_weights=True)(windows)


def test_r2d2_of_windows_in_several_dimensions_is_that_of_all_windows():
    online, target = make_network(0), make_network(1)
    flat = make_windows()[:6]
    deep = flat.reshape(2, 3, T)
    expected = make_loss(online, target)(flat)["loss"]
    assert_equal(make_loss(online, target)(deep)["loss"], expected, F64)


def test_r2d2_set_keys_reads_other_entries():
    online, target = make_network(0), make_network(1)
    windows = make_windows()
    expected = make_loss(online, target)(windows.clone())["loss"]
    windows.rename_key_("action", "move")
    windows.rename_key_(("next", "reward"), ("next", "gain"))
    windows.rename_key_(MASK, "real")
    loss = make_loss(online, target)
    with pytest.raises(KeyError, match=r"reads 'action', which is not in the.*\[missing-entry\]"):
        loss(windows)
    loss.set_keys(action="move", reward="gain", mask="real", priority="p")
    assert torch.equal(loss(windows)["loss"], expected)
    assert "p" in windows.keys() and "td_error" not in windows.keys()


@pytest.mark.parametrize("updater", ["soft", "hard"])
def test_r2d2_target_updater_moves_the_target(updater):
    loss = R2D2Loss(make_network(0), **ARGUMENTS)
    update = (
        SoftUpdate(loss, tau=0.5)
        if updater == "soft"
        else HardUpdate(loss, value_network_update_interval=1)
    )
    loss(make_windows())["loss"].backward()
    for p in loss.parameters():
        p.data.add_(1.0)
    before = loss.target_value_network_params.clone()
    for _ in range(2):  # a hard update counts to its interval first
        update.step()
    after = loss.target_value_network_params
    assert all((after[k] != before[k]).any() for k in before.keys(True, True))


def test_r2d2_copies_pickles_and_checkpoints_compute_the_same():
    loss = make_loss(make_network(0), make_network(1))
    windows = make_windows()
    expected = loss(windows)["loss"]
    fresh = make_loss(make_network(5), make_network(6))
    assert not torch.equal(fresh(windows)["loss"], expected)
    fresh.load_state_dict(loss.state_dict(), strict=True)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), fresh):
        assert torch.equal(other(windows)["loss"], expected)
    other = copy.deepcopy(loss)
    for p in other.parameters():
        p.data.zero_()
    assert not torch.equal(other(windows)["loss"], expected)
    assert torch.equal(loss(windows)["loss"], expected)


def test_r2d2_other_value_estimator_raises():
    loss = make_loss(make_network(0), make_network(1))
    loss.make_value_estimator(gamma=0.5, n_steps=2)
    assert (loss.gamma, loss.n_steps) == (0.5, 2)
    with pytest.raises(NotImplementedError, match="lmbda"):
        loss.make_value_estimator(lmbda=0.9)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"burn_in": -1}, "burn_in must be"),
        ({"n_steps": 0}, "n_steps must be"),
        ({"gamma": 1.5}, "gamma must be a number from 0"),
        ({"eta": -0.1}, "eta must be a number from 0"),
        ({"delay_value": False}, "delay_value=True"),
    ],
)
def test_r2d2_argument_out_of_range_raises(arguments, text):
    with pytest.raises(ValueError, match=text):
        R2D2Loss(make_network(), **arguments)


def test_r2d2_invalid_batch_or_network_raises():
    loss = make_loss(make_network(0), make_network(1))
    with pytest.raises(ValueError, match=r"takes windows \[\*, T\].*slice_len"):
        loss(make_windows().reshape(-1))
    with pytest.raises(ValueError, match="burn_in=4 leaves no step of windows of 4 steps"):
        loss(make_windows()[:, :4])
    with pytest.raises(ValueError, match="no recurrent module"):
        R2D2Loss(make_network()[1])


NAN = float("nan")
Change = Callable[[Any], None]


def learn(windows: Any, **arguments: Any) -> list[Tensor]:
    """Return the loss of windows, their priorities, and the gradients."""
    loss = make_loss(make_network(0), make_network(1), **arguments)
    value = loss(windows)["loss"]
    value.backward()
    grads = [p.grad for p in loss.parameters() if p.grad is not None]
    return [value.detach(), windows["td_error"], *grads]


def spoil_padding(key: Any, value: float) -> Change:
    """Return a change of an entry at padding, or for weights in the window that is all padding."""

    def change(windows: Any) -> None:
        entry = windows.get(key).clone(memory_format=torch.contiguous_format)
        gone = ~windows[MASK]
        entry[gone if key != "priority_weight" else gone.all(1)] = value
        windows.set(key, entry)

    return change


SPOILED: dict[str, Change] = {
    "observations": spoil_padding("observation", NAN),
    "next observations": spoil_padding(("next", "observation"), NAN),
    "rewards": spoil_padding(("next", "reward"), NAN),
    "states": spoil_padding("recurrent_state", NAN),
    "infinite states": spoil_padding("recurrent_state", float("inf")),
    "weights": spoil_padding("priority_weight", NAN),
    "actions out of range": spoil_padding("action", -1),
}


@pytest.mark.parametrize("burn_in", [0, 4])
@pytest.mark.parametrize("case", SPOILED)
def test_r2d2_entry_at_padding_changes_nothing(case, burn_in):
    clean, spoiled = make_windows(one_hot=False), make_windows(one_hot=False)
    assert torch.equal(clean["observation"], spoiled["observation"])
    SPOILED[case](spoiled)
    for expected, actual in zip(
        learn(clean, burn_in=burn_in), learn(spoiled, burn_in=burn_in), strict=True
    ):
        assert torch.equal(actual, expected) and expected.any()


def test_r2d2_observation_after_a_terminal_step_has_no_effect():
    """Environments that reset themselves may leave anything there."""
    clean, spoiled = make_windows(), make_windows()
    terminated = spoiled["next", "terminated"].squeeze(-1)
    assert (terminated & spoiled[MASK]).any()
    spoiled["next", "observation"][terminated] = NAN
    for expected, actual in zip(learn(clean), learn(spoiled), strict=True):
        assert torch.equal(actual, expected)


def test_r2d2_without_windows_raises():
    with pytest.raises(ValueError, match=r"at least one step. Got batch size \[0, 11\]"):
        learn(make_windows()[:0].clone())


def test_r2d2_mask_with_a_last_dimension_is_accepted():
    windows = make_windows()
    expected = learn(windows.clone())
    windows[MASK] = windows[MASK].unsqueeze(-1)
    for one, other in zip(learn(windows), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("eps", "values"),
    [
        (1e-2, {1.0: 0.424214, 100.0: 10.049876, 1000.0: 40.638584}),
        (1e-3, {1.0: 0.415214, 100.0: 9.149876, 1000.0: 31.638584}),
    ],
)
def test_value_rescale_equals_known_values(eps, values):
    for x, y in values.items():
        for sign in (1, -1):
            found = value_rescale(torch.tensor(sign * x, dtype=F64), eps).item()
            assert found == pytest.approx(sign * y, abs=5e-7)


@pytest.mark.parametrize("eps", [1e-2, 1e-3])
def test_value_rescale_inverse_has_no_cancellation(eps):
    x = torch.logspace(-8, 6, 200)
    x = torch.cat([-x, torch.zeros(1), x])
    back = value_rescale_inverse(value_rescale(x, eps), eps)
    assert back[200] == 0
    error = ((back - x).abs() / x.abs()).nan_to_num(0)
    assert error.max() < 1e-6
    exact = torch.tensor([rescale(v, eps) for v in x.tolist()], dtype=F64)
    assert_equal(value_rescale(x.double(), eps), exact, F64)


def test_loss_with_more_steps_to_the_return_than_a_window_has_sums_all_of_it():
    """A number that is huge by mistake does not hang."""
    network, data = make_network(), make_windows()
    losses = [
        R2D2Loss(network, burn_in=2, n_steps=n, delay_value=False, double_dqn=False)(data.clone())
        for n in (T, 10**9)
    ]
    assert torch.equal(losses[0]["loss"], losses[1]["loss"])


def test_value_rescale_without_slope_raises():
    for function in (value_rescale, value_rescale_inverse):
        with pytest.raises(ValueError, match="eps must be a number > 0"):
            function(torch.zeros(1), 0.0)
