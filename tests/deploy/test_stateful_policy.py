"""A policy with its own memory acts as sequences say, in loops that know nothing of TensorDicts."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import OneHot

from rnnkeys import LSTMModule, StatefulPolicy, drqn_policy
from tests.support.recurrent import chain, recurrently
from tests.support.tolerances import assert_equal, relative_error

KINDS = ("lstm", "gru", "lstm_ln")


def make_policy(kind: str = "gru") -> Any:
    return drqn_policy(OneHot(2), (4,), cell=kind, hidden_size=8, num_layers=2)


def _values(policy: Any, observations: Any, starts: Any) -> torch.Tensor:
    """What sequences ``[B, T]`` say, with episodes that start where they start."""
    data = TensorDict(
        {
            "observation": torch.as_tensor(observations),
            "is_init": torch.as_tensor(starts)[..., None],
        },
        torch.as_tensor(starts).shape,
    )
    return recurrently(policy, data)["action_value"]


def _values_player(policy: Any, *arguments: Any, **keywords: Any) -> StatefulPolicy:
    return StatefulPolicy(policy, *arguments, action_key="action_value", **keywords)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["same_step", "next_step"])
def test_vector_environments_restart_where_episodes_do(kind, mode):
    """Real environments in both of Gymnasium's modes, with episodes that are told by their time."""
    # In float64: layer normalisation makes rounding of a small state as large as the state.
    policy, n = make_policy(kind).double(), 3
    envs = gym.make_vec(
        "CartPole-v1",
        n,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode[mode.upper()]},
    )
    player = _values_player(policy, n, autoreset=mode)
    observation, _ = envs.reset(seed=0)
    envs.action_space.seed(0)
    seen, values, starts, first = [], [], [], np.ones(n, dtype=bool)
    pending = np.zeros(n, dtype=bool)
    for _ in range(80):
        seen.append(observation.astype(np.float64))
        starts.append(first)
        values.append(torch.as_tensor(player(seen[-1])))
        observation, _, terminated, truncated, _ = envs.step(envs.action_space.sample())
        done = terminated | truncated
        player.episode_over(done)
        first, pending = (done, pending) if mode == "same_step" else (pending, done)
    envs.close()
    marks = np.stack(starts, 1)
    assert marks[:, 1:].any(1).all()
    expected = _values(policy, np.stack(seen, 1), marks)
    assert relative_error(torch.stack(values, 1), expected) < 1e-9


def test_environments_may_be_called_in_any_order_and_number():
    policy = make_policy()
    player = _values_player(policy, 4)
    x = torch.randn(4, 6, 4)
    starts = torch.zeros(4, 6, dtype=torch.bool)
    expected = _values(policy, x, starts)
    when = [0, 0, 0, 0]
    for ids in ([2, 0], [3], [0, 1, 2, 3], [1], [3, 2, 1], [0, 3]):
        out = player(torch.stack([x[i, when[i]] for i in ids]), ids)
        for row, i in zip(out, ids, strict=True):
            assert_equal(row, expected[i, when[i]], torch.float32)
            when[i] += 1


def test_a_reset_is_for_some_or_all_by_number_or_mask():
    policy = make_policy()
    x = torch.randn(3, 4)
    first = _values_player(policy, 3)(x)
    for ids, fresh in (
        (None, [0, 1, 2]),
        ([1], [1]),
        (1, [1]),
        ([True, False, True], [0, 2]),
        (np.array([False, True, False]), [1]),
        (torch.tensor([2, 0]), [0, 2]),
    ):
        player = _values_player(policy, 3)
        player(x)
        player.reset(ids)
        again = player(x)
        same = [i for i in range(3) if torch.allclose(again[i], first[i])]
        assert same == fresh


def test_states_can_be_read_kept_and_given_back():
    policy = make_policy("lstm")
    player = _values_player(policy, 3)
    x = torch.randn(3, 4)
    player(x)
    held = player.state()
    second, previous = player(x, save_prev_state=True)
    for key, value in held.items():
        assert torch.equal(previous[key], value) and not value.requires_grad
    player(x)
    player.reset(state=held)
    assert torch.equal(player(x), second)
    player.reset([2, 0], state=held[[2, 0]])
    again = player(x)
    assert torch.equal(again[0], second[0]) and torch.equal(again[2], second[2])
    assert not torch.equal(again[1], second[1])
    copy = player.state([1])
    copy["recurrent_state_h"].zero_()
    assert player.state([1])["recurrent_state_h"].any()


def test_only_valid_ids_are_written_back():
    player = _values_player(make_policy(), 3)
    x = torch.randn(2, 4)
    player(x, [0, 2], valid_ids=[2])
    states = player.state()["recurrent_state"]
    assert not states[0].any() and not states[1].any() and states[2].any()
    fresh = _values_player(make_policy(), 1)
    assert fresh.state()["recurrent_state"].shape == (1, 2, 8)


