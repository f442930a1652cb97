"""The loss of R2D2 equals an implementation in NumPy, on windows with every kind of end."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives import HardUpdate, SoftUpdate

from rnnkeys import GRUModule
from rnnkeys.modules.parameters import Layers
from rnnkeys.objectives import R2D2Loss, value_rescale, value_rescale_inverse
from rnnkeys.replay import PrioritizedSampler
from rnnkeys.transforms import Windows
from tests.support import reference
from tests.support.recurrent import F64, chain, recurrently
from tests.support.tolerances import assert_equal

MASK = ("collector", "mask")
B, T, I, H, A = 7, 11, 3, 4, 3


class Network(NamedTuple):
    """Parameters in NumPy: a GRU and a linear head."""

    gru: reference.Weights
    w: np.ndarray
    b: np.ndarray


def make_network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    gru = GRUModule(I, H, in_key="observation", out_key="embed", dtype=F64)
    head = nn.Linear(H, A, dtype=F64)
    nn.init.uniform_(head.weight, -3, 3)
    return chain(gru, TensorDictModule(head, ["embed"], ["action_value"]))


def as_numpy(network: Any) -> Network:
    weights = Layers(network[0].gru).weights(0)
    arrays: list[Any] = [None if w is None else w.detach().numpy() for w in weights[:5]]
    head = network[1].module
    return Network(
        reference.Weights(*arrays), head.weight.detach().numpy(), head.bias.detach().numpy()
    )


def make_windows(one_hot: bool = True, masked: bool = True) -> TensorDict:
    """Random windows in which episodes terminate, are truncated, or are reset without a done."""
    torch.manual_seed(2)
    generator = np.random.default_rng(3)
    events = generator.choice(4, size=(B, T), p=[0.7, 0.1, 0.1, 0.1])
    events[0], events[1, -1], events[2, -1] = 0, 1, 2
    terminated, truncated, reset = (torch.from_numpy(events == k) for k in (1, 2, 3))
    over = terminated | truncated | reset
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, 1:] = over[:, :-1]
    starts[0, 0] = starts[1, 0] = True
    observation = torch.randn(B, T, I, dtype=F64)
    behind = torch.randn(B, T, I, dtype=F64)
    goes_on = ~over[:, :-1]
    behind[:, :-1][goes_on] = observation[:, 1:][goes_on]
    action = torch.randint(A, (B, T))
    data = TensorDict(
        {
            "observation": observation,
            "recurrent_state": torch.randn(B, T, 1, H, dtype=F64),
            "is_init": starts.unsqueeze(-1),
            "action": nn.functional.one_hot(action, A) if one_hot else action,
            "priority_weight": torch.rand(B, 1, dtype=F64).expand(B, T),
            "next": {
                "observation": behind,
                "reward": 5 * torch.randn(B, T, 1, dtype=F64),
                "done": (terminated | truncated).unsqueeze(-1),
                "terminated": terminated.unsqueeze(-1),
            },
        },
        [B, T],
    )
    if masked:
        mask = torch.ones(B, T, dtype=torch.bool)
        mask[3, 8:] = mask[4, 5:] = mask[5] = False
        data[MASK] = mask
    return data


def rescale(x: float, eps: float | None) -> float:
    if eps is None:
        return x
    return float(np.sign(x) * (np.sqrt(abs(x) + 1) - 1) + eps * x)


def unscale(y: float, eps: float | None) -> float:
    """By bisection, so that no formula of the inverse is believed."""
    if eps is None:
        return y
    low, high = -1e6, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if rescale(middle, eps) < y else (low, middle)
    return (low + high) / 2


class Window:
    """One window seen by one network, step by step."""

    def __init__(self, network: Network, data: dict[str, np.ndarray], b: int) -> None:
        self.network = network
        self.state = np.zeros((T, H))
        h = data["state"][b, 0]
        for t in range(T):
            if t and data["init"][b, t]:
                h = data["state"][b, t]
            h = self.step(h, data["observation"][b, t])
            self.state[t] = h
        self.behind = data["behind"][b]

    def step(self, h: np.ndarray, observation: np.ndarray) -> np.ndarray:
        (h_next,), _ = reference.GRU().step(self.network.gru, observation[None], (h[None],))
        return h_next[0]

    def values(self, h: np.ndarray) -> np.ndarray:
        return self.network.w @ h + self.network.b

    def values_behind(self, t: int) -> np.ndarray:
        """Values of the observation that step ``t`` led to."""
        return self.values(self.step(self.state[t], self.behind[t]))


def expect(
    online: Network,
    target: Network,
    windows: TensorDict,
    *,
    burn_in: int = 4,
    n_steps: int = 3,
    gamma: float = 0.9,
    eps: float | None = 1e-2,
    eta: float = 0.9,
    squared: bool = False,
    double_dqn: bool = True,
    weighted: bool = True,
    learn_starts: bool = False,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the loss, priorities ``[B]``, and TD errors ``[B, T]`` (NaN where there is none)."""
    data = {
        "observation": windows["observation"].numpy(),
        "behind": windows["next", "observation"].numpy(),
        "state": windows["recurrent_state"][:, :, 0].numpy(),
        "init": windows["is_init"][..., 0].numpy(),
    }
    done, terminated = (windows["next", key][..., 0].numpy() for key in ("done", "terminated"))
    reward = windows["next", "reward"][..., 0].numpy()
    action = windows["action"]
    action = (action.argmax(-1) if action.ndim == 3 else action).numpy()
    mask = windows.get(MASK, torch.ones(B, T, dtype=torch.bool)).numpy()
    errors = np.full((B, T), np.nan)
    for b in range(B):
        ours, theirs = Window(online, data, b), Window(target, data, b)
        for t in range(T):
            if not mask[b, t]:
                continue
            fresh = data["init"][b, : t + 1].any()
            if t < burn_in and not (learn_starts and fresh):
                continue
            total, last = 0.0, t
            for k in range(n_steps):
                last = t + k
                total += gamma**k * reward[b, last]
                alone = last + 1 == T or data["init"][b, last + 1] or not mask[b, last + 1]
                if done[b, last] or alone:
                    break
            if not terminated[b, last]:
                values = theirs.values_behind(last)
                chooser = ours.values_behind(last) if double_dqn else values
                bootstrap = unscale(float(values[chooser.argmax()]), eps)
                total += gamma ** (last - t + 1) * bootstrap
            errors[b, t] = rescale(total, eps) - ours.values(ours.state[t])[action[b, t]]
    real = ~np.isnan(errors)
    weights = windows["priority_weight"][:, :1].numpy() if weighted else np.ones((B, 1))
    loss = (weights * np.where(real, errors, 0) ** 2).sum() / max(real.sum(), 1)
    priorities = np.zeros(B)
    for b in range(B):
        if real[b].any():
            size = errors[b][real[b]] ** 2 if squared else abs(errors[b][real[b]])
            priorities[b] = eta * size.max() + (1 - eta) * size.mean()
    return loss, priorities, errors


