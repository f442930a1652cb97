"""``StatefulPolicy`` acts in plain loops as sequences compute."""

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
AGENT_KEYS: Any = {
    "observation_key": ("agents", "observation"),
    "action_key": ("agents", "action"),
}


def make_policy(kind: str = "gru") -> Any:
    return drqn_policy(OneHot(2), (4,), cell=kind, hidden_size=8, num_layers=2)


def make_agents_policy() -> Any:
    module = LSTMModule(
        4,
        8,
        in_keys=[("agents", "observation"), ("agents", "h"), ("agents", "c")],
        out_keys=[("agents", "embed"), ("next", "agents", "h"), ("next", "agents", "c")],
    )
    head = TensorDictModule(nn.Linear(8, 2), [("agents", "embed")], [("agents", "action")])
    return chain(module, head)


def make_player(policy: Any, *arguments: Any, **keywords: Any) -> StatefulPolicy:
    return StatefulPolicy(policy, *arguments, action_key="action_value", **keywords)


def make_envs(mode: str, number: int = 3) -> Any:
    return gym.make_vec(
        "CartPole-v1",
        number,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode[mode.upper()]},
    )


def _values(policy: Any, observations: Any, starts: Any) -> torch.Tensor:
    """Compute values by sequences ``[B, T]`` with these episode starts."""
    data = TensorDict(
        {
            "observation": torch.as_tensor(observations),
            "is_init": torch.as_tensor(starts)[..., None],
        },
        torch.as_tensor(starts).shape,
    )
    return recurrently(policy, data)["action_value"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["same_step", "next_step"])
def test_episode_over_in_vector_environments_equals_sequences(kind, mode):
    # In float64: layer normalization makes rounding of a small state as large as the state.
    policy, n = make_policy(kind).double(), 3
    envs = make_envs(mode)
    player = make_player(policy, env=envs)
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
    flags = np.stack(starts, 1)
    assert flags[:, 1:].any(1).all()
    expected = _values(policy, np.stack(seen, 1), flags)
    assert relative_error(torch.stack(values, 1), expected) < 1e-9


def test_env_gives_number_and_autoreset_mode():
    for mode in ("same_step", "next_step", "disabled"):
        envs = make_envs(mode, 2)
        player = StatefulPolicy(make_policy(), env=envs)
        assert (player.num_envs, player.autoreset) == (2, mode)
        with pytest.raises(ValueError, match="num_envs=3 contradicts env=, which has 2"):
            StatefulPolicy(make_policy(), 3, env=envs)
        other = "disabled" if mode != "disabled" else "next_step"
        with pytest.raises(ValueError, match=f"autoreset={other!r} contradicts env="):
            StatefulPolicy(make_policy(), env=envs, autoreset=other)
        envs.close()


def test_env_that_is_single_is_played_without_a_batch_dimension():
    env = gym.make("CartPole-v1")
    player = StatefulPolicy(make_policy(), env=env, action_spec=OneHot(2))
    assert (player.num_envs, player.autoreset) == (1, "disabled")
    observation, _ = env.reset(seed=0)
    for _ in range(5):
        observation, _, terminated, truncated, _ = env.step(int(player(observation)))
        player.episode_over(terminated or truncated)
    env.close()


def test_episode_over_without_autoreset_mode_is_rejected_for_vectors_only():
    player = make_player(make_policy(), 2)
    player(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="pass env= or autoreset=.*'next_step'"):
        player.episode_over([False, True])
    single = make_player(make_policy())
    single(torch.ones(4))
    assert single.state()["recurrent_state"].any()
    single.episode_over(True)
    assert not single.state()["recurrent_state"].any()


