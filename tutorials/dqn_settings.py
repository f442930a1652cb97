"""The settings of the recurrent-DQN tutorial."""

from __future__ import annotations

from dataclasses import dataclass

from command_line import RunSettings, option


@dataclass
class Settings(RunSettings):
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
    cell: str = option("lstm", "the recurrent layer", ["lstm", "gru"])
    memoryless: bool = option(False, "a linear layer in place of the recurrent one")
    output: str = option("runs/recurrent_dqn", "folder for all that the run leaves")

    num_envs: int = option(16, "environments stepped together")
    batch_frames: int = option(128, "frames collected between two rounds of learning")
    updates: int = option(4, "gradient steps in a round of learning")
    warmup: int = option(2_000, "frames collected before the first round, after a resume too")
    capacity: int = option(100_000, "frames that the replay buffer holds")
    slices: int = option(32, "sequences in a gradient step")
    slice_len: int = option(64, "steps in a sequence")

    hidden_size: int = option(128, "size of the recurrent layer")
    gamma: float = option(0.99, "discount", most=1)
    lmbda: float = option(
        0.95, "lambda of the TD(lambda) returns; 0 bootstraps after one step", most=1
    )
    reward_scale: float = option(0.1, "rewards are multiplied by it, so that values stay small")
    learning_rate: float = option(1e-3, "Adam's at the start; it falls to 0 at --frames")
    max_grad_norm: float = option(10.0, "longer gradients are cut to this length")
    tau: float = option(
        0.01, "share of the way that the target network moves in a gradient step", most=1
    )
    epsilon: float = option(0.02, "chance of a random action in the end; it starts at 1", most=1)
    epsilon_frames: int = option(15_000, "frames over which that chance falls")

    def check(self) -> None:
        """Raise ``ValueError`` if a number is out of range, or if numbers do not fit together."""
        super().check()
        if self.frames <= self.warmup:
            raise ValueError(
                f"--frames is {self.frames}: expected more than --warmup, {self.warmup}, because "
                "nothing is learned before"
            )
        if self.batch_frames % self.num_envs:
            raise ValueError(
                f"--batch-frames is {self.batch_frames}: expected a multiple of --num-envs, "
                f"{self.num_envs}, because the environments are stepped together"
            )
        shortest = self.num_envs * self.slice_len
        for name in ("warmup", "capacity"):
            if getattr(self, name) < shortest:
                raise ValueError(
                    f"--{name} is {getattr(self, name)}: expected at least --num-envs times "
                    f"--slice-len, {shortest}, so that a sequence can be drawn"
                )

    @property
    def title(self) -> str:
        layer = "no memory" if self.memoryless else self.cell.upper()
        return f"CartPole from {self.observation}, {layer}, seed {self.seed}"
