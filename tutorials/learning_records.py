"""What a run leaves behind: a CSV of its evaluations, a picture, its result, a checkpoint."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")  # a picture in a file: no display is needed
from matplotlib import pyplot as plt  # noqa: E402 (the backend is chosen before pyplot loads)

COLUMNS = (
    "frames",
    "seconds",
    "episodes",
    "training_return",
    "loss",
    "epsilon",
    "learning_rate",
    "greedy_return",
    "greedy_return_min",
    "greedy_return_max",
)


class Records:
    """The rows of a run, one for each evaluation, and the files they are written to.

    Args:
        folder: where the files go.
        title: what the picture is called.
    """

    def __init__(self, folder: Path, title: str) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint.pt"
        self.title = title
        self.rows: list[dict[str, float]] = []

    def add(self, **row: float) -> None:
        """Append a row, with an entry for each of ``COLUMNS``, and write the CSV."""
        self.rows.append(row)
        with (self.folder / "learning_curve.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({k: round(v, 6) for k, v in row.items()} for row in self.rows)

    def last(self, column: str, default: float) -> float:
        return self.rows[-1][column] if self.rows else default

    def write_result(self, settings: dict[str, Any], best: dict[str, Any], test: Tensor) -> None:
        """Write what the best weights do on episodes never seen before, and draw it.

        Args:
            settings: of the run.
            best: ``"frames"`` and ``"return"`` of the evaluation in which the weights were best.
            test: returns of the fresh episodes, ``[episodes]``.
        """
        result = {
            "test_return": test.mean().item(),
            "test_returns": test.tolist(),
            "best_evaluation": best["return"],
            "best_frames": best["frames"],
            "settings": settings,
        }
        (self.folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        self.draw(result["test_return"])

    def draw(self, test_return: float | None = None) -> None:
        """Draw the learning curve, and the return of the best weights if they were tested."""
        frames = [row["frames"] for row in self.rows]
        low, high = ([row[f"greedy_return_{end}"] for row in self.rows] for end in ("min", "max"))
        greedy = [row["greedy_return"] for row in self.rows]
        training = [row["training_return"] for row in self.rows]
        fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
        ax.fill_between(frames, low, high, color="tab:blue", alpha=0.15, lw=0)
        for values, color, label in (
            (greedy, "tab:blue", "greedy: mean and range of an evaluation"),
            (training, "tab:orange", "while training, with exploration"),
        ):
            ax.plot(frames, values, color=color, marker="o", ms=3, label=label)
        if test_return is not None:
            label = f"best checkpoint on fresh episodes: {test_return:.1f}"
            ax.axhline(test_return, color="tab:green", ls="--", label=label)
        ax.set(title=self.title, xlabel="frames", ylabel="return of an episode", ylim=(0, 515))
        ax.set_xlim(left=0)
        ax.legend(loc="best", fontsize="small")
        ax.grid(alpha=0.3)
        fig.savefig(self.folder / "learning_curve.png", dpi=120)
        plt.close(fig)


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
