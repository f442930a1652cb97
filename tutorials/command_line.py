"""The command line of the tutorials: settings as options, ``--resume``, and Ctrl-C."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from records import load_checkpoint


def option(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    *,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """Declare a dataclass field that is an option too; its default's type is the option's.

    Args:
        default: its value if nothing else is said.
        help: what ``--help`` says of it.
        choices: the values that it can have, if they are few.
        least: the smallest value allowed; if nothing is said, 1 for integers and 0 for floats.
        most: the largest value allowed, if there is one.
    """
    if least is None:
        least = {int: 1, float: 0}.get(type(default))
    limits = {"choices": choices, "least": least, "most": most}
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class RunSettings:
    """What every run can be told; a tutorial's own settings are derived from it.

    Each entry is an option of the command line: ``eval_every`` is ``--eval-every``.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Other defaults, by the value of the option ``PRESET_OF``."""

    PRESET_OF: ClassVar[str] = ""

    ARCHITECTURE: ClassVar[tuple[str, ...]] = ()
    """Weights of one network do not fit another: what a resumed run may not change."""

    frames: int = option(100_000, "environment steps to learn from")
    seed: int = option(0, "start of all random numbers", least=0)
    device: str = option("cpu", "where the networks live: cpu, cuda, cuda:1")
    threads: int = option(1, "CPU threads of torch; networks this small are fastest with one")
    output: str = option("runs", "folder for all that the run leaves")
    tensorboard: bool = option(False, "write what is recorded for TensorBoard too")
    eval_every: int = option(5_000, "frames between two evaluations")
    eval_episodes: int = option(32, "episodes of an evaluation")

    def check(self) -> None:
        """Raise ``ValueError`` if a number is out of range, or if numbers do not fit together."""
        check_ranges(self)
        _check_device(self.device)

    @property
    def title(self) -> str:
        raise NotImplementedError


AnySettings = TypeVar("AnySettings", bound=RunSettings)


def read_settings(
    kind: type[AnySettings], argv: Sequence[str] | None, description: str
) -> tuple[AnySettings, dict[str, Any] | None]:
    """Read the command line; what it leaves open comes from the checkpoint of ``--resume``.

    Returns:
        The settings, and the checkpoint to go on from, if one is named.

    Raises:
        SystemExit: with a message, if an option or the checkpoint cannot be used.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options], of which --help shows a list",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--resume", metavar="CHECKPOINT", help="go on from this checkpoint.pt")
    add_options(parser, kind)
    named = parser.parse_args(argv)
    try:
        if named.resume is None:
            checkpoint, preset = None, kind.PRESETS.get(getattr(named, kind.PRESET_OF, ""), {})
        else:
            checkpoint = load_checkpoint(Path(named.resume))
            preset = checkpoint["settings"]
        settings = _parse(kind, parser, argv, preset)
        if checkpoint is not None:
            _check_same_networks(settings, checkpoint["settings"])
        settings.check()
        _make_output(Path(settings.output))
    except ValueError as error:
        parser.error(str(error))
    return settings, checkpoint


def _parse(
    kind: type[AnySettings],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    preset: Mapping[str, Any],
) -> AnySettings:
    """Read settings from ``argv``; what it does not name comes from ``preset``, then defaults."""
    parser.set_defaults(**preset)
    options = vars(parser.parse_args(argv))
    return kind(**{item.name: options[item.name] for item in fields(kind)})


def _check_same_networks(settings: RunSettings, saved: Mapping[str, Any]) -> None:
    for name in settings.ARCHITECTURE:
        if name not in saved:
            raise ValueError("--resume names a checkpoint of another tutorial")
        if getattr(settings, name) != saved[name]:
            raise ValueError(
                f"{flag(name)} is {getattr(settings, name)!r}, but the checkpoint "
                f"was made with {saved[name]!r}: leave it out, or start a new run without --resume"
            )


def check_ranges(settings: Any) -> None:
    """Raise ``ValueError`` if a number is smaller or larger than its option allows."""
    for item in fields(settings):
        value, least, most = getattr(settings, item.name), *map(item.metadata.get, LIMITS)
        if least is not None and not value >= least:
            raise ValueError(f"{flag(item.name)} is {value}: expected at least {least}")
        if most is not None and not value <= most:
            raise ValueError(f"{flag(item.name)} is {value}: expected at most {most}")


LIMITS = ("least", "most")


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
        text = item.metadata["help"] + " (default: %(default)s)"
        if isinstance(item.default, bool):
            how: dict[str, Any] = {"action": "store_true"}
        else:
            how = {"type": type(item.default), "choices": item.metadata["choices"]}
        parser.add_argument(flag(item.name), default=item.default, help=text, **how)


def flag(name: str) -> str:
    """Return the option of the field ``name``."""
    return "--" + name.replace("_", "-")


class StopOnInterrupt:
    """Ask the loop to stop at the first Ctrl-C or SIGTERM; let the second one break off as usual.

    SIGTERM is what a scheduler sends to a job whose time is over.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopOnInterrupt:
        self.previous = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def __call__(self) -> bool:
        return self.asked

    def _ask(self, *signal_and_frame: object) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
