"""The settings of the recurrent-PPO tutorial."""

from __future__ import annotations

from dataclasses import dataclass

from command_line import RunSettings, option
from environments import POSITIONS


@dataclass
class Settings(RunSettings):
    """What a run can be told; each entry is an option of the command line."""

    # What other environments ask for.
    PRESETS = {
        "Pendulum-v1": {
            "magnify": 5.0,
            "num_envs": 10,
            "steps": 200,  # an episode
            "seq_len": 25,
            "minibatch_steps": 250,
            "gamma": 0.9,
            "reward_scale": 0.02,
            "learning_rate": 3e-3,
            "noise_correlation": 0.7,
        },
        "MountainCarContinuous-v0": {
            "magnify": 5.0,
            "num_envs": 16,
            "steps": 128,
            "minibatch_steps": 512,
            "lmbda": 0.98,
            "reward_scale": 0.05,
            "entropy": 0.01,
            # Noise that lasts drives the car up the hill now and then, from the start.
            "noise_correlation": 0.9,
        },
    }
    PRESET_OF = "env"
    ARCHITECTURE = (
        "env",
        "observation",
        "magnify",
        "cell",
        "shared",
        "memoryless",
        "hidden_size",
        "head_size",
    )

    env: str = option("CartPole-v1", "any environment of Gymnasium")
    observation: str = option(
        "positions", "what the policy sees of the state", ["positions", "all", "pixels"]
    )
    magnify: float = option(1.0, "positions are multiplied by it: smaller changes stand out")
    cell: str = option("lstm", "the recurrent layer", ["lstm", "gru"])
    shared: bool = option(False, "one memory for actor and critic")
    memoryless: bool = option(False, "a linear layer in place of the recurrent one")
    output: str = option("runs/recurrent_ppo", "folder for all that the run leaves")
    film: bool = option(False, "leave a film of the trained agent")

    num_envs: int = option(8, "environments stepped together")
    processes: int = option(1, "processes they are spread over")
    steps: int = option(64, "steps of each environment in a rollout")
    seq_len: int = option(64, "steps in a sequence of a minibatch")
    minibatch_steps: int = option(256, "steps in a minibatch, in whole sequences")
    epochs: int = option(10, "how often each step is learned from")
    refresh: bool = option(False, "work states out anew between epochs")

    hidden_size: int = option(64, "size of each recurrent layer")
    head_size: int = option(64, "size of the layer behind it")
    gamma: float = option(0.99, "discount", most=1)
    lmbda: float = option(0.95, "lambda of GAE", most=1)
    reward_scale: float = option(0.1, "rewards are multiplied by it, so that values stay small")
    learning_rate: float = option(1e-3, "Adam's at the start; it falls to 0 at --frames")
    clip: float = option(0.2, "how far a ratio may go before it counts no more; it falls too")
    entropy: float = option(0.0, "weight of the entropy bonus")
    noise_correlation: float = option(
        0.0, "how much of the noise in continuous actions is left at the next step", most=1
    )
    critic_coeff: float = option(0.5, "weight of the critic's loss")
    max_grad_norm: float = option(0.5, "longer gradients are cut to this length")

    eval_every: int = option(10_000, "frames between two evaluations")

    def check(self) -> None:
        """Raise ``ValueError`` if a number is out of range, or if numbers do not fit together."""
        super().check()
        if self.minibatch_steps % self.seq_len:
            raise ValueError(
                f"--minibatch-steps is {self.minibatch_steps}: expected a multiple of --seq-len, "
                f"{self.seq_len}, because sequences stay whole"
            )
        if self.num_envs % self.processes:
            raise ValueError(
                f"--num-envs is {self.num_envs}: expected a multiple of --processes, "
                f"{self.processes}"
            )
        if self.observation == "positions" and self.env not in POSITIONS:
            raise ValueError(
                f"--observation is positions, and it is not known which entries are positions in "
                f"{self.env}: expected one of {', '.join(POSITIONS)}, or --observation all"
            )

    @property
    def title(self) -> str:
        layer = "no memory" if self.memoryless else self.cell.upper()
        return f"{self.env} from {self.observation}, {layer}, seed {self.seed}"
