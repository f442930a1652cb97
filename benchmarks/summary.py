"""Statistics over the seeds of an experiment: means, their intervals, every seed's value."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .experiments import Experiment
from .tables import table

DRAWS = 10_000
OVERVIEW = """# Results

Every table of learning in this folder is made by `make results` or `make learn`; one of them by
`python -m benchmarks.learn EXPERIMENT`, which runs what is missing and continues what was
interrupted. Seeds count from 0. Each page names the version of its rows, and the seeds that were
run again since. Values are mean returns of episodes that were
not seen before, or shares of successes where the page says so; intervals are percentile bootstrap
intervals of the mean over seeds. A task that the feed-forward network solves tests no recurrence.

{table}
"""


def bootstrap_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean over seeds.

    Args:
        values: one value per seed.
        level: share of the bootstrap means inside the interval.

    Examples:
        >>> bootstrap_interval([3.0, 3.0, 3.0])
        (3.0, 3.0)
        >>> low, high = bootstrap_interval([0.0, 1.0, 2.0, 3.0])
        >>> bool(0 < low < 1.5 < high < 3)
        True
    """
    array = np.asarray(values, float)
    draws = np.random.default_rng(0).choice(array, (DRAWS, array.size)).mean(1)
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def interquartile_mean(values: Sequence[float]) -> float:
    """Return the mean of the middle half of the values, as rliable defines it.

    Source: R. Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical
    Precipice", arXiv:2108.13264. A quarter of the values is dropped at each end, rounded down.

    Examples:
        >>> interquartile_mean([0.0, 1.0, 2.0, 100.0])
        1.5
    """
    array = np.sort(np.asarray(values, float))
    cut = array.size // 4
    return float(array[cut : array.size - cut].mean())


def score(experiment: Experiment, returns: Sequence[float]) -> float:
    """Return the mean of the returns of a run's fresh episodes, or their share of successes.

    Examples:
        >>> one = Experiment("recurrent_ppo", "", "", {}, success=0.5)
        >>> score(one, [1.0, 1.0, 0.0, 0.9])
        0.75
    """
    if experiment.success is None:
        return float(np.mean(returns))
    return float(np.mean([value > experiment.success for value in returns]))


def read_milestone(experiment: Experiment, curve: Sequence[dict[str, float]], at: int) -> float:
    """Return ``y`` of the first row of a learning curve at ``at`` frames or later.

    Examples:
        >>> one = Experiment("recurrent_ppo", "", "", {})
        >>> curve = [{"frames": 5, "evaluation": 1.0}, {"frames": 9, "evaluation": 2.0}]
        >>> read_milestone(one, curve, 6)
        2.0
    """
    return next(row[experiment.y] for row in curve if row[experiment.x] >= at)


def _cell(values: Sequence[float]) -> list[str]:
    low, high = bootstrap_interval(values)
    digits = 2 if max(map(abs, values)) < 10 else 1
    mean, low, high, *each = (
        f"{value:.{digits}f}" for value in (np.mean(values), low, high, *values)
    )
    return [f"{mean} [{low}, {high}]", ", ".join(each)]


def summarize(experiment: Experiment, runs: Sequence[Any]) -> str:
    """Return a table of every variant: mean with 95 % interval, each seed's value, costs.

    Args:
        experiment: what was run.
        runs: finished runs, of :class:`benchmarks.learn.Run`.
    """
    what = "return" if experiment.success is None else "share of successes"
    header = [
        "",
        "",
        f"{what}: mean [95 % interval]",
        "every seed",
        "frames",
        "minutes",
        "CPU minutes",
    ]
    rows: list[list[str]] = []
    for variant in dict.fromkeys(run.variant for run in runs):
        group = [run for run in runs if run.variant == variant]
        costs = [
            f"{max(run.result['frames'] for run in group)}",
            f"{np.mean([run.result['seconds'] for run in group]) / 60:.1f}",
            f"{np.mean([run.cpu_seconds for run in group]) / 60:.1f}",
        ]
        for at in experiment.milestones:
            values = [read_milestone(experiment, run.curve, at) for run in group]
            rows.append([variant, f"at {at:,} frames", *_cell(values), *costs])
        values = [score(experiment, run.result["test_returns"]) for run in group]
        rows.append([variant, "fresh episodes", *_cell(values), *costs])
    rows += [
        [source, "published", value, "", "", "", ""]
        for source, value in experiment.published.items()
    ]
    return table(header, rows)


def write_overview(experiments: Mapping[str, Experiment], folder: Path) -> None:
    """Write ``README.md``: a table of every experiment that has results in ``folder``.

    Args:
        experiments: all experiments, by name.
        folder: where the files NAME.csv and NAME.md are.
    """
    rows: list[list[str]] = []
    for name, experiment in experiments.items():
        path = folder / f"{name}.csv"
        if not path.exists():
            continue
        with path.open(newline="") as file:
            runs = list(csv.DictReader(file))
        # Tables of version 0.1.0 have another name for the mean.
        names = (
            ("fresh episodes: mean", "test_mean") if experiment.success is None else ("success",)
        )
        column = next(name for name in names if name in runs[0])
        for variant in dict.fromkeys(run["variant"] for run in runs):
            values = [float(run[column]) for run in runs if run["variant"] == variant]
            mean, each = _cell(values)
            rows.append([f"[{experiment.title}]({name}.md)", variant, mean, each, f"`{name}`"])
    header = ["task", "network", "mean [95 % interval]", "every seed", "experiment"]
    (folder / "README.md").write_text(OVERVIEW.format(table=table(header, rows)))
