"""Training runs that can be stopped and continued: arguments, progress, and the files they write.

The tutorials are built on it; it needs ``pip install 'rnnkeys[tutorials]'``.
"""

from __future__ import annotations

import csv
import json
import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from statistics import fmean
from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.record.loggers import get_logger

try:
    import tyro
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        "rnnkeys.runs needs tyro and matplotlib: pip install 'rnnkeys[tutorials]'."
    ) from error

Arguments = TypeVar("Arguments")

FILES = ("checkpoint.pt", "learning_curve.csv", "learning_curve.png", "result.json")
"""Files of a run, in its folder."""

_PROGRESS = ("frames", "episodes", "seconds", "rows", "best")


class RunError(ValueError):
    """A wrong argument, or a run that cannot continue; one line of text."""


def read_args(
    kind: type[Arguments],
    argv: Sequence[str] | None,
    *,
    fixed: Collection[str] = (),
    description: str | None = None,
) -> tuple[Arguments, dict[str, Any]]:
    """Read the arguments of a run from a command line.

    Args:
        kind: dataclass of the arguments. Three fields have a meaning here: ``output: str``, the
            folder of the run; ``resume: str | None``, the checkpoint of the run to continue, whose
            arguments are then the defaults; and ``overwrite: bool``, whether a run in the folder
            may be deleted.
        argv: words of the command line; None takes those of the program.
        fixed: names of arguments that a resumed run must keep; ``"output"`` is always one.
        description: text above the options that ``--help`` lists.

    Returns:
        The arguments, and the checkpoint of ``resume``; without it, an empty dict.

    Raises:
        RunError: if ``resume`` is not a checkpoint of such a run, if a fixed argument differs from
            the checkpoint's, or if the folder contains a run that is neither resumed nor
            overwritten.

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Args:
        ...     hidden_size: int = 64  # size of the hidden state
        ...     output: str = "runs/example"
        ...     resume: str | None = None
        ...     overwrite: bool = False
        >>> args, checkpoint = read_args(Args, ["--hidden-size", "32"])
        >>> args.hidden_size, checkpoint
        (32, {})
    """
    args: Any = tyro.cli(kind, args=argv, description=description)
    if args.overwrite and args.resume is not None:
        raise RunError("--resume continues a run, --overwrite deletes it: choose one of them")
    if args.overwrite:
        return args, {}
    if args.resume is None:
        if any(Path(args.output, name).exists() for name in FILES):
            raise RunError(
                f"{args.output} contains a run. Continue it with --resume {args.output}/{FILES[0]},"
                " delete it with --overwrite, or choose another --output."
            )
        return args, {}
    saved, checkpoint = _load(kind, args.resume)
    args = tyro.cli(kind, args=argv, default=saved, description=description)
    for name in ("output", *fixed):
        if getattr(args, name) != getattr(saved, name):
            raise RunError(f"{_option(name)} must be {getattr(saved, name)}, as in {args.resume}")
    return args, checkpoint


def _load(kind: type[Arguments], path: str) -> tuple[Arguments, dict[str, Any]]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        folder = str(Path(path).parent)
        return kind(**{**checkpoint["args"], "output": folder}), checkpoint
    except (OSError, EOFError, LookupError, TypeError, RuntimeError, UnpicklingError) as error:
        raise RunError(f"--resume is {path}: expected a checkpoint of this program") from error


def check_ranges(args: Any, **limits: tuple[float, float]) -> None:
    """Check that the numbers among the arguments of a run are in range.

    Args:
        args: dataclass of the arguments.
        **limits: least and greatest value of an argument, by its name. Other integers are at
            least 1, ``seed`` at least 0, and other floats at least 0.

    Raises:
        RunError: if a number is out of range.
    """
    for name, value in vars(args).items():
        lowest = int(type(value) is int and name != "seed")
        low, high = limits.get(name, (lowest, math.inf))
        if type(value) in (int, float) and not low <= value <= high:
            expected = f"at least {low}" if high == math.inf else f"a number from {low} to {high}"
            raise RunError(f"{_option(name)} is {value}: expected {expected}")


def _option(name: str) -> str:
    """Return the option of an argument, as ``--help`` writes it."""
    return f"--{name.replace('_', '-')}"


