"""Does memory decide whether CartPole is learned without its velocities? Several seeds, both ways.

    python benchmarks/learn_dqn.py                  # seeds 0 to 4, with and without memory
    python benchmarks/learn_dqn.py --seeds 0 1 --jobs 1
    python benchmarks/learn_dqn.py --variants gru --name gru_dqn
    python benchmarks/learn_dqn.py --variants pixels --seeds 0 --name pixel_dqn

Each run is ``tutorials/recurrent_dqn.py`` with its defaults, in a process of its own. A run that
has its result in ``--runs`` already is not repeated, so that this can be broken off and started
again. The results go to ``benchmarks/results/``, to ``recurrent_dqn.md``, ``.csv`` and ``.png`` or
whatever ``--name`` says.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import torch
import torchrl

import rnnkeys

matplotlib.use("Agg")  # a picture in a file: no display is needed
from matplotlib import pyplot as plt  # noqa: E402 (the backend is chosen before pyplot loads)

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tutorials" / "recurrent_dqn.py"
RESULTS = ROOT / "benchmarks" / "results"
OPTIONS = {
    "recurrent": [],
    "memoryless": ["--memoryless"],
    "gru": ["--cell", "gru"],
    "pixels": ["--observation", "pixels"],
}
COLORS = dict(zip(OPTIONS, ("tab:blue", "tab:orange", "tab:green", "tab:purple"), strict=True))


@dataclass
class Run:
    """What one run of the tutorial left."""

    variant: str
    seed: int
    seconds: float
    curve: list[dict[str, float]]
    result: dict

    @property
    def command(self) -> str:
        return f"python tutorials/recurrent_dqn.py {' '.join(arguments(self.variant, self.seed))}"

    def row(self) -> dict[str, str | int | float]:
        test = self.result["test_returns"]
        return {
            "variant": self.variant,
            "seed": self.seed,
            "test_mean": round(sum(test) / len(test), 1),
            "test_min": min(test),
            "test_max": max(test),
            "best_evaluation": round(self.result["best_evaluation"], 1),
            "best_frames": self.result["best_frames"],
            "frames": int(self.curve[-1]["frames"]),
            "seconds": round(self.seconds),
            "command": self.command,
        }


def arguments(variant: str, seed: int) -> list[str]:
    return [*OPTIONS[variant], "--seed", str(seed)]


def run(variant_and_seed: tuple[str, int], runs: Path) -> Run:
    """Run the tutorial, unless its result is there already, and read what it left."""
    variant, seed = variant_and_seed
    folder = runs / f"{variant}_{seed}"
    clock = folder / "seconds.txt"
    if not clock.exists():
        start = time.perf_counter()
        _run_tutorial([*arguments(variant, seed), "--output", str(folder)])
        clock.write_text(f"{time.perf_counter() - start:.1f}\n")
    with (folder / "learning_curve.csv").open(newline="") as file:
        curve = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    result = json.loads((folder / "result.json").read_text())
    done = Run(variant, seed, float(clock.read_text()), curve, result)
    print("  ".join(f"{k} {v}" for k, v in done.row().items()), flush=True)
    return done


def _run_tutorial(argv: list[str]) -> None:
    process = subprocess.run(
        [sys.executable, str(SCRIPT), *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"the tutorial failed with {argv}:\n{process.stderr[-2000:]}")


def write_csv(runs: list[Run], path: Path) -> None:
    rows = [run.row() for run in runs]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(runs: list[Run], command: str, path: Path) -> None:
    rows = [run.row() for run in runs]
    names = [name.replace("_", " ") for name in rows[0]]
    lines = [
        "# DQN on CartPole with its velocities hidden",
        "",
        f"Made by `{command}`, which runs the commands of the table. *test* is the return over "
        f"{len(runs[0].result['test_returns'])} fresh episodes of the weights that did best in the "
        "regular evaluations (*best evaluation*); an episode's return is at most 500. *seconds* "
        "are those of the whole command, from its start to its picture.",
        "",
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
        *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows),
        "",
        f"![learning curves]({path.with_suffix('.png').name})",
        "",
        f"{describe_machine()}.",
        "",
    ]
    path.write_text("\n".join(lines))


def describe_machine() -> str:
    return (
        f"rnnkeys {rnnkeys.__version__}, torchrl {torchrl.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores"
    )


def draw(runs: list[Run], path: Path) -> None:
    """Draw each run's evaluations as a thin line, and their mean over the seeds as a thick one."""
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for variant, color in COLORS.items():
        curves = [run.curve for run in runs if run.variant == variant]
        if not curves:
            continue
        for curve in curves:
            frames = [row["frames"] for row in curve]
            ax.plot(frames, [row["greedy_return"] for row in curve], color=color, lw=0.7, alpha=0.5)
        rows = list(zip(*curves, strict=False))
        mean = [sum(row["greedy_return"] for row in at) / len(at) for at in rows]
        label = variant + (f": {len(curves)} seeds and their mean" if len(curves) > 1 else "")
        ax.plot([at[0]["frames"] for at in rows], mean, color=color, lw=2.5, label=label)
    ax.set(xlabel="frames", ylabel="greedy return", ylim=(0, 515))
    ax.set_title("CartPole with its velocities hidden: DQN on the CPU")
    ax.legend(loc="center right")
    ax.grid(alpha=0.3)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    compared = ["recurrent", "memoryless"]
    parser.add_argument("--variants", nargs="+", default=compared, choices=OPTIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--name", default="recurrent_dqn", help="of the files of results")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learn_dqn")
    options = parser.parse_args()
    wanted = [(variant, seed) for variant in options.variants for seed in options.seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(partial(run, runs=options.runs), wanted))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / options.name
    write_csv(runs, path.with_suffix(".csv"))
    write_markdown(runs, describe_command(options), path.with_suffix(".md"))
    draw(runs, path.with_suffix(".png"))


def describe_command(options: argparse.Namespace) -> str:
    seeds = " ".join(map(str, options.seeds))
    variants = " ".join(options.variants)
    where = f"--name {options.name}"
    return f"python benchmarks/learn_dqn.py --variants {variants} --seeds {seeds} {where}"


if __name__ == "__main__":
    main()
