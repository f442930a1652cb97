"""Do the policy-gradient tutorials learn? Several seeds, with and without memory, right and broken.

    python benchmarks/learn_policy_gradients.py                     # everything
    python benchmarks/learn_policy_gradients.py --variants cartpole --seeds 0 1

Each run is a tutorial in a process of its own. A run that has its result in ``--runs`` already is
not repeated, so that this can be broken off and started again. Tables and pictures go to
``benchmarks/results/recurrent_reinforce.*`` and ``recurrent_ppo.*``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torchrl

import rnnkeys

matplotlib.use("Agg")  # a picture in a file: no display is needed
from matplotlib import pyplot as plt  # noqa: E402 (the backend is chosen before pyplot loads)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
POSITIONS = ["--observation", "positions"]
SHORT = ["--episodes", "2000"]  # of those that never learn: more than the others need
REINFORCE = {
    "all, right": [],
    "all, broken": ["--broken", *SHORT],
    "positions, right": POSITIONS,
    "positions, broken": [*POSITIONS, "--broken", *SHORT],
    "positions, memoryless": [*POSITIONS, "--memoryless", *SHORT],
}
PPO = {
    "cartpole": [],
    "cartpole, memoryless": ["--memoryless"],
    "cartpole, GRU, shared": ["--cell", "gru", "--shared"],
    "pendulum": ["--env", "Pendulum-v1"],
    "mountain car": ["--env", "MountainCarContinuous-v0"],
}


@dataclass
class Run:
    """What one run of a tutorial left."""

    variant: str
    seed: int
    argv: list[str]
    curve: list[dict[str, float]]
    result: dict[str, Any]


def folder_of(runs: Path, script: str, variant: str, seed: int) -> Path:
    return runs / script / f"{variant}_{seed}".replace(", ", "_").replace(" ", "_")


def is_done(runs: Path, script: str, variant: str, seed: int) -> bool:
    return (folder_of(runs, script, variant, seed) / "result.json").exists()


def run(script: str, variant: str, seed: int, argv: list[str], runs: Path) -> Run:
    """Run a tutorial, unless its result is there already, and read what it left."""
    folder = folder_of(runs, script, variant, seed)
    argv = [*argv, "--seed", str(seed)]
    if not is_done(runs, script, variant, seed):
        process = subprocess.run(
            [sys.executable, str(ROOT / "tutorials" / f"{script}.py"), *argv]
            + ["--output", str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        if process.returncode:
            raise RuntimeError(f"{variant}, seed {seed} failed:\n{process.stderr[-2000:]}")
    with (folder / "learning_curve.csv").open(newline="") as file:
        curve = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    done = Run(variant, seed, argv, curve, json.loads((folder / "result.json").read_text()))
    row = reinforce_row(done) if script == "recurrent_reinforce" else ppo_row(done)
    print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return done


def reinforce_row(run: Run) -> dict[str, Any]:
    test = run.result["test_returns"]
    return {
        "variant": run.variant,
        "seed": run.seed,
        "mean of the last 100 episodes": round(run.result["last_100"], 1),
        "fresh episodes, no exploration": round(sum(test) / len(test), 1),
        "episodes": run.result["episodes"],
        "steps": run.result["steps"],
        "seconds": round(run.result["seconds"]),
    }


def ppo_row(run: Run) -> dict[str, Any]:
    test, seconds = run.result["test_returns"], run.result["seconds"]
    half = run.result["frames"] // 2
    middle = next((r["evaluation"] for r in run.curve if r["frames"] >= half), float("nan"))
    return {
        "variant": run.variant,
        "seed": run.seed,
        "frames": run.result["frames"],
        "evaluation half way": round(middle, 1),
        "evaluation at the end": round(run.curve[-1]["evaluation"], 1),
        "fresh episodes": round(sum(test) / len(test), 1),
        "min": round(min(test), 1),
        "max": round(max(test), 1),
        "seconds": round(sum(seconds.values())),
        "frames/s": round(run.result["frames"] / sum(seconds.values())),
    }


def write(script: str, title: str, text: str, runs: list[Run], row: Any) -> None:
    """Write the table of all seeds as CSV and Markdown."""
    rows = [row(run) for run in runs]
    with (RESULTS / f"{script}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    commands = {run.variant: " ".join(run.argv[:-2]) for run in runs}
    lines = [
        f"# {title}",
        "",
        f"Made by `python benchmarks/learn_policy_gradients.py`. {text}",
        "",
        *(f"- *{v}*: `python tutorials/{script}.py {c}`".rstrip() for v, c in commands.items()),
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows),
        "",
        f"![learning curves]({script}.png)",
        "",
        f"rnnkeys {rnnkeys.__version__}, torchrl {torchrl.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, one "
        "thread per run.",
        "",
    ]
    (RESULTS / f"{script}.md").write_text("\n".join(lines).replace(".py `", ".py`"))


def smooth(values: list[float], window: int = 100) -> list[float]:
    return [
        sum(part) / len(part)
        for i in range(1, len(values) + 1)
        if (part := values[max(0, i - window) : i])
    ]


def draw_reinforce(runs: list[Run]) -> None:
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    colors = {"right": "tab:blue", "broken": "tab:red", "memoryless": "tab:orange"}
    for ax, seen in zip(axes, ("all", "positions"), strict=True):
        if not any(run.variant.startswith(seen) for run in runs):
            continue
        for run in runs:
            observation, kind = run.variant.split(", ")
            if observation == seen:
                label = kind if run.seed == min(r.seed for r in runs) else None
                returns = smooth([row["return"] for row in run.curve])
                ax.plot(returns, color=colors[kind], lw=1, label=label)
        ax.axhline(475, color="tab:green", ls="--", lw=1)
        ax.set(title=f"CartPole-v1, {seen}", xlabel="episodes", ylim=(0, 515))
        ax.legend(loc="center right", fontsize="small")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("return, mean of the last 100 episodes")
    fig.savefig(RESULTS / "recurrent_reinforce.png", dpi=120)
    plt.close(fig)


def draw_ppo(runs: list[Run]) -> None:
    names = list(dict.fromkeys(run.variant.split(",")[0] for run in runs))
    fig, axes = plt.subplots(
        1, len(names), figsize=(5 * len(names), 4), layout="constrained", squeeze=False
    )
    palette = ["tab:blue", "tab:orange", "tab:purple"]
    for ax, name in zip(axes[0], names, strict=True):
        variants = list(dict.fromkeys(r.variant for r in runs if r.variant.split(",")[0] == name))
        for run in runs:
            if run.variant in variants:
                frames = [row["frames"] for row in run.curve]
                values = [row["evaluation"] for row in run.curve]
                label = run.variant if run.seed == runs[0].seed else None
                color = palette[variants.index(run.variant)]
                ax.plot(frames, values, color=color, lw=1, label=label)
        ax.set(title=name, xlabel="frames")
        ax.legend(loc="best", fontsize="small")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("return without exploration")
    fig.savefig(RESULTS / "recurrent_ppo.png", dpi=120)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    everything = [*REINFORCE, *PPO]
    parser.add_argument("--variants", nargs="+", default=everything, choices=everything)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "policy_gradients")
    parser.add_argument("--recorded", action="store_true", help="run nothing: report what is there")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for script, variants in (("recurrent_reinforce", REINFORCE), ("recurrent_ppo", PPO)):
        wanted = [
            (script, variant, seed, argv, options.runs)
            for variant, argv in variants.items()
            if variant in options.variants
            for seed in options.seeds
            if not options.recorded or is_done(options.runs, script, variant, seed)
        ]
        with ThreadPoolExecutor(options.jobs) as pool:
            runs = list(pool.map(lambda one: run(*one), wanted))
        if not runs:
            continue
        if script == "recurrent_reinforce":
            text = (
                "CartPole-v1: *all* of its state seen or its *positions* only; whole episodes from "
                "their first state (*right*), single steps from a zero state (*broken*), or no "
                "memory at all. A run stops when its last 100 episodes reach 475, or after 4,000 "
                "(2,000 where nothing is learned anyway)."
            )
            write(script, "REINFORCE with a GRU of two layers", text, runs, reinforce_row)
            draw_reinforce(runs)
        else:
            text = "Velocities are hidden in all environments; weights are those of the last step."
            write(script, "Recurrent PPO", text, runs, ppo_row)
            draw_ppo(runs)


if __name__ == "__main__":
    main()