def test_arrays_give_arrays_and_tensors_tensors():
    spec = OneHot(2)
    policy = make_policy()
    player = StatefulPolicy(policy, 2, action_spec=spec)
    actions = player(np.zeros((2, 4)))  # doubles, too
    assert isinstance(actions, np.ndarray) and actions.shape == (2,)
    assert isinstance(player(torch.zeros(2, 4)), torch.Tensor)
    assert StatefulPolicy(policy, 2)(np.zeros((2, 4))).shape == (2, 2)
    one = StatefulPolicy(policy, action_spec=spec)
    assert one(np.zeros(4)).shape == () and one(np.zeros((1, 4))).shape == (1,)
    mapping = StatefulPolicy(policy, 2, action_spec=spec)
    assert mapping({"observation": np.zeros((2, 4))}).shape == (2,)


def test_nested_keys_and_agents():
    module = LSTMModule(
        4,
        8,
        in_keys=[("agents", "observation"), ("agents", "h"), ("agents", "c")],
        out_keys=[("agents", "embed"), ("next", "agents", "h"), ("next", "agents", "c")],
    )
    head = TensorDictModule(nn.Linear(8, 2), [("agents", "embed")], [("agents", "action")])
    policy = chain(module, head)
    keys: Any = {"observation_key": ("agents", "observation"), "action_key": ("agents", "action")}
    player = StatefulPolicy(policy, 3, **keys)
    x = torch.randn(3, 2, 5, 4)  # three environments, two steps, five agents
    data = TensorDict({}, [3, 2])
    data["agents", "observation"] = x
    data["is_init"] = torch.zeros(3, 2, 1, dtype=torch.bool)
    expected = recurrently(policy, data)["agents", "action"]
    for t in range(2):
        assert_equal(player(x[:, t]), expected[:, t], torch.float32)
    held = player.state()
    assert held["agents", "h"].shape == (3, 5, 1, 8)
    other = StatefulPolicy(policy, 3, **keys)
    other.reset(state=held)
    assert torch.equal(other(x[:, 0]), player(x[:, 0]))


def test_no_gradient_is_kept():
    player = _values_player(make_policy(), 2)
    assert not player(torch.zeros(2, 4, requires_grad=True)).requires_grad
    assert not player.state()["recurrent_state"].requires_grad


def test_a_plain_loop_plays_an_episode():
    env = gym.make("CartPole-v1")
    player = StatefulPolicy(make_policy(), action_spec=OneHot(2))
    observation, _ = env.reset(seed=0)
    for _ in range(5):
        observation, *_ = env.step(int(player(observation)))
    env.close()


WRONG: dict[str, tuple[Any, str]] = {
    "unknown ids": (lambda p: p(torch.zeros(2, 4), [0, 3]), r"ids \[3\] are unknown.*0 to 2"),
    "a negative id": (lambda p: p.reset([-1]), r"ids \[-1\] are unknown"),
    "ids between two": (lambda p: p(torch.zeros(1, 4), [0.5]), r"ids must be ints.*\[0.5\]"),
    "an id twice": (lambda p: p(torch.zeros(2, 4), [1, 1]), r"each environment once. Got \[1, 1\]"),
    "too few observations": (lambda p: p(torch.zeros(2, 4)), r"\(2, 4\); expected 3 first"),
    "a short mask": (lambda p: p.reset([True, False]), "a mask of 2; expected one entry for each"),
    "valid ids that were not called": (
        lambda p: p(torch.zeros(1, 4), [0], valid_ids=[1]),
        r"valid_ids \[1\] are not among ids \[0\]",
    ),
    "states of another number": (lambda p: p.reset([0], state=p.state()), "of 1 environments"),
    "a missing state": (lambda p: p.reset(state={}), "Got nothing"),
    "a state of another size": (
        lambda p: p.reset(state={"recurrent_state": torch.zeros(3, 1, 8)}),
        r"expected \(3, 2, 8\)",
    ),
    "done of another number": (lambda p: p.episode_over([True]), "Got 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_misuse_is_named(case):
    call, text = WRONG[case]
    with pytest.raises(ValueError, match=text):
        call(StatefulPolicy(make_policy(), 3))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="num_envs"):
        StatefulPolicy(make_policy(), 0)
    with pytest.raises(ValueError, match="autoreset must be one of"):
        StatefulPolicy(make_policy(), autoreset="never")
    with pytest.raises(ValueError, match="no recurrent module"):
        StatefulPolicy(TensorDictModule(nn.Linear(1, 1), ["a"], ["b"]))
