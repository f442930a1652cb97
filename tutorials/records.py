"""What a run leaves behind: a CSV of its evaluations, a picture, its result, a checkpoint."""

from __future__ import annotations

import csv
import json
import math
import pickle
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")  # a picture in a file: no display is needed
from matplotlib import pyplot as plt  # noqa: E402 (the backend is chosen before pyplot loads)


class Records:
    """The rows of a run, one for each evaluation, and the files they are written to.

    Args:
        folder: where the files go; it exists.
        title: what the picture is called.
        tensorboard: whether to write for TensorBoard too.
    """

    def __init__(self, folder: Path, title: str, *, tensorboard: bool = False) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint.pt"
        self.picture = folder / "learning_curve.png"
        self.title = title
        self.rows: list[dict[str, float]] = []
        self.board = _make_board(folder / "tensorboard") if tensorboard else None

    def add(self, **row: float) -> None:
        """Append a row, of the same columns as those before it, and write the CSV."""
        self.rows.append(row)
        with (self.folder / "learning_curve.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows({k: round(v, 6) for k, v in row.items()} for row in self.rows)
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, int(row["frames"]))
            self.board.flush()

    def last(self, column: str) -> float:
        return self.rows[-1][column] if self.rows else math.nan

    def write_result(self, result: dict[str, Any]) -> None:
        """Write what tested weights do on episodes never seen before, and draw it.

        Args:
            result: what goes to result.json; its ``"test_return"`` and ``"tested"``, which says
                what weights, are drawn.
        """
        (self.folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        self.draw(f"{result['tested']} on fresh episodes", result["test_return"])

    def draw(self, tested: str = "", test_return: float | None = None) -> None:
        """Draw the learning curve, and the return of the weights that were tested, if any were."""
        frames = [row["frames"] for row in self.rows]
        mean, low, high, training = (
            [row[column] for row in self.rows]
            for column in ("evaluation", "evaluation_min", "evaluation_max", "training_return")
        )
        fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
        ax.fill_between(frames, low, high, color="tab:blue", alpha=0.15, lw=0)
        for values, color, label in (
            (mean, "tab:blue", "evaluation: mean and range, no exploration"),
            (training, "tab:orange", "while training, with exploration"),
        ):
            ax.plot(frames, values, color=color, marker="o", ms=3, label=label)
        if test_return is not None:
            label = f"{tested}: {test_return:.1f}"
            ax.axhline(test_return, color="tab:green", ls="--", label=label)
        ax.set(title=self.title, xlabel="frames", ylabel="return of an episode")
        ax.set_xlim(left=0)
        ax.legend(loc="best", fontsize="small")
        ax.grid(alpha=0.3)
        fig.savefig(self.picture, dpi=120)
        plt.close(fig)


def _make_board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SystemExit(
            f"--tensorboard needs a package that is not there ({error}): pip install tensorboard"
        ) from None
    return SummaryWriter(str(folder))


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write ``checkpoint`` so that ``path`` holds a whole one at any time, the old or the new."""
    part = path.with_suffix(".part")
    torch.save(checkpoint, part)
    part.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, with ``weights_only``: a file from elsewhere must not run code.

    Raises:
        ValueError: if there is no such file, or no checkpoint in it.
    """
    if not path.exists():
        raise ValueError(f"--resume is {path}: no such file; a run leaves one in its --output")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        checkpoint = None
    if not isinstance(checkpoint, dict) or "settings" not in checkpoint:
        raise ValueError(f"--resume is {path}: expected a checkpoint.pt of this tutorial")
    return checkpoint