ARGUMENTS: dict[str, Any] = {"burn_in": 4, "n_steps": 3, "gamma": 0.9, "eps": 1e-2}


def make_loss(online: Any, target: Any, **arguments: Any) -> R2D2Loss:
    """A loss whose target network has parameters of its own."""
    loss = R2D2Loss(copy.deepcopy(online), **{**ARGUMENTS, **arguments})
    if loss.delay_value:
        SoftUpdate(loss, tau=0.5)
        for key, value in _parameters(target).items():
            loss.target_value_network_params[key].data.copy_(value)
    return loss


def _parameters(network: Any) -> dict[Any, Tensor]:
    params: Any = cast(Any, TensorDict).from_module(network)
    return {k: v.data for k, v in params.items(True, True)}


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
    "one step left, starts": {"learn_starts": True, "burn_in": T - 1},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_priorities_equal_numpys(case, masked):
    online, target = make_network(0), make_network(1)
    windows = make_windows(masked=masked)
    loss = make_loss(online, target, **CASES[case])
    expected, priorities, _ = expect(
        as_numpy(online), as_numpy(target), windows, **{**ARGUMENTS, **CASES[case]}
    )
    actual = loss(windows)["loss"]
    assert_equal(actual, torch.tensor(expected), F64, "loss")
    assert windows["td_error"].shape == (B, T)
    assert_equal(windows["td_error"][:, 0], torch.from_numpy(priorities), F64, "priorities")
    assert (windows["td_error"] == windows["td_error"][:, :1]).all()


