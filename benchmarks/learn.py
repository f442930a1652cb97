"""Run the tutorials with several seeds, and compare recurrent with feed-forward networks.

    python -m benchmarks.learn                                # all experiments: hours
    python -m benchmarks.learn recurrent_dqn --seeds 0 1 --jobs 1
    python -m benchmarks.learn recurrent_dqn --variants LSTM
    python -m benchmarks.learn t_maze --seeds 0               # all whose names start with t_maze_
    python -m benchmarks.learn recurrent_ppo --recorded       # report the finished runs
    python -m benchmarks.learn --suite results                # tasks with published numbers

Each run is a process. A finished run in ``--runs`` is not repeated, and an interrupted one
continues, so that this program can be stopped (Ctrl-C, once) and started again. The table and the
picture of each experiment go to ``benchmarks/results/`` and contain every run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torchrl
from PIL import Image
from tqdm import tqdm

import rnnkeys
from benchmarks.ablations import ABLATIONS
from benchmarks.bsuite_tasks import BSUITE
from benchmarks.experiments import EXPERIMENTS, EXTRAS, Experiment
from benchmarks.popgym_tasks import POPGYM
from benchmarks.published import PUBLISHED, PUBLISHED_EXTRAS
from benchmarks.summary import score, summarize, write_overview
from rnnkeys.runs import catch_signals

matplotlib.use("Agg")  # a picture in a file: no display is needed
from matplotlib import pyplot as plt  # noqa: E402 (the backend is chosen before pyplot loads)

SUITES = {
    "learn": EXPERIMENTS,
    "results": PUBLISHED | POPGYM | BSUITE | ABLATIONS,
    "extras": EXTRAS | PUBLISHED_EXTRAS,
}
ALL = EXPERIMENTS | PUBLISHED | POPGYM | BSUITE | ABLATIONS | EXTRAS | PUBLISHED_EXTRAS
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class Run:
    """The files of a finished run."""

    experiment: Experiment
    variant: str
    seed: int
    folder: Path
    curve: list[dict[str, float]]
    result: dict[str, Any]
    cpu_seconds: float
    commit: str

    def row(self) -> dict[str, Any]:
        """Return the run's row of the table."""
        test = self.result["test_returns"]
        rest = {
            name: shorten(value)
            for name, value in self.result.items()
            if isinstance(value, int | float) and name != "test_return"
        }
        return {
            "variant": self.variant,
            "seed": self.seed,
            "fresh episodes: mean": shorten(sum(test) / len(test)),
            "min": shorten(min(test)),
            "max": shorten(max(test)),
            **({} if self.experiment.success is None else {"success": self.score()}),
            f"{self.experiment.y} half way": shorten(self.half_way()),
            f"{self.experiment.y} at the end": shorten(self.curve[-1][self.experiment.y]),
            **rest,
        }

    def score(self) -> float:
        """Return the value that the summary shows."""
        return score(self.experiment, self.result["test_returns"])

    def half_way(self) -> float:
        x, y = self.experiment.x, self.experiment.y
        return next(row[y] for row in self.curve if row[x] >= self.curve[-1][x] / 2)


def shorten(value: float) -> float:
    """Round to one digit after the point, or to three where the value is less than ten.

    Examples:
        >>> shorten(421.21875), shorten(-0.03255)
        (421.2, -0.033)
    """
    return round(value, 1 if abs(value) >= 10 else 3)


class Stopped(Exception):
    """A run has no result: it ended because a signal came."""


def run(
    variant_and_seed: tuple[str, int],
    name: str,
    runs: Path,
    stop: threading.Event | None = None,
) -> Run:
    """Run a tutorial unless it has finished before, and read its files.

    Args:
        variant_and_seed: what to run of the experiment.
        name: name of the experiment.
        runs: folder of all runs.
        stop: ends the run, which saves a checkpoint, when it is set.

    Raises:
        Stopped: ``stop`` was set before the run finished.
    """
    variant, seed = variant_and_seed
    stop = threading.Event() if stop is None else stop
    experiment, folder = ALL[name], folder_of(variant_and_seed, name, runs)
    if not (folder / "result.json").exists():
        if stop.is_set():
            raise Stopped
        argv = [*experiment.program(variant), "--seed", str(seed), "--output", str(folder)]
        if (folder / "checkpoint.pt").exists():  # the run was interrupted
            argv += ["--resume", str(folder / "checkpoint.pt")]
        seconds = run_tutorial(argv, stop) + read_cpu_seconds(folder)
        if not folder.exists():  # it ended before its first file
            raise Stopped
        (folder / "cpu_seconds.txt").write_text(f"{seconds:.1f}\n")
        (folder / "commit.txt").write_text(find_commit())
        if not (folder / "result.json").exists():
            raise Stopped
    with (folder / "learning_curve.csv").open(newline="") as file:
        curve = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    result = json.loads((folder / "result.json").read_text())
    commit = folder / "commit.txt"
    return Run(
        experiment,
        variant,
        seed,
        folder,
        curve,
        result,
        read_cpu_seconds(folder),
        commit.read_text().strip() if commit.exists() else "unknown",
    )


