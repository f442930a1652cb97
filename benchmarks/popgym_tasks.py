"""The experiments of `make results` on POPGym: small games that ask for what was seen before.

    python -m benchmarks.popgym_tasks        # returns of random actions

Source of the games: S. Morad et al., "POPGym: Benchmarking Partially Observable Reinforcement
Learning", 2023 (arXiv:2303.01859). An episode returns 1 at most, in each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from .experiments import CELLS, LAST, Experiment

# Chosen on seed 100 of RepeatPreviousEasy with a GRU, and the same for all games and cells.
PPO = ("--num-envs", "32", "--steps", "64", "--seq-len", "64", "--minibatch-steps", "1024")
PPO += ("--epochs", "5", "--learning-rate", "0.003")
PPO_GAMES = (*PPO, "--reward-scale", "5")
SHORT = ("--frames", "200000", "--eval-every", "20000")
LONG = ("--frames", "1000000", "--eval-every", "50000")
NAMES = ("GRU", "LSTM", "minGRU", "LRU", "feed-forward")
VARIANTS = {
    **{name: (*SHORT, "--cell", CELLS[name]) for name in NAMES},
    **{f"{name}, 1M frames": (*LONG, "--cell", CELLS[name]) for name in ("GRU", "feed-forward")},
}


@dataclass(frozen=True)
class Game:
    """A game of POPGym.

    Args:
        name: of the environment, without ``popgym-`` and version.
        text: what it asks for.
        random: mean return of random actions.
        options: further options of the tutorial.
        is_short: whether the GRU has learned it after 200,000 frames, so that no more are played.
    """

    name: str
    text: str
    random: float
    options: tuple[str, ...] = ()
    is_short: bool = False


GAMES = {
    "popgym_repeat_previous": Game(
        "RepeatPreviousEasy",
        "A card is shown at each step, and the suit of the one four steps ago is asked for. A "
        "quarter of random answers is right.",
        -0.5,
        is_short=True,
    ),
    "popgym_repeat_first": Game(
        "RepeatFirstEasy",
        "A card is shown at each step, and the suit of the first one is asked for. A quarter of "
        "random answers is right.",
        -0.5,
    ),
    "popgym_count_recall": Game(
        "CountRecallEasy",
        "A card is shown at each step, and how many of a color there were is asked for: a number "
        "from 0 to 26. One of 27 random answers is right, which returns 2 / 27 - 1.",
        2 / 27 - 1,
    ),
    "popgym_cart_pole": Game(
        "PositionOnlyCartPoleEasy",
        "CartPole without velocities. Each of 200 steps is rewarded with 1 / 200.",
        0.11,
        is_short=True,
    ),
    "popgym_autoencode": Game(
        "AutoencodeEasy",
        "52 cards are shown, and their suits are asked for in reverse order. A quarter of random "
        "answers is right.",
        -0.5,
    ),
    "popgym_battleship": Game(
        "BattleshipEasy",
        "Find 12 squares with ships among 64, from hits and misses. The action is shown with the "
        "next observation, as the game asks for. Squares in rows, one by one, return 0.17, which "
        "takes no more memory than the last action; only luck returns 1. A policy that plays its "
        "likeliest action repeats shots, which costs more than random ones.",
        -0.44,
        ("--wrappers", "benchmarks.popgym_tasks:ShowLastAction"),
    ),
}


def make_experiment(game: Game) -> Experiment:
    """Make the experiment of a game of POPGym."""
    env = ("--env", f"popgym:popgym-{game.name}-v0", *game.options)
    return Experiment(
        script="recurrent_ppo",
        title=f"PPO on POPGym's {game.name}",
        text=(
            f"{game.text} One set of settings serves all games and cells; it is the first that was "
            "tried, on seed 100 of RepeatPreviousEasy with a GRU. There are 200,000 frames if "
            "nothing else is said. Rows *at N frames* are the mean return of the last 100 episodes "
            f"while training, with exploration. {LAST}"
        ),
        variants={
            name: (*env, *PPO_GAMES, *words)
            for name, words in VARIANTS.items()
            if not (game.is_short and "frames" in name)
        },
        y="training_return",
        milestones=(200_000, 1_000_000),
        seeds=range(3),
        few={"feed-forward, 1M frames": [0]},
        references={"random actions": game.random, "best possible": 1.0},
        scale=(game.random, 1.0),
    )


POPGYM = {name: make_experiment(game) for name, game in GAMES.items()}


class ShowLastAction(gym.Wrapper):
    """Show the last action with each observation; the first one shows action 0.

    POPGym's own wrapper takes no environment of ``gym.make``, whose checks are wrappers.

    Examples:
        >>> env = ShowLastAction(gym.make("popgym:popgym-BattleshipEasy-v0"))
        >>> env.reset(seed=0)[0]
        (0, array([0, 0]))
        >>> env.step(np.array([3, 5]))[0][1]
        array([3, 5])
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Tuple((env.observation_space, env.action_space))

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        space = self.action_space
        return (observation, np.zeros(space.shape or (), space.dtype)), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return (observation, action), reward, terminated, truncated, info


def measure_random(name: str, episodes: int = 3000) -> float:
    """Return the mean return of random actions in a game of POPGym.

    Args:
        name: of the game, as in :class:`Game`.
        episodes: number of episodes, with seeds from 0.
    """
    env = gym.make(f"popgym:popgym-{name}-v0", disable_env_checker=True)
    env.action_space.seed(0)
    returns = []
    for seed in range(episodes):
        env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total += float(reward)
            done = terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


if __name__ == "__main__":
    for one in GAMES.values():
        print(f"{one.name}: {measure_random(one.name):.3f} by play, {one.random:.3f} in the table")