def test_call_with_ids_in_any_order_equals_sequences():
    policy = make_policy()
    player = make_player(policy, 4)
    x = torch.randn(4, 6, 4)
    starts = torch.zeros(4, 6, dtype=torch.bool)
    expected = _values(policy, x, starts)
    when = [0, 0, 0, 0]
    for ids in ([2, 0], [3], [0, 1, 2, 3], [1], [3, 2, 1], [0, 3]):
        out = player(torch.stack([x[i, when[i]] for i in ids]), ids)
        for row, i in zip(out, ids, strict=True):
            assert_equal(row, expected[i, when[i]], torch.float32)
            when[i] += 1


def test_ids_that_join_and_leave_keep_the_states_of_others():
    policy = make_policy()
    player = make_player(policy, 2)
    x = torch.randn(20, 3, 4)
    expected = _values(policy, x, torch.zeros(20, 3, dtype=torch.bool))
    names = [f"client {i}" for i in range(20)]
    for name, one in zip(names, x, strict=True):
        player(one[:1], ids=[name])
    for i in (3, 7, 11):
        player.remove(names[i])
    # Rows of ids that left are used again, from initial states.
    for i in (5, 19, 3):
        out = player(x[i, :1] if i == 3 else x[i, 1:2], ids=names[i])
        assert_equal(out[0], expected[i, 0 if i == 3 else 1], torch.float32)
    assert player.ids[:3] == [0, 1, "client 0"] and names[7] not in player.ids
    player(x[:1, 0], ids=[2])
    assert 2 in player.ids


def test_id_of_a_rejected_call_does_not_join():
    player = make_player(make_policy(), 2)
    for observation in (torch.full((1, 4), float("nan")), torch.zeros(1, 5)):
        with pytest.raises((ValueError, RuntimeError)):
            player(observation, ids=["new"])
    assert player.ids == [0, 1]


def test_reset_by_number_or_mask_restarts_these_environments():
    policy = make_policy()
    x = torch.randn(3, 4)
    first = make_player(policy, 3)(x)
    for ids, restarted in (
        (None, [0, 1, 2]),
        ([1], [1]),
        (1, [1]),
        (np.int64(1), [1]),
        ([True, False, True], [0, 2]),
        (np.array([False, True, False]), [1]),
        (torch.tensor([2, 0]), [0, 2]),
    ):
        player = make_player(policy, 3)
        player(x)
        player.reset(ids)  # pyright: ignore[reportArgumentType]  (as callers without types may)
        again = player(x)
        same = [i for i in range(3) if torch.allclose(again[i], first[i])]
        assert same == restarted


def test_state_that_is_given_back_continues_from_there():
    policy = make_policy("lstm")
    player = make_player(policy, 3)
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


def test_valid_ids_alone_are_written_back():
    player = make_player(make_policy(), 3)
    x = torch.randn(2, 4)
    player(x, [0, 2], valid_ids=[2])
    states = player.state()["recurrent_state"]
    assert not states[0].any() and not states[1].any() and states[2].any()
    fresh = make_player(make_policy(), 1)
    assert fresh.state()["recurrent_state"].shape == (1, 2, 8)


def test_call_with_arrays_returns_arrays_and_with_tensors_tensors():
    spec = OneHot(2)
    policy = make_policy()
    player = StatefulPolicy(policy, 2, action_spec=spec)
    actions = player(np.zeros((2, 4)))  # doubles, too
    assert isinstance(actions, np.ndarray) and actions.shape == (2,)
    assert isinstance(player(torch.zeros(2, 4)), torch.Tensor)
    assert StatefulPolicy(policy, 2)(np.zeros((2, 4))).shape == (2, 2)
    int_of_numpy: Any = np.int64(2)
    mapping = StatefulPolicy(policy, int_of_numpy, action_spec=spec)
    assert mapping({"observation": np.zeros((2, 4))}).shape == (2,)


def test_single_environment_plays_with_or_without_a_batch_dimension():
    one = StatefulPolicy(make_policy(), action_spec=OneHot(2))
    assert one(np.zeros(4)).shape == ()
    assert one(np.zeros((1, 4))).shape == (1,)
    assert one(np.zeros(4)).shape == ()