def folder_of(variant_and_seed: tuple[str, int], name: str, runs: Path) -> Path:
    variant, seed = variant_and_seed
    return runs.resolve() / name / f"{variant}_{seed}".replace(", ", "_").replace(" ", "_")


def find_commit() -> str:
    """Return the commit that is checked out, ``unknown`` outside of a repository."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def read_cpu_seconds(folder: Path) -> float:
    """Return the CPU time of a run; 0 where it was not written, as in runs of older versions."""
    path = folder / "cpu_seconds.txt"
    return float(path.read_text()) if path.exists() else 0.0


def run_tutorial(argv: list[str], stop: threading.Event) -> float:
    """Run Python with the words of a tutorial, and return its CPU time in seconds.

    The tutorial has a session of its own, so that Ctrl-C reaches it once, when ``stop`` is set.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *argv],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        process.returncode, seconds = wait_for(process, stop)
        if process.returncode and not stop.is_set():
            errors.seek(0)
            raise RuntimeError(f"python {' '.join(argv)} fails:\n{errors.read()[-2000:]}")
    return seconds


def wait_for(process: subprocess.Popen[bytes], stop: threading.Event) -> tuple[int, float]:
    """Return a program's exit code and its seconds of CPU; interrupt it once ``stop`` is set."""
    told = False
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if stop.is_set() and not told:
            process.send_signal(signal.SIGINT)
            told = True
        time.sleep(0.1)


def write_csv(runs: list[Run], path: Path) -> None:
    rows = [run.row() for run in runs]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(name: str, runs: list[Run], path: Path) -> None:
    experiment, rows = ALL[name], [run.row() for run in runs]
    shown = dict.fromkeys(run.variant for run in runs)
    lines = [
        f"# {experiment.title}",
        "",
        f"Made by `python -m benchmarks.learn {name}`. {experiment.text} *fresh episodes* were "
        f"played without exploration; there are {len(runs[0].result['test_returns'])} of them.",
        "",
        *(f"- *{variant}*: `{command(experiment, variant)}`" for variant in shown),
        "",
        summarize(experiment, runs),
        "",
        "| " + " | ".join(column.replace("_", " ") for column in rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows),
        "",
        *list_missing(experiment, runs),
        f"![learning curves]({path.with_suffix('.png').name})",
        "",
        f"{describe_machine()}, one thread per run. Runs are of commit "
        f"{', '.join(sorted({run.commit for run in runs}))}.",
        "",
    ]
    path.write_text("\n".join(lines))


def list_missing(experiment: Experiment, runs: Sequence[Run]) -> list[str]:
    """Return a line that names the seeds of the experiment without a run, if there are any."""
    done = {(run.variant, run.seed) for run in runs}
    missing = {
        variant: [str(seed) for seed in experiment.seeds_of(variant) if (variant, seed) not in done]
        for variant in experiment.variants
    }
    each = [f"{variant}: {', '.join(seeds)}" for variant, seeds in missing.items() if seeds]
    return [f"Seeds that have not run yet: {'; '.join(each)}.", ""] if each else []


def command(experiment: Experiment, variant: str) -> str:
    return f"python {' '.join(experiment.program(variant))} --seed SEED"


def describe_machine() -> str:
    return (
        f"rnnkeys {rnnkeys.__version__}, torchrl {torchrl.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores"
    )


def draw(runs: list[Run], path: Path) -> None:
    """Draw each run as a thin line, and the mean over the seeds of a variant as a thick line."""
    experiment = runs[0].experiment
    rows = 1 + len(experiment.also)
    size = (7, 4 + 2.5 * len(experiment.also))
    heights = [4.0] + [2.5] * len(experiment.also)
    fig, axes = plt.subplots(
        rows, figsize=size, height_ratios=heights, sharex=True, squeeze=False, layout="constrained"
    )
    for ax, column in zip(axes[:, 0], (experiment.y, *experiment.also), strict=True):
        draw_curves(ax, runs, column)
        ax.set_ylabel(column.replace("_", " "))
        ax.grid(alpha=0.3)
        if column in experiment.also:
            ax.set_yscale("log")
    axes[0, 0].set_title(experiment.title)
    axes[0, 0].legend(loc="best", fontsize="small")
    axes[-1, 0].set_xlabel(experiment.x)
    pixels = BytesIO()
    fig.savefig(pixels, dpi=120)
    plt.close(fig)
    # A picture of few colors takes a third of the space with a palette.
    Image.open(pixels).convert("RGB").quantize(64).save(path, optimize=True)