@contextmanager
def catch_signals() -> Iterator[threading.Event]:
    """Let Ctrl-C and SIGTERM end a loop after its current round.

    Inside the context the first of these signals sets the event that the context returns. A second
    one ends the program at once, also after the context, while a stopped program saves its state:
    only at an interactive prompt, such as a notebook's, does Python's handler of a signal that came
    return. Only the main thread of a program can use this.

    Examples:
        >>> with catch_signals() as stop:
        ...     while not stop.is_set():
        ...         break  # a round of training
    """
    stop = threading.Event()

    def handle(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            # Python's handler of Ctrl-C raises in the midst of a save, with a traceback.
            if signal.getsignal(number) is handle or hasattr(sys, "ps1"):
                signal.signal(number, handler)


def save_checkpoint(folder: str | Path, state: dict[str, Any]) -> None:
    """Write ``checkpoint.pt``; the file is complete at any time, also if the program is killed.

    Args:
        folder: of the run.
        state: tensors, numbers, strings, and nests of them.

    Raises:
        RunError: if it cannot be written, such as on a full disk.
    """
    part = Path(folder, "checkpoint.part")
    with _explain_write_errors(folder):
        torch.save(state, part)
        part.replace(part.with_suffix(".pt"))


def make_folder(folder: str | Path, resumed: bool) -> None:
    """Make the folder of a run, and delete the files that the run is going to write.

    Args:
        folder: of the run.
        resumed: whether the run continues; then only its result is deleted.

    Raises:
        RunError: if the folder cannot be written.
    """
    with _explain_write_errors(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in FILES[-1:] if resumed else FILES:
            Path(folder, name).unlink(missing_ok=True)


@contextmanager
def _explain_write_errors(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer raises the second one
        raise RunError(
            f"the folder {folder} cannot be written: {' '.join(str(error).split())}. A checkpoint "
            "that is there is complete: make room or choose a folder, and continue with --resume"
        ) from error


@contextmanager
def explain_resume_errors() -> Iterator[None]:
    """Raise a :class:`RunError` where the entries of a checkpoint are not those of a program.

    Examples:
        >>> checkpoint = {"policy": nn.Linear(2, 1).state_dict()}
        >>> with explain_resume_errors():
        ...     nn.Linear(3, 1).load_state_dict(checkpoint["policy"])
        Traceback (most recent call last):
        rnnkeys.runs.RunError: the checkpoint to resume was written by another version of ...
    """
    try:
        yield
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(
            "the checkpoint to resume was written by another version of this program, or by "
            f"another one: {type(error).__name__}, {' '.join(str(error).split())}"
        ) from error


class Run:
    """The progress of a training run, and its files.

    The folder ``args.output`` gets ``checkpoint.pt``, with everything that ``--resume`` needs;
    ``learning_curve.csv`` and ``learning_curve.png``, with a row for each evaluation; and
    ``result.json``. Files of another run in the folder are deleted.

    Args:
        args: dataclass of the arguments, with ``output`` and, for one of TorchRL's loggers in
            addition, ``logger``: ``"csv"``, ``"tensorboard"``, ``"wandb"`` or None.
        checkpoint: of :func:`read_args`. The run and its modules continue from it.
        title: of the picture.
        **modules: networks, optimizers and others with ``state_dict`` that a checkpoint contains.

    Attributes:
        frames: environment steps until now.
        episodes: episodes that have ended.
        seconds: duration until the last call of :meth:`count`, without pauses between programs.
        rows: rows of the learning curve.
        best: mean return and frame of the best evaluation and, if they were passed, its weights.
        returns: of the last 100 episodes, with exploration.
        losses: of the last 100 gradient steps.

    Examples:
        >>> from dataclasses import dataclass
        >>> from tempfile import TemporaryDirectory
        >>> @dataclass
        ... class Args:
        ...     output: str
        >>> with TemporaryDirectory() as folder:
        ...     run = Run(Args(folder), {}, policy=nn.Linear(3, 2))
        ...     run.record(torch.tensor([9.0, 11.0]))
        ...     run.save()
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['checkpoint.pt', 'learning_curve.csv', 'learning_curve.png']
        >>> run.best
        {'return': 10.0, 'frames': 0}
    """

    def __init__(
        self, args: Any, checkpoint: dict[str, Any], title: str = "", **modules: Any
    ) -> None:
        self.args = args
        self.title = title
        self.folder = Path(args.output)
        self.modules = modules
        self.frames = 0
        self.episodes = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"return": -math.inf}
        self.returns: deque[float] = deque(maxlen=100)
        self.losses: deque[float] = deque(maxlen=100)
        if checkpoint:
            self._restore(checkpoint)
        make_folder(self.folder, resumed=bool(checkpoint))
        self._logger = get_logger(getattr(args, "logger", None), str(self.folder), "log")
        self._start = time.perf_counter() - self.seconds

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        with explain_resume_errors():
            for name, module in self.modules.items():
                module.load_state_dict(checkpoint[name])
            for name in _PROGRESS:
                setattr(self, name, checkpoint[name])

    def count(self, data: TensorDictBase) -> None:
        """Add the frames and the episodes that end in a batch.

        Args:
            data: steps ``[*]`` with ``("next", "done")`` and ``("next", "episode_reward")``, of the
                transform ``RewardSum``, each ``[*, 1]``. Without the second entry, the caller
                extends ``returns``.
        """
        done = data["next", "done"]
        self.frames += data.numel()
        self.episodes += int(done.sum())
        returns = data.get(("next", "episode_reward"), None)
        if returns is not None:
            self.returns.extend(returns[done].tolist())
        self.seconds = time.perf_counter() - self._start

    def summarize(self) -> dict[str, float]:
        """Return the means over the last episodes and gradient steps, those that there are."""
        values = {"training_return": self.returns, "loss": self.losses}
        return {name: fmean(some) for name, some in values.items() if some}

    def record(self, returns: Tensor, policy: nn.Module | None = None, **metrics: float) -> None:
        """Add an evaluation to the learning curve, and keep the weights if they are the best.

        Args:
            returns: of the episodes of the evaluation, ``[N]``.
            policy: its weights are kept if the mean return is the greatest until now.
            **metrics: more columns of the row.
        """
        mean = returns.mean().item()
        if mean >= self.best["return"]:
            self.best = {"return": mean, "frames": self.frames}
            if policy is not None:
                state = policy.state_dict()
                self.best["policy"] = {name: value.clone() for name, value in state.items()}
        row = {
            "frames": self.frames,
            "seconds": round(self.seconds, 1),
            "episodes": self.episodes,
            "training_return": math.nan,
            "loss": math.nan,
            **self.summarize(),
            **metrics,
            "evaluation": mean,
            "evaluation_min": returns.min().item(),
            "evaluation_max": returns.max().item(),
        }
        self.rows.append(row)
        if self._logger is not None:
            self._logger.log_metrics(row, step=self.frames)
        with _explain_write_errors(self.folder):
            with (self.folder / "learning_curve.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
                writer.writerows(self.rows)
            self._draw(math.nan)

    def save(self, **more: Any) -> None:
        """Write the checkpoint: arguments, modules, progress.

        Args:
            **more: further entries of the checkpoint.
        """
        modules = {name: module.state_dict() for name, module in self.modules.items()}
        progress = {name: getattr(self, name) for name in _PROGRESS}
        save_checkpoint(self.folder, {"args": asdict(self.args), **modules, **progress, **more})

    def finish(self, returns: Tensor, **more: Any) -> str:
        """Write the result of a finished run, and draw it into the picture.

        Args:
            returns: of new episodes, ``[N]``, which test the weights.
            **more: further entries of the result.

        Returns:
            A sentence on the result.
        """
        mean = returns.mean().item()
        result = {
            "test_return": mean,
            "test_returns": returns.tolist(),
            "best_evaluation": self.best["return"],
            "best_frames": self.best["frames"],
            "frames": self.frames,
            "seconds": round(self.seconds, 1),
            **more,
            "args": asdict(self.args),
        }
        with _explain_write_errors(self.folder):
            (self.folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
            self._draw(mean)
        weights = f"Weights of frame {self.best['frames']}" if "policy" in self.best else "Weights"
        return (
            f"{weights}: mean return {mean:.1f} over {len(returns)} new episodes. "
            f"Picture: {self.folder / 'learning_curve.png'}"
        )

    def _draw(self, test_return: float) -> None:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        frames, mean, low, high, training = (
            [row[name] for row in self.rows]
            for name in (
                *("frames", "evaluation", "evaluation_min", "evaluation_max"),
                "training_return",
            )
        )
        axes.fill_between(frames, low, high, alpha=0.15, lw=0)
        axes.plot(frames, mean, "o-", ms=3, label="evaluation: mean and range")
        axes.plot(frames, training, "o-", ms=3, label="training, with exploration")
        if not math.isnan(test_return):
            axes.axhline(test_return, color="tab:green", ls="--", label=f"test: {test_return:.1f}")
        axes.set(title=self.title, xlabel="frames", ylabel="return")
        axes.legend(fontsize="small")
        figure.savefig(self.folder / "learning_curve.png", dpi=120)
