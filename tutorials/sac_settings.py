"""The settings of the recurrent-SAC tutorial."""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
from command_line import option
from environments import POSITIONS
from replay import ReplaySettings


@dataclass
class Settings(ReplaySettings):
    """What a run can be told; each entry is an option of the command line."""

    ARCHITECTURE = (
        "env",
        "observation",
        "magnify",
        "cell",
        "memoryless",
        "hidden_size",
        "head_size",
    )

    env: str = option("Pendulum-v1", "any environment of Gymnasium with continuous actions")
    observation: str = option(
        "positions", "what the policy sees of the state", ["positions", "all"]
    )
    magnify: float = option(5.0, "positions are multiplied by it: smaller changes stand out")
    cell: str = option("gru", "the recurrent layer", ["lstm", "gru"])
    frames: int = option(24_000, "environment steps to learn from")
    output: str = option("runs/recurrent_sac", "folder for all that the run leaves")

    num_envs: int = option(8, "environments stepped together")
    batch_frames: int = option(32, "frames collected between two rounds of learning")
    updates: int = option(5, "gradient steps in a round of learning")
    warmup: int = option(1_600, "frames collected before the first round, after a resume too")
    slices: int = option(32, "sequences in a gradient step")
    slice_len: int = option(32, "steps in a sequence")
    burn_in: int = option(4, "first steps of a sequence, which only warm memories up", least=0)

    hidden_size: int = option(64, "size of each recurrent layer")
    head_size: int = option(64, "size of the layer behind it")
    gamma: float = option(0.97, "discount", most=1)
    lmbda: float = option(
        0.0, "lambda of the TD(lambda) returns; 0 bootstraps after one step", most=1
    )
    learning_rate: float = option(2e-3, "Adam's at the start; it falls to 0 at --frames")
    tau: float = option(
        0.02, "share of the way that target networks move in a gradient step", most=1
    )
    alpha: float = option(0.1, "weight of the entropy at the start; it is learned")

    eval_every: int = option(2_000, "frames between two evaluations")
    eval_episodes: int = option(20, "episodes of an evaluation")

    def check(self) -> None:
        """Raise ``ValueError`` if a number is out of range, or if numbers do not fit together."""
        super().check()
        if self.alpha == 0:
            raise ValueError("--alpha is 0.0: expected more, because its logarithm is learned")
        if self.observation == "positions" and self.env not in POSITIONS:
            raise ValueError(
                f"--observation is positions, and it is not known which entries are positions in "
                f"{self.env}: expected one of {', '.join(POSITIONS)}, or --observation all"
            )
        _check_continuous(self.env)
        if self.burn_in >= self.slice_len:
            raise ValueError(
                f"--burn-in is {self.burn_in}: expected less than --slice-len, {self.slice_len}, "
                "so that there are steps to learn from"
            )

    @property
    def title(self) -> str:
        layer = "no memory" if self.memoryless else self.cell.upper()
        return f"{self.env} from {self.observation}, {layer}, seed {self.seed}"


def _check_continuous(name: str) -> None:
    try:
        space = gym.make(name).action_space
    except gym.error.Error as error:
        raise ValueError(f"--env is {name}: {error}") from error
    if not isinstance(space, gym.spaces.Box):
        raise ValueError(f"--env is {name}: expected continuous actions, and {name} has {space}")
