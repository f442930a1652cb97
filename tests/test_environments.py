"""Environments of Gymnasium as vectors and images, whatever their own spaces are."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from torchrl.envs.utils import check_env_specs

from rnnkeys.environments import EnvError, make_gym_env, make_simple_env
from tests.support.absent import import_without
from tests.support.odd_environments import (
    ACTIONS,
    OBSERVATIONS,
    SpacesEnv,
    action_id,
    masked_id,
    observation_id,
)


def play(name: str, steps: int = 45, num_envs: int = 2, **options: Any) -> TensorDictBase:
    env = make_gym_env(name, num_envs, **options)
    env.set_seed(0)
    rollout = env.rollout(steps, break_when_any_done=False)
    env.close()
    return rollout


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_make_gym_env_any_observation_is_vector_or_image(name: str) -> None:
    space, shape = OBSERVATIONS[name]
    seen = play(observation_id(name))["observation"]
    assert seen.shape == (2, 45, *shape)
    assert seen.dtype == (torch.uint8 if len(shape) == 3 else torch.float32)
    assert seen.float().std() > 0
    if seen.dtype == torch.float32:
        assert seen.abs().max() <= 1  # integers too


@pytest.mark.parametrize("name", ACTIONS)
def test_make_gym_env_any_action_is_one_of_the_environment(name: str) -> None:
    space, shape = ACTIONS[name]
    rollout = play(action_id(name))  # the environment raises at any other action
    assert rollout["action"].shape == (2, 45, *shape)
    assert rollout["next", "done"].sum() == 2 * 2


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Choices", 6),
        ("ChoicesFrom1", 6),
        ("ChoicesMatrix", 12),
        ("Binary", 8),
        ("BinaryMatrix", 16),
    ],
)
def test_make_simple_env_every_discrete_action_can_be_played(name: str, count: int) -> None:
    env = make_simple_env(action_id(name))
    env.reset()
    env.action_space.seed(0)
    inner: Any = env.unwrapped
    for _ in range(400):
        env.step(env.action_space.sample())
    assert isinstance(inner, SpacesEnv)
    assert len(inner.played) == count


def test_make_simple_env_shifted_choice_keeps_its_order() -> None:
    env = make_simple_env(action_id("ChoiceFromMinus1"))
    env.reset()
    env.step(np.array([2]))
    inner: Any = env.unwrapped
    assert inner.played == {(1,)}


def test_make_simple_env_action_beyond_bounds_is_clipped() -> None:
    env = make_simple_env(action_id("BoxBoundedBelow"))
    env.reset()
    env.step(np.array([-3.0, 5.0], np.float32))  # the environment raises at -3


def test_make_simple_env_image_keeps_its_pixels() -> None:
    last = make_simple_env(observation_id("Image"))
    space: Any = OBSERVATIONS["Image"][0]
    space.seed(3)
    want = space.sample()
    seen, _ = last.reset(seed=3)
    np.testing.assert_array_equal(seen, want.transpose(2, 0, 1))


def test_make_simple_env_hide_and_scale_select_entries() -> None:
    env, full = (
        make_simple_env("CartPole-v1", hide=(1, 3), scale=(2.0, 4.0)),
        gym.make("CartPole-v1"),
    )
    seen, _ = env.reset(seed=5)
    want, _ = full.reset(seed=5)
    np.testing.assert_allclose(seen, want[[0, 2]] * np.array([2, 4], np.float32), rtol=1e-6)


def test_make_simple_env_frame_stack_concatenates_last_observations() -> None:
    env = make_simple_env("CartPole-v1", frame_stack=3)
    first, _ = env.reset(seed=0)
    seen = env.step(np.array([1]))[0]
    np.testing.assert_array_equal(seen[:8], first[4:])
    assert not np.array_equal(seen[8:], first[8:])


def test_make_simple_env_frame_stack_of_images_joins_channels() -> None:
    env = make_simple_env(observation_id("Image"), frame_stack=2)
    assert env.observation_space.shape == (6, 64, 48)


def test_make_simple_env_wrappers_are_applied_in_order() -> None:
    wrappers = (
        "gymnasium.wrappers:RepeatAction(num_repeats=4)",
        "gymnasium.wrappers:TimeAwareObservation",
    )
    env = make_simple_env("CartPole-v1", wrappers=wrappers)
    env.reset(seed=0)
    seen, reward, *_ = env.step(np.array([0]))
    assert len(seen) == 5 and reward == 4


def test_make_simple_env_arguments_reach_the_environment() -> None:
    env = make_simple_env("FrozenLake-v1(map_name='8x8', is_slippery=False)")
    assert env.observation_space.shape == (64,)


def test_make_gym_env_pixels_are_rendered_frames() -> None:
    seen = play("CartPole-v1", steps=3, pixels=True)["observation"]
    assert seen.shape == (2, 3, 1, 84, 84) and seen.dtype == torch.uint8
    assert seen.float().std() > 0


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_make_gym_env_specs_match_data(vectorization: Any) -> None:
    env = make_gym_env("CartPole-v1", 2, vectorization=vectorization)
    check_env_specs(env)
    env.close()


def test_make_gym_env_keeps_last_observation_of_an_episode() -> None:
    rollout = play("CartPole-v1", steps=60)
    done = rollout["next", "done"][:, :-1, 0]
    following = rollout["observation"][:, 1:]
    last = rollout["next", "observation"][:, :-1]
    assert done.any()
    assert torch.equal(following[~done], last[~done])
    assert (following[done] != last[done]).any(-1).all()


@pytest.mark.parametrize("options", ["", "(sutton_barto_reward=True)"])
def test_make_simple_env_class_needs_no_id(options: str) -> None:
    env = make_simple_env(f"gymnasium.envs.classic_control:CartPoleEnv{options}")
    env.reset(seed=0)
    assert env.step(env.action_space.sample())[1] == (0.0 if options else 1.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Nowhere-v0", {}, "environment Nowhere-v0 cannot be made: NameNotFound"),
        ("CartPole-v1(4", {}, "environment CartPole-v1(4 cannot be made: SyntaxError"),
        ("nowhere:Nowhere-v0", {}, "ModuleNotFoundError: No module named 'nowhere'"),
        ("CartPole-v1(wheels=4)", {}, "unexpected keyword argument 'wheels'"),
        (
            "CartPole-v1",
            {"wrappers": ("gymnasium.wrappers:Gone",)},
            "wrapper gymnasium.wrappers:Gone",
        ),
        (
            "CartPole-v1",
            {"wrappers": ("gymnasium.wrappers:RepeatAction(",)},
            "module:Class(name=value)",
        ),
        (
            "CartPole-v1",
            {"hide": (4,)},
            "hide is (4,): expected some of the entries 0 to 3 of CartPole",
        ),
        ("CartPole-v1", {"hide": (0, 1, 2, 3)}, "and not all"),
        ("CartPole-v1", {"scale": (1.0, 2.0)}, "one for each of the 4 entries"),
        (observation_id("Image"), {"hide": (0,)}, "hide is (0,), but"),
        ("OddSequence-v0", {}, "OddSequence-v0 has the observation space Sequence"),
        ("OddActionText-v0", {}, "OddActionText-v0 has the action space Text"),
    ],
)
def test_make_simple_env_bad_argument_raises_in_one_line(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EnvError) as error:
        make_simple_env(name, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OddNaN-v0", "entry 1 of an observation of OddNaN-v0 is nan: expected a finite number"),
        ("OddNaNReward-v0", "a reward of OddNaNReward-v0 is nan: expected a finite number"),
    ],
)
def test_make_gym_env_value_that_is_not_finite_raises(name: str, message: str) -> None:
    play(name, steps=12)
    with pytest.raises(EnvError, match=message):
        play(name, steps=13)


@pytest.mark.parametrize(("name", "count"), [("Choice", 2), ("ChoiceFromMinus1", 3)])
def test_make_gym_env_discrete_actions_are_one_hot_from_the_first(name: str, count: int) -> None:
    actions = play(action_id(name), discrete_actions=True)["action"]
    assert actions.shape == (2, 45, count)
    assert (actions.sum((0, 1)) > 0).all() and (actions.sum(-1) == 1).all()


@pytest.mark.parametrize("name", ["Binary", "ChoicesMatrix"])
def test_make_gym_env_discrete_actions_of_another_space_raise(name: str) -> None:
    space = type(ACTIONS[name][0]).__name__
    with pytest.raises(EnvError, match=rf"action space {space}\(.*\): expected Discrete"):
        make_gym_env(action_id(name), discrete_actions=True)


@pytest.mark.parametrize(
    ("name", "keys"), [("OddActionDict-v0", ["move", "tool"]), ("OddActionTuple-v0", ["0", "1"])]
)
def test_make_gym_env_several_actions_are_nested_entries(name: str, keys: list[str]) -> None:
    env = make_gym_env(name, 3)
    check_env_specs(env)
    played = env.rollout(40, break_when_any_done=False)["action"]  # it raises at other actions
    assert list(played.keys()) == keys
    assert played[keys[0]].shape == (3, 40, 2) and played[keys[0]].dtype == torch.float32
    assert played[keys[1]].shape == (3, 40, 1) and played[keys[1]].unique().tolist() == [0, 1, 2]


def test_make_gym_env_several_actions_reach_their_own_parts() -> None:
    seen: list[Any] = []

    class Watched(gym.Wrapper):
        def step(self, action: Any) -> Any:
            seen.append(action)
            return super().step(action)

    gym.register("OddWatched-v0", lambda **_: Watched(gym.make("OddActionDict-v0")))
    env = make_gym_env("OddWatched-v0", 1)
    step = env.rand_action(env.reset())
    env.step(step)
    assert torch.equal(torch.as_tensor(seen[0]["move"]), step["action", "move"][0])
    assert seen[0]["tool"] == step["action", "tool"].item() + 1  # tools count from 1


INFO = ("rnnkeys.gym_masks:InfoActionMask",)


@pytest.mark.parametrize("where", ["entry", "method", "info"])
def test_make_gym_env_random_actions_are_those_that_the_mask_allows(where: str) -> None:
    wrappers = INFO if where == "info" else ()
    env = make_gym_env(masked_id(where, "Choice"), 2, wrappers=wrappers, discrete_actions=True)
    rollout = env.rollout(45, break_when_any_done=False)  # the environment raises at any other
    allowed = rollout["action_mask"]
    assert rollout["observation"].shape == (2, 45, 3)
    assert allowed.dtype == torch.bool and not allowed.all()
    assert (allowed & rollout["action"].bool()).any(-1).all()
    assert not rollout["next", "action_mask"][rollout["next", "done"].squeeze(-1)].any()


def test_make_gym_env_mask_of_several_choices_lies_end_to_end() -> None:
    env = make_gym_env(masked_id("method", "Choices"), 2)
    step = env.reset()
    assert step["action_mask"].shape == (2, 5)
    assert step["action_mask"][:, :2].any(-1).all() and step["action_mask"][:, 2:].any(-1).all()


def test_make_gym_env_mask_with_specs_matches_data() -> None:
    check_env_specs(make_gym_env(masked_id("entry", "Choice"), 2, discrete_actions=True))


def test_make_simple_env_mask_beside_stacked_frames_is_that_of_the_last() -> None:
    env = make_simple_env(masked_id("entry", "Choice"), frame_stack=2)
    observation, _ = env.reset(seed=0)
    inner: Any = env.unwrapped
    assert observation["observation"].shape == (6,)
    assert (observation["action_mask"] == inner.mask).all()


def test_make_simple_env_mask_of_continuous_actions_raises() -> None:
    wrapper = "tests.support.odd_environments:AlwaysMasked"
    with pytest.raises(EnvError, match="action mask needs discrete actions.*Box"):
        make_simple_env(action_id("Box"), wrappers=(wrapper,))


def test_make_simple_env_mask_of_a_wrong_size_raises() -> None:
    wrapper = "tests.support.odd_environments:AlwaysMasked"
    env = make_simple_env(action_id("Choice"), wrappers=(wrapper,))
    with pytest.raises(EnvError, match=r"one flag for each of the 2 choices.*Got 3"):
        env.reset()


def test_environments_without_gymnasium_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"needs gymnasium: pip install 'rnnkeys\[tutorials\]'"):
        import_without(monkeypatch, "gymnasium", "rnnkeys.environments")
