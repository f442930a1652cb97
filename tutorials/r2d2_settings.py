"""The settings of the R2D2 tutorial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gymnasium as gym
from actors import KINDS
from command_line import RunSettings, option
from environments import POSITIONS

MEMORY_TASK = "popgym:popgym-RepeatPreviousEasy-v0"


@dataclass
class Settings(RunSettings):
    """What a run can be told; each entry is an option of the command line."""

    PRESETS = {
        # Rewards of 1/48 that earlier actions have no influence on; episodes of 51 steps.
        MEMORY_TASK: {
            "observation": "all",
            "frames": 50_000,
            "window_len": 24,
            "period": 12,
            "windows": 64,
            "reward_scale": 10.0,
            "gamma": 0.5,
        },
    }
    PRESET_OF = "env"
    ARCHITECTURE = ("env", "observation", "cell", "memoryless", "hidden_size", "window_len")

    env: str = option(
        "CartPole-v1",
        "an environment of Gymnasium with discrete actions; of package:id the package is imported",
    )
    observation: str = option("positions", "what the policy sees of it", ["positions", "all"])
    cell: str = option("lstm", "the recurrent layer", ["lstm", "gru", "lstm_ln"])
    memoryless: bool = option(False, "a layer in place of the recurrent one that keeps nothing")
    frames: int = option(80_000, "environment steps to learn from")
    output: str = option("runs/r2d2", "folder for all that the run leaves")
    eval_every: int = option(2_500, "frames between two evaluations")
    eval_episodes: int = option(20, "episodes of an evaluation")

    actors: str = option(
        "none",
        "what collects: this process, others, or a Ray cluster's; a number behind it, as in "
        "--actors ray 4, is that of --num-actors",
        KINDS,
    )
    num_actors: int = option(2, "how many processes or Ray actors")
    ray_address: str = option(
        "",
        "of a running Ray cluster, such as 10.0.0.1:6379; without it that of RAY_ADDRESS, else a "
        "cluster is started here",
    )
    num_envs: int = option(16, "environments of all actors together, stepped together in each")
    batch_frames: int = option(128, "frames collected between two rounds of learning")
    updates: int = option(4, "gradient steps in a round of learning")
    warmup: int = option(2_000, "frames collected before the first round")

    window_len: int = option(40, "steps in a window")
    period: int = option(20, "steps between the starts of two windows of an episode")
    burn_in: int = option(
        4, "first steps of a window that only bring its state up to date", least=0
    )
    state: str = option(
        "stored",
        "the state that a window starts from: zeros, the one that was stored, or that worked out "
        "anew every --refresh-every frames",
        ["zero", "stored", "refreshed"],
    )
    refresh_every: int = option(2_500, "frames between two times that states are worked out anew")
    windows: int = option(48, "windows in a gradient step")
    capacity: int = option(5_000, "windows that the replay buffer holds")
    alpha: float = option(0.6, "how much priorities count; 0 draws all windows alike", most=1)
    beta: float = option(0.4, "how much of that the loss's weights undo; 1 undoes all", most=1)
    eta: float = option(0.9, "share of the largest error in a window's priority", most=1)

    hidden_size: int = option(128, "size of the recurrent layer")
    n_steps: int = option(5, "rewards summed before the target network's value follows")
    gamma: float = option(0.99, "discount", most=1)
    rescale: float = option(1e-3, "epsilon of the rescaling of values; 0 does not rescale them")
    reward_scale: float = option(0.1, "rewards are multiplied by it")
    learning_rate: float = option(1e-3, "Adam's at the start; it falls to 0 at --frames")
    max_grad_norm: float = option(10.0, "longer gradients are cut to this length")
    tau: float = option(
        0.01, "share of the way that the target network moves in a gradient step", most=1
    )
    epsilon: float = option(
        0.4, "chance of a random action in the environment that explores most", most=1
    )
    epsilon_frames: int = option(15_000, "frames over which the chance falls from 1 everywhere")

    def check(self) -> None:
        """Raise ``ValueError`` if a number is out of range, or if numbers do not fit together."""
        super().check()
        self._check_windows()
        self._check_actors()
        if self.frames <= self.warmup:
            raise ValueError(
                f"--frames is {self.frames}: expected more than --warmup, {self.warmup}, because "
                "nothing is learned before"
            )
        if self.observation == "positions" and self.env not in POSITIONS:
            raise ValueError(
                f"--observation is positions, and those of {self.env} are not known: expected all"
            )
        _check_discrete(self.env)

    def _check_windows(self) -> None:
        if self.burn_in >= self.window_len:
            raise ValueError(
                f"--burn-in is {self.burn_in}: expected less than --window-len, {self.window_len}, "
                "because nothing would be left to learn from"
            )
        if self.period > self.window_len:
            raise ValueError(
                f"--period is {self.period}: expected at most --window-len, {self.window_len}, "
                "because steps between two windows would be lost"
            )

    def _check_actors(self) -> None:
        if self.actors != "none" and self.device != "cpu":
            raise ValueError(
                f"--device is {self.device}: expected cpu, or --actors none, because actors get a "
                "copy of the network as it is, and have no GPU"
            )
        if self.num_envs % self.workers:
            raise ValueError(
                f"--num-envs is {self.num_envs}: expected a multiple of --num-actors, "
                f"{self.workers}, because each actor steps as many"
            )
        if self.batch_frames % self.envs_each:
            raise ValueError(
                f"--batch-frames is {self.batch_frames}: expected a multiple of the environments "
                f"of an actor, {self.envs_each}, because they are stepped together"
            )

    @property
    def workers(self) -> int:
        """How many actors collect; this process is one."""
        return 1 if self.actors == "none" else self.num_actors

    @property
    def envs_each(self) -> int:
        """How many environments an actor steps."""
        return self.num_envs // self.workers

    @property
    def title(self) -> str:
        layer = "no memory" if self.memoryless else self.cell.upper()
        name = self.env.rpartition(":")[2]
        seen = " from positions" if self.observation == "positions" else ""
        return f"R2D2, {name}{seen}, {layer}, seed {self.seed}"


def spell_out(argv: Sequence[str]) -> list[str]:
    """Name the number in ``--actors ray 4``, for a parser that takes one word for each option."""
    words = list(argv)
    if "--actors" in words:
        number = words.index("--actors") + 2
        if number < len(words) and words[number].isdigit():
            words.insert(number, "--num-actors")
    return words


def _check_discrete(name: str) -> None:
    try:
        space = gym.make(name).action_space
    except (gym.error.Error, ModuleNotFoundError) as error:
        raise ValueError(
            f"--env is {name}: {error}. Tasks of POPGym need pip install popgym"
        ) from error
    if not isinstance(space, gym.spaces.Discrete):
        raise ValueError(f"--env is {name}: expected discrete actions, and it has {space}")