def draw_curves(ax: Any, runs: list[Run], column: str) -> None:
    experiment = runs[0].experiment
    palette = plt.get_cmap("tab10" if len(experiment.variants) <= 10 else "tab20")
    colors = dict(zip(experiment.variants, palette.colors, strict=False))  # pyright: ignore[reportAttributeAccessIssue]
    for variant in dict.fromkeys(run.variant for run in runs):
        curves = [run.curve for run in runs if run.variant == variant]
        color, label = colors[variant], f"{variant}: {len(curves)} seeds"
        for curve in curves:
            x, y = ([row[name] for row in curve] for name in (experiment.x, column))
            ax.plot(x, y, color=color, lw=0.8, alpha=0.5)
        together = list(zip(*curves, strict=False))  # up to the end of the shortest
        x, y = (
            [sum(row[name] for row in rows) / len(rows) for rows in together]
            for name in (experiment.x, column)
        )
        ax.plot(x, y, color=color, lw=2.5, label=label.replace(": 1 seeds", ""))


def find_wanted(name: str, options: argparse.Namespace) -> list[tuple[str, int]]:
    """List the variants and seeds of an experiment that the command line selects."""
    experiment = ALL[name]
    wanted = [
        (variant, seed)
        for variant in options.variants or experiment.variants
        if variant in experiment.variants
        for seed in options.seeds or experiment.seeds_of(variant)
    ]
    if not options.recorded:
        return wanted
    folders = {one: folder_of(one, name, options.runs) for one in wanted}
    return [one for one in wanted if (folders[one] / "result.json").exists()]


def find_names(words: Sequence[str]) -> list[str]:
    """Return the experiments with these names, and all of each family that a word names.

    Raises:
        ValueError: a word names no experiment.

    Examples:
        >>> find_names(["r2d2", "start_states"])
        ['r2d2', 'start_states_ppo']
    """
    names: list[str] = []
    for word in words:
        found = [word] if word in ALL else [name for name in ALL if name.startswith(f"{word}_")]
        if not found:
            raise ValueError(f"no experiment is called {word}: expected {', '.join(ALL)}")
        names += found
    return names


def run_all(wanted: dict[str, list[tuple[str, int]]], jobs: int, runs: Path) -> bool:
    """Run what is wanted of each experiment, and report each that is done.

    Args:
        wanted: variants and seeds, by the name of their experiment.
        jobs: runs at the same time.
        runs: folder of all runs.

    Returns:
        Whether all is done; a signal stops the runs, which go on with the next call.
    """
    bar = tqdm(total=sum(map(len, wanted.values())), unit=" runs")
    with bar, catch_signals() as stop, ThreadPoolExecutor(jobs) as pool:
        futures = {
            name: [pool.submit(run, one, name, runs, stop) for one in each]
            for name, each in wanted.items()
        }
        try:
            for name, each in futures.items():
                bar.set_description(name)
                for future in as_completed(each):
                    bar.write("  ".join(f"{k} {v}" for k, v in future.result().row().items()))
                    bar.update()
                report(name, [future.result() for future in each])
        except Stopped:
            return False
        finally:
            stop.set()  # after an error the other runs save a checkpoint and end
            pool.shutdown(wait=False, cancel_futures=True)
    return True


def report(name: str, runs: list[Run]) -> None:
    RESULTS.mkdir(exist_ok=True)
    write_csv(runs, RESULTS / f"{name}.csv")
    write_markdown(name, runs, RESULTS / f"{name}.md")
    draw(runs, RESULTS / f"{name}.png")
    write_overview(ALL, RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="EXPERIMENT", help=", ".join(ALL))
    parser.add_argument("--suite", choices=SUITES, default="learn", help="all of these")
    parser.add_argument("--variants", nargs="+", help="run only these variants")
    parser.add_argument("--seeds", type=int, nargs="+", help="run these seeds")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learn")
    parser.add_argument("--recorded", action="store_true", help="report finished runs, run nothing")
    options = parser.parse_args()
    try:
        names = find_names(options.names) or list(SUITES[options.suite])
    except ValueError as error:
        parser.error(str(error))
    wanted = {name: each for name in names if (each := find_wanted(name, options))}
    if not run_all(wanted, options.jobs, options.runs):
        print("Stopped. Finished runs are kept; the same command continues the others.")
        sys.exit(130)


if __name__ == "__main__":
    main()