def test_a_done_that_no_mark_follows_ends_an_episode():
    network, windows = make_network(), make_windows(masked=False)
    bare = windows.clone()
    over = windows["next", "done"][:, :-1]
    windows["is_init"][:, 1:] |= over
    bare["is_init"][:, 1:] &= ~over
    loss = make_loss(network, make_network(1))
    assert not torch.equal(bare["is_init"], windows["is_init"])
    assert torch.equal(loss(bare)["loss"], loss(windows)["loss"])


def test_a_reward_that_is_no_number_is_refused_unless_it_is_masked():
    loss = make_loss(make_network(), make_network(1))
    windows = make_windows()
    masked = ~windows[MASK]
    windows["next", "reward"][masked] = float("nan")
    assert loss(windows)["loss"].isfinite()
    windows["next", "reward"][0, 5] = float("nan")
    windows[MASK][0, 5] = True
    del windows["td_error"]
    with pytest.raises(ValueError, match="reward.*not finite at 1 of 77 steps, first at"):
        loss(windows)
    assert "td_error" not in windows.keys()


@pytest.mark.parametrize(("name", "value"), [("gamma", 7.0), ("n_steps", 0), ("n_steps", True)])
def test_values_that_come_later_are_checked(name, value):
    loss = make_loss(make_network(), make_network(1))
    with pytest.raises(ValueError, match=f"{name} must be .*Got {value}"):
        loss.make_value_estimator(**{name: value})


def test_priorities_may_be_changed_in_place():
    windows = make_windows()
    make_loss(make_network(), make_network(1))(windows)
    windows["td_error"][0, 0] = 5.0
    assert windows["td_error"][0, 1] != 5.0


def test_multi_step_transitions_are_refused():
    windows = make_windows()
    windows["steps_to_next_obs"] = torch.ones(B, T, 1)
    with pytest.raises(ValueError, match="multi-step transitions.*n_steps="):
        make_loss(make_network(), make_network(1))(windows)


def test_squared_priorities_indices_and_no_target_network():
    online, target = make_network(0), make_network(1)
    windows = make_windows(one_hot=False)
    loss = make_loss(online, target, squared_priority=True)
    expected, priorities, _ = expect(as_numpy(online), as_numpy(target), windows, squared=True)
    assert_equal(loss(windows)["loss"], torch.tensor(expected), F64)
    assert_equal(windows["td_error"][:, 0], torch.from_numpy(priorities), F64)
    alone = make_loss(online, online, delay_value=False, double_dqn=False)
    expected, *_ = expect(as_numpy(online), as_numpy(online), windows, double_dqn=False)
    assert_equal(alone(windows)["loss"], torch.tensor(expected), F64)


def test_gradients_equal_finite_differences_with_targets_and_burn_in_fixed():
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
    # The same by autograd through single steps from the state behind the burn-in.
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


def test_what_is_masked_reaches_nothing_not_even_a_nan():
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


def test_a_mask_that_leaves_nothing_gives_zero_and_says_so():
    windows = make_windows()
    windows[MASK][:, 4:] = False
    loss = make_loss(make_network(0), make_network(1))
    with pytest.warns(UserWarning, match="leaves no step behind a burn-in of 4"):
        value = loss(windows)["loss"]
    value.backward()
    assert value == 0 and (windows["td_error"] == 0).all()
    assert all(not p.grad.any() for p in loss.parameters() if p.grad is not None)


def test_short_episodes_are_learned_from_though_they_end_within_the_burn_in():
    windows = cast(Any, make_windows(masked=False)[:2].clone())
    windows[MASK] = torch.ones(2, T, dtype=torch.bool)
    windows[MASK][:, 3:] = False
    loss = make_loss(make_network(0), make_network(1), learn_starts=True)
    assert loss(windows)["loss"] > 0 and (windows["td_error"] > 0).all()
    windows["is_init"][:, 0] = False
    with pytest.warns(UserWarning, match="leaves no step behind a burn-in of 4"):
        assert loss(windows)["loss"] == 0


def test_windows_filled_with_nulls_or_repeated_steps_give_one_loss():
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


def test_a_prioritised_buffer_of_windows_takes_the_priorities():
    episode = make_windows(masked=False).exclude("priority_weight")
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(50),
        sampler=PrioritizedSampler(50, alpha=1.0, beta=0.4),
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
    assert_equal(stored.double(), expected, torch.float32)