def test_single_environment_of_frames_equals_one_of_a_vector():
    policy = drqn_policy(OneHot(3), (1, 44, 40), hidden_size=8)
    frames = np.random.default_rng(0).integers(0, 255, (3, 1, 44, 40)).astype(np.uint8)
    one, two = make_player(policy), make_player(policy, 2)
    for frame in frames:
        got, expected = one(frame), two(np.stack([frame, frame]))[0]
        assert got.shape == expected.shape == (3,)
        assert_equal(torch.as_tensor(got), torch.as_tensor(expected), torch.float32)


def test_call_of_a_wrong_shape_changes_nothing():
    policy = make_policy()
    player, expected = make_player(policy), make_player(policy)
    for wrong in (torch.zeros(1, 5), torch.zeros(5), torch.zeros(1, 2, 5), torch.zeros(1, 84, 84)):
        with pytest.raises((RuntimeError, ValueError)):
            player(wrong)
    x = torch.randn(4)
    assert torch.equal(player(x), expected(x))


def test_reset_of_all_admits_another_number_of_agents():
    player = make_player(make_policy())
    player(torch.zeros(3, 4))  # one environment of three agents
    with pytest.raises(ValueError, match=r"had \(3, 4\).*reset\(\).* has shape \(1, 3, 2, 8\)"):
        player(torch.zeros(4))
    player.reset()
    assert player(torch.zeros(4)).shape == (2,)


def test_agents_equal_sequences_and_states_can_be_given_back():
    policy = make_agents_policy()
    player = StatefulPolicy(policy, 3, **AGENT_KEYS)
    x = torch.randn(3, 2, 5, 4)  # three environments, two steps, five agents
    data = TensorDict({}, [3, 2])
    data["agents", "observation"] = x
    data["is_init"] = torch.zeros(3, 2, 1, dtype=torch.bool)
    expected = recurrently(policy, data)["agents", "action"]
    for t in range(2):
        assert_equal(player(x[:, t]), expected[:, t], torch.float32)
    held = player.state()
    assert held["agents", "h"].shape == (3, 5, 1, 8)
    other = StatefulPolicy(policy, 3, **AGENT_KEYS)
    other.reset(state=held)
    assert torch.equal(other(x[:, 0]), player(x[:, 0]))


@pytest.mark.parametrize("way", ["reset", "episode_over"])
def test_agents_that_end_are_restarted_apart_from_others(way):
    policy = make_agents_policy()
    player = StatefulPolicy(policy, 2, autoreset="next_step", **AGENT_KEYS)
    first, second = torch.randn(2, 2, 5, 4)
    fresh = StatefulPolicy(policy, 2, **AGENT_KEYS)(second)
    player(first)
    before = player.state()
    goes_on = player(second)
    player.reset(state=before)
    over = torch.rand(2, 5) < 0.5
    over[0, 0], over[0, 1] = True, False
    if way == "reset":
        player.reset(agents=over)
    else:
        player.episode_over(over)
        player.episode_over(torch.zeros(2, 5, 1))
    out = player(second)
    assert_equal(out, torch.where(over[..., None], fresh, goes_on), torch.float32)
    with pytest.raises(ValueError, match=r"agents \[\(5,\)\].*Got \[2, 4\]"):
        player.reset(agents=torch.zeros(2, 4, dtype=torch.bool))


def test_state_carries_no_gradient():
    player = make_player(make_policy(), 2)
    assert not player(torch.zeros(2, 4, requires_grad=True)).requires_grad
    assert not player.state()["recurrent_state"].requires_grad


def test_observation_that_is_nan_is_rejected_and_states_are_kept():
    player = make_player(make_policy(), 3)
    x = torch.randn(3, 4)
    player(x)
    held = player.state()
    bad = x.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"ids \[1\].*observation \['observation'\]"):
        player(bad)
    assert (player.state() == held).all()
    with torch.no_grad():
        next(player.policy.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"ids \[0, 1, 2\].*The input is finite.*weights"):
        player(x)


