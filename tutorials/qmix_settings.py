"""The settings of the recurrent-QMIX tutorial."""

from __future__ import annotations

from dataclasses import dataclass

from command_line import option
from replay import ReplaySettings


@dataclass
class Settings(ReplaySettings):
    """What a run can be told; each entry is an option of the command line."""

    ARCHITECTURE = ("agents", "words", "own", "cell", "memoryless", "hidden_size")

    agents: int = option(3, "who have to remember a word each")
    words: int = option(2, "that there are", least=2)
    own: bool = option(False, "weights of its own for each agent; otherwise all share theirs")
    cell: str = option("gru", "the recurrent layer", ["lstm", "gru"])
    output: str = option("runs/recurrent_qmix", "folder for all that the run leaves")
    frames: int = option(16_000, "environment steps to learn from")
    eval_every: int = option(1_000, "frames between two evaluations")
    eval_episodes: int = option(128, "episodes of an evaluation")

    num_envs: int = option(32, "environments stepped together")
    batch_frames: int = option(256, "frames collected between two rounds of learning")
    updates: int = option(4, "gradient steps in a round of learning")
    slice_len: int = option(16, "steps in a sequence")
    hidden_size: int = option(64, "size of each recurrent layer")
    reward_scale: float = option(1.0, "rewards are multiplied by it")
    learning_rate: float = option(3e-3, "Adam's at the start; it falls to 0 at --frames")
    tau: float = option(0.02, "share of the way that target networks move in a step", most=1)

    epsilon: float = option(0.05, "chance of a random action in the end; it starts at 1", most=1)
    epsilon_frames: int = option(8_000, "frames over which that chance falls")

    @property
    def title(self) -> str:
        layer = "no memory" if self.memoryless else self.cell.upper()
        weights = "own weights" if self.own else "shared weights"
        return f"Password of {self.agents} agents, {layer}, {weights}, seed {self.seed}"
