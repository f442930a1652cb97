"""The command line of the recurrent-PPO tutorial: its settings as options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from command_line import add_options, option
from environments import POSITIONS
from learning_records import load_checkpoint


@dataclass
class Settings:
    """What a run can be told; each entry is an option of the command line."""

    env: str = option("CartPole-v1", "any environment of Gymnasium")
    observation: str = option(
        "positions", "what the policy sees of the state", ["positions", "all", "pixels"]
    )
    cell: str = option("lstm", "the recurrent layer", ["lstm", "gru"])
    shared: bool = option(False, "one memory for actor and critic")
    memoryless: bool = option(False, "a linear layer in place of the recurrent one")
    frames: int = option(100_000, "environment steps to learn from")
    seed: int = option(0, "start of all random numbers")
    device: str = option("cpu", "where the networks live: cpu, cuda, cuda:1")
    threads: int = option(1, "CPU threads of torch; networks this small are fastest with one")
    output: str = option("runs/recurrent_ppo", "folder for all that the run leaves")
    film: bool = option(False, "leave a film of the trained agent")
    tensorboard: bool = option(False, "write what is recorded for TensorBoard too")

    num_envs: int = option(8, "environments stepped together")
    processes: int = option(1, "processes they are spread over")
    steps: int = option(64, "steps of each environment in a rollout")
    seq_len: int = option(64, "steps in a sequence of a minibatch")
    minibatch_steps: int = option(256, "steps in a minibatch, in whole sequences")
    epochs: int = option(10, "how often each step is learned from")
    refresh: bool = option(False, "work states out anew between epochs")

    hidden_size: int = option(64, "size of each recurrent layer")
    head_size: int = option(64, "size of the layer behind it")
    gamma: float = option(0.99, "discount")
    lmbda: float = option(0.95, "lambda of GAE")
    reward_scale: float = option(0.1, "rewards are multiplied by it, so that values stay small")
    learning_rate: float = option(1e-3, "Adam's at the start; it falls to 0 at --frames")
    clip: float = option(0.2, "how far a ratio may go before it counts no more; it falls too")
    entropy: float = option(0.0, "weight of the entropy bonus")
    critic_coeff: float = option(0.5, "weight of the critic's loss")
    max_grad_norm: float = option(0.5, "longer gradients are cut to this length")

    eval_every: int = option(10_000, "frames between two evaluations")
    eval_episodes: int = option(32, "episodes of an evaluation")

    def check(self) -> None:
        """Raise ``ValueError`` if a number is out of range, or if numbers do not fit together."""
        for item in fields(self):
            value = getattr(self, item.name)
            least = {int: 1, float: 0}.get(type(item.default))
            if least is not None and item.name != "seed" and value < least:
                raise ValueError(f"{_flag(item.name)} is {value}: expected at least {least}")
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


# What other environments ask for.
PRESETS: dict[str, dict[str, Any]] = {
    "Pendulum-v1": {
        "steps": 128,
        "gamma": 0.9,
        "reward_scale": 0.02,
    },
    "MountainCarContinuous-v0": {
        "frames": 300_000,
        "gamma": 0.99,
        "reward_scale": 0.05,
        "entropy": 0.01,
        "eval_every": 20_000,
    },
}

# Weights of one network do not fit another: what a resumed run may not change.
ARCHITECTURE = ("env", "observation", "cell", "shared", "memoryless", "hidden_size", "head_size")


def read_settings(
    argv: Sequence[str] | None, description: str
) -> tuple[Settings, dict[str, Any] | None]:
    """Read the command line; what it leaves open comes from the checkpoint of ``--resume``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resume", metavar="CHECKPOINT", help="go on from this checkpoint.pt")
    add_options(parser, Settings)
    named = parser.parse_args(argv)
    checkpoint = None
    try:
        preset = PRESETS.get(named.env, {})
        if named.resume is not None:
            checkpoint = load_checkpoint(Path(named.resume))
            preset = checkpoint["settings"]
        parser.set_defaults(**preset)
        options = vars(parser.parse_args(argv))
        settings = Settings(**{item.name: options[item.name] for item in fields(Settings)})
        if checkpoint is not None:
            _check_same_networks(settings, checkpoint["settings"])
        settings.check()
    except ValueError as error:
        parser.error(str(error))
    return settings, checkpoint


def _check_same_networks(settings: Settings, saved: dict[str, Any]) -> None:
    for name in ARCHITECTURE:
        if getattr(settings, name) != saved[name]:
            raise ValueError(
                f"{_flag(name)} is {getattr(settings, name)!r}, but the checkpoint "
                f"was made with {saved[name]!r}: leave it out, or start a new run without --resume"
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
