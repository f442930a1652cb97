"""The settings of the recurrent-DQN tutorial."""

from __future__ import annotations

from dataclasses import dataclass

from command_line import option
from replay import ReplaySettings


@dataclass
class Settings(ReplaySettings):
    """What a run can be told; each entry is an option of the command line."""

    # A rendered frame costs fifty times what a step without one does: fewer of everything.
    PRESETS = {
        "pixels": {
            "frames": 40_000,
            "capacity": 20_000,
            "num_envs": 8,
            "slices": 16,
            "slice_len": 32,
            "eval_episodes": 8,
        },
    }
    PRESET_OF = "observation"
    ARCHITECTURE = ("observation", "cell", "memoryless", "hidden_size")

    observation: str = option(
        "positions",
        "what the policy sees; pixels lower the defaults of frames, environments and batches",
        ["positions", "pixels"],
    )
    output: str = option("runs/recurrent_dqn", "folder for all that the run leaves")

    epsilon: float = option(0.02, "chance of a random action in the end; it starts at 1", most=1)
    epsilon_frames: int = option(15_000, "frames over which that chance falls")

    @property
    def title(self) -> str:
        layer = "no memory" if self.memoryless else self.cell.upper()
        return f"CartPole from {self.observation}, {layer}, seed {self.seed}"
