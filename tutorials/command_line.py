"""The command line of the tutorial: its settings as options, and Ctrl-C."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from learning_records import load_checkpoint


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """Declare a dataclass field that is an option too; its default's type is the option's."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """What a run can be told; each entry is an option of the command line."""

    observation: str = option(
        "positions",
        "what the policy sees; pixels lower the defaults of frames, environments and batches",
        ["positions", "pixels"],
    )
    cell: str = option("lstm", "the recurrent layer", ["lstm", "gru"])
    memoryless: bool = option(False, "a linear layer in place of the recurrent one")
    frames: int = option(100_000, "environment steps to learn from")
    seed: int = option(0, "start of all random numbers")
    device: str = option("cpu", "where the network lives: cpu, cuda, cuda:1")
    threads: int = option(1, "CPU threads of torch; a network this small is fastest with one")
    output: str = option("runs/recurrent_dqn", "folder for all that the run leaves")

    num_envs: int = option(16, "environments stepped together")
    batch_frames: int = option(128, "frames collected between two rounds of learning")
    updates: int = option(4, "gradient steps in a round of learning")
    warmup: int = option(2_000, "frames collected before the first round, after a resume too")
    capacity: int = option(100_000, "frames that the replay buffer holds")
    slices: int = option(32, "sequences in a gradient step")
    slice_len: int = option(64, "steps in a sequence")

    hidden_size: int = option(128, "size of the recurrent layer")
    gamma: float = option(0.99, "discount")
    lmbda: float = option(0.95, "lambda of the TD(lambda) returns; 0 bootstraps after one step")
    reward_scale: float = option(0.1, "rewards are multiplied by it, so that values stay small")
    learning_rate: float = option(1e-3, "Adam's at the start; it falls to 0 at --frames")
    max_grad_norm: float = option(10.0, "longer gradients are cut to this length")
    tau: float = option(0.01, "share of the way that the target network moves in a gradient step")
    epsilon: float = option(0.02, "chance of a random action in the end; it starts at 1")
    epsilon_frames: int = option(15_000, "frames over which that chance falls")

    eval_every: int = option(5_000, "frames between two evaluations")
    eval_episodes: int = option(32, "episodes of an evaluation")

    def check(self) -> None:
        """Raise ``ValueError`` if a number is out of range, or if numbers do not fit together."""
        for item in fields(self):
            value = getattr(self, item.name)
            least = 1 if isinstance(item.default, int) and item.name != "seed" else 0
            if isinstance(value, (int, float)) and value < least and item.name != "memoryless":
                raise ValueError(f"{_flag(item.name)} is {value}: expected at least {least}")
        for name in SHARES:
            if getattr(self, name) > 1:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}: expected at most 1")
        self._check_frames()
        _check_device(self.device)

    def _check_frames(self) -> None:
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


# A rendered frame costs fifty times what a step without one does: fewer of everything.
PRESETS = {
    "positions": {},
    "pixels": {
        "frames": 40_000,
        "capacity": 20_000,
        "num_envs": 8,
        "slices": 16,
        "slice_len": 32,
        "eval_episodes": 8,
    },
}

SHARES = ("gamma", "lmbda", "tau", "epsilon")

# Weights of one network do not fit another: what a resumed run may not change.
ARCHITECTURE = ("observation", "cell", "memoryless", "hidden_size")


def read_settings(
    argv: Sequence[str] | None, description: str
) -> tuple[Settings, dict[str, Any] | None]:
    """Read the command line; what it leaves open comes from the checkpoint of ``--resume``."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options], of which --help shows a list",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--resume", metavar="CHECKPOINT", help="go on from this checkpoint.pt")
    add_options(parser, Settings)
    named = parser.parse_args(argv)
    try:
        if named.resume is None:
            settings = _parse(parser, argv, PRESETS[named.observation])
            checkpoint = None
        else:
            checkpoint = load_checkpoint(Path(named.resume))
            settings = _parse(parser, argv, checkpoint["settings"])
            _check_same_network(settings, checkpoint["settings"])
        settings.check()
        _make_output(Path(settings.output))
    except ValueError as error:
        parser.error(str(error))
    return settings, checkpoint


def _check_same_network(settings: Settings, saved: dict[str, Any]) -> None:
    for name in ARCHITECTURE:
        if getattr(settings, name) != saved[name]:
            raise ValueError(
                f"{_flag(name)} is {getattr(settings, name)!r}, but the checkpoint "
                f"was made with {saved[name]!r}: leave it out, or start a new run without --resume"
            )


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device is {device}: torch cannot use it here ({reason})") from error


def _make_output(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output is {folder}: expected a folder, or a place where one can be made "
            f"({error.strerror})"
        ) from error


def add_options(parser: argparse.ArgumentParser, settings: Any) -> None:
    """Give ``parser`` an option for each field of a dataclass: ``slice_len`` is ``--slice-len``."""
    for item in fields(settings):
        name = _flag(item.name)
        text = item.metadata["help"] + " (default: %(default)s)"
        if isinstance(item.default, bool):
            parser.add_argument(name, action="store_true", default=item.default, help=text)
        else:
            choices = item.metadata["choices"]
            kind = type(item.default)
            parser.add_argument(name, type=kind, default=item.default, choices=choices, help=text)


def _parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, preset: Mapping[str, Any]
) -> Settings:
    """Read settings from ``argv``; what it does not name comes from ``preset``, then defaults."""
    parser.set_defaults(**preset)
    options = vars(parser.parse_args(argv))
    return Settings(**{item.name: options[item.name] for item in fields(Settings)})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class StopOnInterrupt:
    """Ask the loop to stop at the first Ctrl-C; let the second one break off as usual."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopOnInterrupt:
        self.previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def __call__(self) -> bool:
        return self.asked

    def _ask(self, *signal_and_frame: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.previous)
