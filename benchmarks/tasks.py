"""Small environments that test memory, as environments of Gymnasium.

Importing this module registers them, so that every tutorial plays them:

    python tutorials/recurrent_ppo.py --env 'benchmarks.tasks:PassiveTMaze-v0(length=50)'
"""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class PassiveTMaze(gym.Env[np.ndarray, np.int64]):
    """Walk down a corridor, and turn at its end to the side that was shown at the start only.

    The observation is ``[1 at the junction, side]``: side is -1 or 1 at the first step, and where
    the agent stands after the junction; it is 0 everywhere else, so that positions in the corridor
    look the same. Actions are right, up, left, down; a step into a wall does nothing. An episode
    has ``length + 1`` steps, which is the number that the goal is away. Each step that leaves the
    agent behind the shortest path costs ``1 / length``; the last step is rewarded with 1 at the
    goal. Guessing at the junction returns .5 on average.

    Source: the passive T-maze of T. Ni, M. Ma, B. Eysenbach and P.-L. Bacon, "When Do Transformers
    Shine in RL?", arXiv:2307.03864, after B. Bakker (2001).

    Args:
        length: length of the corridor.
        show_penalty: append the sign of the last reward to the observation: -1 from the first wrong
            step on, and 0 before. It does not depend on the cue. Without it, or the last action,
            positions on the shortest path look like those off it.
    """

    MOVES = ((1, 0), (0, 1), (-1, 0), (0, -1))

    def __init__(self, length: int = 10, show_penalty: bool = False) -> None:
        self.length = length
        self.show_penalty = show_penalty
        self.observation_space = spaces.Box(-1.0, 1.0, (2 + show_penalty,), np.float32)
        self.action_space = spaces.Discrete(4)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        self.goal = int(self.np_random.choice((-1, 1)))
        self.x = self.y = self.time = 0
        return self._observe(self.goal, 0.0), {}

    def _observe(self, side: int, reward: float) -> np.ndarray:
        shown = (np.sign(reward),) if self.show_penalty else ()
        return np.array([self.x == self.length, side, *shown], np.float32)

    def step(
        self, action: np.int64
    ) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        self.time += 1
        move_x, move_y = self.MOVES[action]
        x, y = self.x + move_x, self.y + move_y
        in_corridor = y == 0 and 0 <= x <= self.length
        if in_corridor or (x == self.length and abs(y) == 1):
            self.x, self.y = x, y
        done = self.time > self.length
        reward = float(self.y == self.goal) if done else -float(self.x < self.time) / self.length
        return self._observe(self.y, reward), reward, done, False, {}


class TwoGoals(gym.Env[np.ndarray, np.int64]):
    """Walk along a line to the one of its two ends that is good.

    The observation is ``[left end, position, right end]``. The ends are -1 (bad) or 1 (good) in
    the first ``shown`` observations, and 0 afterwards. Positions are from -1 to 1, and an episode
    starts at most .4 from the middle. The first two steps do nothing and cost nothing: an agent
    that could move while the ends are shown would read them from its position later. Every other
    step moves by .2 to the left or to the right. It costs .1; the good end is rewarded with 1.6,
    the bad one with -1.6. With three observations, as in the source, the first move still follows
    one with the ends, so that a feed-forward policy does better than chance, which is .5.

    Source: written from the description of the "Proof of Concept Memory Environment", with the
    agent frozen, of https://github.com/MarcoMeter/recurrent-ppo-truncated-bptt.

    Args:
        shown: number of observations that show the ends.
    """

    def __init__(self, shown: int = 3) -> None:
        self.shown = shown
        self.observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        self.good = int(self.np_random.choice((-1, 1)))
        self.place = int(self.np_random.integers(-2, 3))  # in steps of .2
        self.time = 0
        return self._observe(), {}

    def _observe(self) -> np.ndarray:
        shown = self.good if self.time < self.shown else 0
        return np.array([-shown, self.place / 5, shown], np.float32)

    def step(
        self, action: np.int64
    ) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        self.time += 1
        if self.time <= 2:
            return self._observe(), 0.0, False, False, {}
        self.place += 1 if action > 0 else -1
        done = abs(self.place) == 5
        reward = 1.6 * np.sign(self.place * self.good) if done else -0.1
        return self._observe(), float(reward), done, False, {}


