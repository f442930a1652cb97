"""The environments of `make results` follow their descriptions."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import benchmarks.tasks  # registers the environments

RIGHT, UP, LEFT, DOWN = range(4)


def play(
    env: Any, actions: list[int], seed: int = 0
) -> tuple[list[list[float]], list[float], bool]:
    """Play actions from a reset; return observations, rewards, and whether the episode ended."""
    first, _ = env.reset(seed=seed)
    observations, rewards, done = [first.tolist()], [], False
    for action in actions:
        assert not done
        observation, reward, done, _, _ = env.step(np.int64(action))
        observations.append(observation.tolist())
        rewards.append(reward)
    return observations, rewards, done


@pytest.mark.parametrize("name", ["PassiveTMaze-v0", "TwoGoals-v0", "MemoryChain-v0"])
def test_tasks_of_results_pass_gymnasiums_checker(name: str) -> None:
    check_env(gym.make(name).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("seed", range(4))
def test_passive_t_maze_shortest_path_returns_one_at_the_shown_side(seed: int) -> None:
    env = gym.make("PassiveTMaze-v0", length=3)
    (first, *rest), _, _ = play(env, [RIGHT] * 3, seed)
    assert abs(first[1]) == 1
    assert rest == [[0, 0], [0, 0], [1, 0]]  # the cue is gone, and positions look the same
    right, wrong = (UP, DOWN) if first[1] == 1 else (DOWN, UP)
    for turn, last in ((right, 1.0), (wrong, 0.0)):
        _, rewards, done = play(env, [RIGHT] * 3 + [turn], seed)
        assert rewards == [0, 0, 0, last] and done


def test_passive_t_maze_steps_off_the_shortest_path_cost_their_share() -> None:
    env = gym.make("PassiveTMaze-v0", length=4)
    observations, rewards, done = play(env, [UP, LEFT, RIGHT, RIGHT, RIGHT])
    assert observations[1:] == [[0, 0]] * 5
    assert rewards == [-0.25] * 4 + [0.0] and done  # walls let nobody through; no goal, no reward


def test_passive_t_maze_show_penalty_appends_the_sign_of_the_last_reward() -> None:
    env = gym.make("PassiveTMaze-v0", length=4, show_penalty=True)
    assert env.observation_space.shape == (3,)
    observations, rewards, _ = play(env, [RIGHT, UP, RIGHT, RIGHT, RIGHT])
    assert [shown[2] for shown in observations] == [0, *np.sign(rewards)] == [0, 0, -1, -1, -1, 0]
    assert abs(observations[0][1]) == 1  # the cue stays where it was


def test_two_goals_the_agent_moves_once_the_ends_are_hidden() -> None:
    observations, rewards, done = play(gym.make("TwoGoals-v0"), [0, 1, 0, 1, 0])
    shown = [abs(left) for left, _, _ in observations]
    assert shown == [1, 1, 1, 0, 0, 0] and not done
    assert rewards == pytest.approx([0, 0, -0.1, -0.1, -0.1])
    places = [place for _, place, _ in observations]
    assert np.diff(places) == pytest.approx([0, 0, -0.2, 0.2, -0.2])


def test_two_goals_shown_counts_the_observations_with_the_ends() -> None:
    observations, _, _ = play(gym.make("TwoGoals-v0", shown=1), [0, 1, 0])
    assert [abs(left) for left, _, _ in observations] == [1, 0, 0, 0]


@pytest.mark.parametrize("action", [0, 1])
def test_two_goals_the_shown_end_is_rewarded(action: int) -> None:
    env = gym.make("TwoGoals-v0")
    for seed in range(4):
        (left, place, right), _ = env.reset(seed=seed)
        steps = 2 + round((1 + place if action == 0 else 1 - place) / 0.2)
        _, rewards, done = play(env, [action] * steps, seed)
        good = (left if action == 0 else right) == 1
        assert done and rewards[-1] == pytest.approx(1.6 if good else -1.6)


@pytest.mark.parametrize("seed", range(3))
def test_memory_chain_rewards_the_sign_of_the_first_two_observations(seed: int) -> None:
    env = gym.make("MemoryChain-v0", length=4)
    (first, *rest), _, _ = play(env, [0], seed)
    sign = first[2]
    assert abs(sign) == 1 and rest == [first]
    for action, reward in ((sign > 0, 1), (sign < 0, -1)):
        observations, rewards, done = play(env, [1, 0, 1, 0, int(action)], seed)
        assert observations[2:] == [[left, 0, 0] for left in (0.75, 0.5, 0.25, 0.0)]
        assert rewards == [0, 0, 0, 0, reward] and done


class TwoSquares(gym.Env[dict[str, Any], np.int64]):
    """A view of two squares, with kinds 2 and 10, as MiniGrid shows them."""

    observation_space = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (1, 2, 3), np.uint8)})
    action_space = gym.spaces.Discrete(7)

    def reset(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"image": np.array([[[2, 5, 1], [10, 0, 3]]], np.uint8)}, {}


def test_show_object_types_shows_the_kind_on_each_square_and_keeps_three_actions() -> None:
    env = benchmarks.tasks.ShowObjectTypes(TwoSquares())
    observation, _ = env.reset()
    assert np.flatnonzero(observation).tolist() == [2, 11 + 10]
    assert env.observation_space.contains(observation)
    assert env.action_space == gym.spaces.Discrete(3)


def test_show_last_step_appends_the_action_and_a_tenth_of_the_reward() -> None:
    env = benchmarks.tasks.ShowLastStep(gym.make("Pendulum-v1"))
    first, _ = env.reset(seed=0)
    plain = gym.make("Pendulum-v1")
    expected, _ = plain.reset(seed=0)
    assert first.tolist() == [*expected.tolist(), 0, 0]
    action = np.array([1.5], np.float32)
    observation, reward, *_ = env.step(action)
    expected, wanted, *_ = plain.step(action)
    assert float(reward) == float(wanted) < 0
    assert observation[:4].tolist() == [*expected.tolist(), 1.5]
    assert observation[4] == pytest.approx(0.1 * float(reward))
    assert env.observation_space.contains(observation)


def test_draw_seed_episodes_are_those_of_few_seeds_in_the_order_of_its_own_seed() -> None:
    def starts(env: Any, seed: int) -> list[float]:
        first, _ = env.reset(seed=seed)
        return [float(one[1]) for one in (first, *(env.reset()[0] for _ in range(40)))]

    plain = gym.make("TwoGoals-v0")
    few = {float(plain.reset(seed=seed)[0][1]) for seed in range(3)}
    env = benchmarks.tasks.DrawSeed(plain, count=3)
    assert set(starts(env, 7)) == few
    assert starts(env, 7) == starts(env, 7) != starts(env, 8)