def test_policy_without_action_is_rejected_with_the_keys_that_it_writes():
    player = StatefulPolicy(make_policy(), 2, action_key="move")
    with pytest.raises(KeyError, match="no action .*move.*action_key=.*action_value"):
        player(torch.zeros(2, 4))


WRONG: dict[str, tuple[Any, str]] = {
    "unknown ids": (lambda p: p.state([0, 3]), r"ids \[3\] are unknown.*\[0, 1, 2\]"),
    "a negative id": (lambda p: p.reset([-1]), r"ids must be ints of at least 0.*\[-1\]"),
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
    "a state that is NaN": (
        lambda p: p.reset(state={"recurrent_state": torch.full((3, 2, 8), float("nan"))}),
        "NaN or infinite",
    ),
    "an id that is a number": (lambda p: p.reset(1.5), r"ids must be ints.*\[1.5\]"),
    "done of other numbers": (lambda p: p.episode_over([0.5, 1, 0]), "must be bool, or 0 and 1"),
    "done of another number": (lambda p: p.episode_over([True]), r"Got \[1\]"),
    "an environment that leaves": (lambda p: p.remove([1]), r"ids \[1\] are the environments"),
}


@pytest.mark.parametrize("case", WRONG)
def test_call_with_wrong_arguments_is_rejected_by_name(case):
    call, text = WRONG[case]
    with pytest.raises(ValueError, match=text):
        call(StatefulPolicy(make_policy(), 3))


WRONG_KINDS: dict[str, tuple[Any, type[Exception], str]] = {
    "no observation": (lambda p: p(None), TypeError, "'observation' must be an array.*NoneType"),
    "texts": (lambda p: p(["a", "b", "c"]), TypeError, "'observation' must be an array"),
    "no values": (
        lambda p: p(torch.zeros(3, 4, device="meta")),
        TypeError,
        "'observation' is on the meta device",
    ),
    "observations of another size": (
        lambda p: p(torch.zeros(3, 5)),
        RuntimeError,
        r"(?si)reads 'observation' float32 \[3, 5\].*\[network-input\]",
    ),
    "observations of integers": (
        lambda p: p(torch.zeros(3, 4, dtype=torch.long)),
        RuntimeError,
        r"(?si)reads 'observation' int64 \[3, 4\].*\[network-input\]",
    ),
    "another observation": (
        lambda p: p({"position": torch.zeros(3, 4)}),
        KeyError,
        r"'observation.* \(missing\)",
    ),
    "a list of states": (lambda p: p.reset(state=[1]), TypeError, "state must be a TensorDict"),
    "agents of texts": (lambda p: p.reset(agents="a"), TypeError, "agents must be bool. Got 'a'"),
    "agents without a batch": (lambda p: p.reset(agents=True), ValueError, "agents must be bool"),
    "agents of numbers": (
        lambda p: p.reset(agents=[2, 0, 0]),
        ValueError,
        "agents must be bool.*True for each agent",
    ),
    "done of texts": (lambda p: p.episode_over(["a"]), TypeError, "done must be bool"),
}


@pytest.mark.parametrize("case", WRONG_KINDS)
def test_call_with_arguments_of_a_wrong_kind_is_rejected_by_name(case):
    call, error, text = WRONG_KINDS[case]
    player = StatefulPolicy(make_policy(), 3)
    with pytest.raises(error, match=text):
        call(player)
    assert player(torch.zeros(3, 4)).shape == (3, 2)


def test_constructor_with_wrong_arguments_is_rejected_by_name():
    with pytest.raises(ValueError, match="num_envs"):
        StatefulPolicy(make_policy(), 0)
    with pytest.raises(ValueError, match="autoreset must be one of"):
        StatefulPolicy(make_policy(), autoreset="never")
    with pytest.raises(ValueError, match="no recurrent module"):
        StatefulPolicy(TensorDictModule(nn.Linear(1, 1), ["a"], ["b"]))