class MemoryChain(gym.Env[np.ndarray, np.int64]):
    """Report at the end the sign that the first two observations showed.

    The observation is ``[share of the episode that is left, 0, sign]``: the sign is -1 or 1 in the
    first two observations, and 0 afterwards. An episode has ``length + 1`` steps. The last action
    is rewarded with 1 if it is 1 and the sign was positive, or 0 and it was negative, and with -1
    otherwise; other actions do nothing.

    Source: ``MemoryChain`` of bsuite 0.3.6 (https://github.com/google-deepmind/bsuite) with one
    bit, whose observations, rewards and ends were compared with these.

    Args:
        length: number of steps before the one that is rewarded.
    """

    def __init__(self, length: int = 10) -> None:
        self.length = length
        self.observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        self.sign = int(self.np_random.choice((-1, 1)))
        self.steps = 0
        return self._observe(0), {}

    def _observe(self, time: int) -> np.ndarray:
        return np.array([1 - time / self.length, 0, self.sign if time == 0 else 0], np.float32)

    def step(
        self, action: np.int64
    ) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, done = self._observe(self.steps), self.steps == self.length
        self.steps += 1
        right = (action == 1) == (self.sign == 1)
        reward = (1.0 if right else -1.0) if done else 0.0
        return observation, reward, done, False, {}


class ShowObjectTypes(gym.ObservationWrapper[np.ndarray, np.int64, dict[str, Any]]):
    """Show what stands on each square of MiniGrid's view, and allow the moves alone.

    The observation is a 1 for the kind of object on each square and 0 for the other ten kinds.
    Actions are to turn left, to turn right, and to walk.
    """

    KINDS = 11

    def __init__(self, env: gym.Env[dict[str, Any], np.int64]) -> None:
        super().__init__(env)
        squares = env.observation_space["image"].shape[:2]
        self.observation_space = spaces.Box(0.0, 1.0, (np.prod(squares) * self.KINDS,), np.float32)
        self.action_space = spaces.Discrete(3)

    def observation(self, observation: dict[str, Any]) -> np.ndarray:
        kinds = observation["image"][..., 0].ravel()
        return np.eye(self.KINDS, dtype=np.float32)[kinds].ravel()


class DrawSeed(gym.Wrapper[Any, Any, Any, Any]):
    """Start each episode from one of the seeds 0 to ``count - 1`` of the environment.

    Args:
        env: the environment.
        count: number of seeds.
    """

    def __init__(self, env: gym.Env[Any, Any], count: int) -> None:
        super().__init__(env)
        self.count, self.generator = count, np.random.default_rng()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.generator = np.random.default_rng(seed)
        return self.env.reset(seed=int(self.generator.integers(self.count)), options=options)


class ShowLastStep(gym.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """Show the last action and a tenth of the last reward after each observation, zeros at first.

    Observations and actions are vectors of floats.
    """

    def __init__(self, env: gym.Env[np.ndarray, np.ndarray]) -> None:
        super().__init__(env)
        reward = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        boxes: list[Any] = [env.observation_space, env.action_space, reward]
        low, high = (
            np.concatenate([getattr(box, limit).astype(np.float32) for box in boxes])
            for limit in ("low", "high")
        )
        self.observation_space = spaces.Box(low, high, dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        action: Any = self.action_space
        return self._join(observation, np.zeros(action.shape), 0.0), info

    def step(
        self, action: np.ndarray
    ) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, *ends, info = self.env.step(action)
        return self._join(observation, action, 0.1 * float(reward)), reward, *ends, info

    @staticmethod
    def _join(observation: np.ndarray, action: np.ndarray, reward: float) -> np.ndarray:
        return np.concatenate([observation, action, [reward]]).astype(np.float32)


gym.register("PassiveTMaze-v0", PassiveTMaze)
gym.register("MemoryChain-v0", MemoryChain)
gym.register("TwoGoals-v0", TwoGoals, max_episode_steps=32)
gym.register("CartPole200-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=200)
