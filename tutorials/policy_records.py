"""What a run of recurrent PPO leaves behind: CSV, picture, TensorBoard, result, film."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from rnnkeys import get_env_transforms_from_module

matplotlib.use("Agg")  # a picture in a file: no display is needed
from matplotlib import pyplot as plt  # noqa: E402 (the backend is chosen before pyplot loads)


class Records:
    """The rows of a run, one for each evaluation, and the files they are written to.

    Args:
        folder: where the files go; made if it does not exist.
        title: what the picture is called.
        tensorboard: whether to write for TensorBoard too.
    """

    def __init__(self, folder: Path, title: str, *, tensorboard: bool = False) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint.pt"
        self.title = title
        self.rows: list[dict[str, float]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.board = _make_board(folder / "tensorboard") if tensorboard else None

    def add(self, **row: float) -> None:
        """Append a row and write the CSV."""
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

    def write_result(
        self, settings: dict[str, Any], test: Tensor, seconds: dict[str, float], frames: int
    ) -> None:
        """Write and draw what the last weights do on fresh episodes, ``test`` ``[episodes]``."""
        result = {
            "test_return": test.mean().item(),
            "test_returns": test.tolist(),
            "frames": frames,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "settings": settings,
        }
        (self.folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        self.draw(result["test_return"])

    def draw(self, test_return: float | None = None) -> None:
        """Draw the learning curve, and the return of the last weights if they were tested."""
        frames = [row["frames"] for row in self.rows]
        low, high = ([row[f"evaluation_{end}"] for row in self.rows] for end in ("min", "max"))
        fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
        ax.fill_between(frames, low, high, color="tab:blue", alpha=0.15, lw=0)
        mean, training = (
            [row[column] for row in self.rows] for column in ("evaluation", "training_return")
        )
        ax.plot(frames, mean, color="tab:blue", label="without exploration: mean and range")
        ax.plot(frames, training, color="tab:orange", label="while training, with exploration")
        if test_return is not None:
            label = f"last weights on fresh episodes: {test_return:.1f}"
            ax.axhline(test_return, color="tab:green", ls="--", label=label)
        ax.set(title=self.title, xlabel="frames", ylabel="return of an episode")
        ax.legend(loc="best", fontsize="small")
        ax.grid(alpha=0.3)
        fig.savefig(self.folder / "learning_curve.png", dpi=120)
        plt.close(fig)


def _make_board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SystemExit(
            f"--tensorboard needs a package that is not there ({error}): pip install tensorboard"
        ) from None
    return SummaryWriter(str(folder))


@torch.no_grad()
@set_exploration_type(ExplorationType.DETERMINISTIC)
def film(env: TransformedEnv, policy: TensorDictModuleBase, path: Path, seed: int) -> int:
    """Play an episode without exploration, film it, and return the number of its frames."""
    env.append_transform(get_env_transforms_from_module(policy))
    env.set_seed(seed)
    step, frames = env.reset(), []
    done = False
    while not done:
        frames.append(Image.fromarray(np.asarray(env.render()[0])))
        step, ahead = env.step_and_maybe_reset(policy(step))
        done = bool(step["next", "done"].all())
        step = ahead
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=33, loop=0)
    env.close()
    return len(frames)