def test_missing_importance_weights_are_named_or_count_as_one():
    online, target = make_network(0), make_network(1)
    windows = make_windows()
    plain, *_ = expect(as_numpy(online), as_numpy(target), windows, weighted=False)
    ignoring = make_loss(online, target, importance_weights=False)
    assert_equal(ignoring(windows)["loss"], torch.tensor(plain), F64)
    del windows["priority_weight"]
    assert_equal(make_loss(online, target)(windows)["loss"], torch.tensor(plain), F64)
    with pytest.raises(KeyError, match="importance_weights=True.*prioritised sampler"):
        make_loss(online, target, importance_weights=True)(windows)


def test_keys_may_have_other_names():
    online, target = make_network(0), make_network(1)
    windows = make_windows()
    expected = make_loss(online, target)(windows.clone())["loss"]
    windows.rename_key_("action", "move")
    windows.rename_key_(("next", "reward"), ("next", "gain"))
    windows.rename_key_(MASK, "real")
    loss = make_loss(online, target)
    with pytest.raises(KeyError, match="reads 'action', which is not in the batch"):
        loss(windows)
    loss.set_keys(action="move", reward="gain", mask="real", priority="p")
    assert torch.equal(loss(windows)["loss"], expected)
    assert "p" in windows.keys() and "td_error" not in windows.keys()


@pytest.mark.parametrize("updater", ["soft", "hard"])
def test_target_updaters_move_the_target(updater):
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


def test_copies_pickles_and_checkpoints_compute_the_same():
    loss = make_loss(make_network(0), make_network(1))
    windows = make_windows()
    expected = loss(windows)["loss"]
    fresh = make_loss(make_network(5), make_network(6))
    assert not torch.equal(fresh(windows)["loss"], expected)
    fresh.load_state_dict(loss.state_dict(), strict=True)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), fresh):
        assert torch.equal(twin(windows)["loss"], expected)
    twin = copy.deepcopy(loss)
    for p in twin.parameters():
        p.data.zero_()
    assert not torch.equal(twin(windows)["loss"], expected)
    assert torch.equal(loss(windows)["loss"], expected)


def test_the_value_estimator_is_its_own():
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
        ({"gamma": 1.5}, "gamma must be from 0 to 1"),
        ({"eta": -0.1}, "eta must be from 0 to 1"),
        ({"delay_value": False}, "delay_value=True"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        R2D2Loss(make_network(), **arguments)


def test_batches_that_cannot_be_learned_from_are_refused():
    loss = make_loss(make_network(0), make_network(1))
    with pytest.raises(ValueError, match=r"takes windows \[\*, T\].*slice_len"):
        loss(make_windows().reshape(-1))
    with pytest.raises(ValueError, match="burn_in=4 leaves nothing of sequences of 4 steps"):
        loss(make_windows()[:, :4])
    with pytest.raises(ValueError, match="no recurrent module"):
        R2D2Loss(make_network()[1])


@pytest.mark.parametrize(
    ("eps", "values"),
    [
        (1e-2, {1.0: 0.424214, 100.0: 10.049876, 1000.0: 40.638584}),
        (1e-3, {1.0: 0.415214, 100.0: 9.149876, 1000.0: 31.638584}),
    ],
)
def test_rescaling_has_the_papers_values(eps, values):
    for x, y in values.items():
        for sign in (1, -1):
            found = value_rescale(torch.tensor(sign * x, dtype=F64), eps).item()
            assert found == pytest.approx(sign * y, abs=5e-7)


@pytest.mark.parametrize("eps", [1e-2, 1e-3])
def test_rescaling_is_undone_without_cancellation(eps):
    x = torch.logspace(-8, 6, 200)
    x = torch.cat([-x, torch.zeros(1), x])
    back = value_rescale_inverse(value_rescale(x, eps), eps)
    assert back[200] == 0
    error = ((back - x).abs() / x.abs()).nan_to_num(0)
    assert error.max() < 1e-6
    exact = torch.tensor([rescale(v, eps) for v in x.tolist()], dtype=F64)
    assert_equal(value_rescale(x.double(), eps), exact, F64)


def test_rescaling_needs_a_slope():
    for function in (value_rescale, value_rescale_inverse):
        with pytest.raises(ValueError, match="eps must be > 0"):
            function(torch.zeros(1), 0.0)
