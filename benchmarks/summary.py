"""Statistics over the seeds of an experiment: means, their intervals, every seed's value."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .experiments import CELLS, Experiment
from .tables import table

DRAWS = 10_000
OVERVIEW = """# Results

Every table of learning in this folder is made by `make results` or `make learn`; one of them by
`python -m benchmarks.learn EXPERIMENT`, which runs what is missing and continues what was
interrupted. Seeds count from 0. Each page names the version of its rows, and the seeds that were
run again since. Values are mean returns of episodes that were
not seen before, or shares of successes where the page says so; intervals are percentile bootstrap
intervals of the mean over seeds. The column *needs recurrence* compares the best recurrent network
of an experiment with the feed-forward one: *yes* if the whole interval of the feed-forward network
is below the mean of the recurrent one, *no* if it is not, and nothing where none was run: a task
with *no* tests no memory. Rows named *reference* are returns of random actions, or the best
possible ones.

## Beside published numbers

What others published is on the same task, but not always with the same settings or number of seeds;
each page says what differs, and has values at the frames that were published. Means of the fresh
episodes, with the number of seeds:

{published}

## Cells side by side

Means of the fresh episodes, with the number of seeds. The settings of a task are the same for every
cell, but for those that its page names:

{cells}

## All tasks

{table}

## All tasks together

Interquartile means of normalized values, of all seeds of all tasks that both kinds of networks have
run on and that name two reference values: 0 is the value of random or motionless behaviour, and 1
the best possible one, or a good one where that is not known. Of the recurrent networks, the first
of each table counts. Intervals are 95 % percentile intervals of a bootstrap that draws seeds in
each task by itself, as by R. Agarwal et al., arXiv:2108.13264.

{aggregates}

## More pages

- [PPO against R2D2](ppo_r2d2.md): returns, frames and CPU time on the same tasks.
- [CPU time until PPO returns 475](time_to_return.md) on CartPole without velocities, beside
  sb3-contrib, and [frames per second](recurrent_ppo_speed.md) of both.
- [Wrong next values](targets.md) of TorchRL's losses, loss by loss.
- [MAPPO and IPPO](recurrent_mappo.md); it needs rnnkeys[marl].

## Not run yet

- LunarLander without velocities has 500,000 frames; the zoo's settings are for 5 million.
- POPGym's games have 200,000 frames, and some a million; in the paper they have 15 million.
- The T-maze of 500 with an LSTM, a minGRU or an LRU, and more seeds of a GRU.
- MiniGrid-MemoryS9 has fewer seeds than the ten that were published.
- bsuite's `memory_len` has one seed and every third length.
"""
FEED_FORWARD = "feed-forward"


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


def interquartile_mean(values: Sequence[float] | np.ndarray) -> float:
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


def mean_of_second_half(
    experiment: Experiment, curve: Sequence[dict[str, float]], column: str
) -> float:
    """Return the mean of a column over the second half of a learning curve.

    Examples:
        >>> one = Experiment("r2d2", "", "", {})
        >>> curve = [{"frames": at, "lag": at + 1.0} for at in (4, 6, 10)]
        >>> mean_of_second_half(one, curve, "lag")
        9.0
    """
    half = curve[-1][experiment.x] / 2
    return float(np.mean([row[column] for row in curve if row[experiment.x] >= half]))


def show_values(values: Sequence[float]) -> list[str]:
    """Return the mean with its 95 % interval, and every value.

    Examples:
        >>> show_values([12.0, 14.0]), show_values([0.00512])
        (['13.0 [12.0, 14.0]', '12.0, 14.0'], ['0.0051 [0.0051, 0.0051]', '0.0051'])
    """
    low, high = bootstrap_interval(values)
    form = _choose_format(values)
    mean, low, high, *each = (f"{value:{form}}" for value in (np.mean(values), low, high, *values))
    return [f"{mean} [{low}, {high}]", ", ".join(each)]


def _show_mean(values: Sequence[float]) -> str:
    """Return the mean, and the number of values."""
    return f"{np.mean(values):{_choose_format(values)}} ({len(values)})"


def _choose_format(values: Sequence[float]) -> str:
    largest = max(map(abs, values))
    return ".2g" if 0 < largest < 0.01 else ".2f" if largest < 10 else ".1f"


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
        f"{experiment.x.removesuffix('s')}s",
        "minutes",
        "CPU minutes",
    ]
    rows: list[list[str]] = []
    solved: list[bool] = []
    for variant in dict.fromkeys(run.variant for run in runs):
        group = [run for run in runs if run.variant == variant]
        costs = [
            f"{max(run.curve[-1][experiment.x] for run in group):.0f}",
            f"{np.mean([run.result['seconds'] for run in group]) / 60:.1f}",
            f"{np.mean([run.cpu_seconds for run in group]) / 60:.1f}",
        ]
        last = min(run.curve[-1][experiment.x] for run in group)
        for at in (one for one in experiment.milestones if one <= last):
            values = [read_milestone(experiment, run.curve, at) for run in group]
            rows.append([variant, f"at {at:,} frames", *show_values(values), *costs])
        for column in experiment.also:
            values = [mean_of_second_half(experiment, run.curve, column) for run in group]
            label = f"{column.replace('_', ' ')}, second half"
            rows.append([variant, label, *show_values(values), *costs])
        if experiment.solved is not None:
            values = [float(np.mean([row[experiment.y] for row in run.curve])) for run in group]
            solved.append(bool(np.mean(values) > experiment.solved))
            rows.append([variant, "while training", *show_values(values), *costs])
        values = [score(experiment, run.result["test_returns"]) for run in group]
        rows.append([variant, "fresh episodes", *show_values(values), *costs])
    if solved:
        rows.append(["variants", "solved", f"{sum(solved)} of {len(solved)}", "", "", "", ""])
    rows += [
        [name, "reference", f"{value:.2f}", "", "", "", ""]
        for name, value in experiment.references.items()
    ]
    rows += [
        [source, "published", value, "", "", "", ""]
        for source, value in experiment.published.items()
    ]
    return table(header, rows)


def stratified_interval(
    groups: Sequence[Sequence[float]], level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of the interquartile mean, with seeds drawn in each task.

    Source: R. Agarwal et al., arXiv:2108.13264. ``rliable`` needs as many seeds in every task;
    this does not.

    Args:
        groups: the values of each task, one per seed.
        level: share of the bootstrap values inside the interval.

    Examples:
        >>> stratified_interval([[1.0, 1.0], [1.0]])
        (1.0, 1.0)
    """
    generator = np.random.default_rng(0)
    draws = [
        interquartile_mean(np.concatenate([generator.choice(one, len(one)) for one in groups]))
        for _ in range(DRAWS // 5)
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def read_results(experiment: Experiment, path: Path) -> dict[str, list[float]]:
    """Return the value of each seed, for each variant in a table of an experiment.

    Args:
        experiment: what was run.
        path: its table, NAME.csv.
    """
    with path.open(newline="") as file:
        runs = list(csv.DictReader(file))
    # Tables of version 0.1.0 have another name for the mean.
    names = ("fresh episodes: mean", "test_mean") if experiment.success is None else ("success",)
    column = next(name for name in names if name in runs[0])
    values: dict[str, list[float]] = {}
    for run in runs:
        values.setdefault(run["variant"], []).append(float(run[column]))
    return values


def find_feed_forward(values: Mapping[str, Sequence[float]]) -> Sequence[float]:
    """Return the values of the feed-forward variant; none if it was not run."""
    found = [each for variant, each in values.items() if FEED_FORWARD in variant]
    return found[0] if found else []


def needs_recurrence(values: Mapping[str, Sequence[float]]) -> str:
    """Return whether the feed-forward network does worse: ``yes``, ``no``, or nothing.

    Variants that name their frames have more of them, and are not compared.

    Args:
        values: values of every seed, by variant.

    Examples:
        >>> needs_recurrence({"GRU": [5.0, 6.0], "feed-forward": [1.0, 2.0]})
        'yes'
        >>> needs_recurrence({"GRU": [5.0, 6.0], "feed-forward": [5.0, 7.0]})
        'no'
        >>> needs_recurrence({"GRU": [5.0], "GRU, 1M frames": [9.0], "feed-forward": [5.0, 7.0]})
        'no'
        >>> needs_recurrence({"GRU": [5.0, 6.0]})
        ''
    """
    baseline = find_feed_forward(values)
    others = [
        np.mean(each)
        for variant, each in values.items()
        if FEED_FORWARD not in variant and "frames" not in variant
    ]
    if not baseline or not others:
        return ""
    return "yes" if bootstrap_interval(baseline)[1] < max(others) else "no"


def _aggregate(results: Mapping[str, tuple[Experiment, dict[str, list[float]]]]) -> str:
    """Return a table of both kinds of networks over all tasks."""
    groups: dict[str, list[list[float]]] = {"recurrent": [], FEED_FORWARD: []}
    for experiment, values in results.values():
        baseline = find_feed_forward(values)
        if experiment.scale is None or not baseline:
            continue
        low, high = experiment.scale
        for kind, each in (("recurrent", next(iter(values.values()))), (FEED_FORWARD, baseline)):
            groups[kind].append([(value - low) / (high - low) for value in each])
    rows = []
    for kind, tasks in groups.items():
        if tasks:
            low, high = stratified_interval(tasks)
            mean = interquartile_mean(np.concatenate(tasks))
            seeds = sum(map(len, tasks))
            rows.append([kind, f"{mean:.2f} [{low:.2f}, {high:.2f}]", f"{len(tasks)}", f"{seeds}"])
    return table(["networks", "interquartile mean [95 % interval]", "tasks", "runs"], rows)


def _compare(results: Mapping[str, tuple[Experiment, dict[str, list[float]]]]) -> str:
    """Return a table of what others published and of what was reached here."""
    rows = []
    for name, (experiment, values) in results.items():
        if experiment.published:
            theirs = "; ".join(
                f"{source}: {value}" for source, value in experiment.published.items()
            )
            ours = [f"{variant} {_show_mean(each)}" for variant, each in values.items()]
            rows.append([f"[{experiment.title}]({name}.md)", theirs, "; ".join(ours)])
    return table(["task", "published", "rnnkeys"], rows)


def _compare_cells(results: Mapping[str, tuple[Experiment, dict[str, list[float]]]]) -> str:
    """Return a table of the tasks that more than two recurrent cells have run on."""
    rows = []
    for name, (experiment, values) in results.items():
        if len(set(values) & set(CELLS)) > 3:
            means = [_show_mean(values[cell]) if cell in values else "" for cell in CELLS]
            rows.append([f"[{experiment.title}]({name}.md)", *means])
    return table(["task", *CELLS], rows)


def write_overview(experiments: Mapping[str, Experiment], folder: Path) -> None:
    """Write ``README.md``: a table of every experiment that has results in ``folder``.

    Args:
        experiments: all experiments, by name.
        folder: where the files NAME.csv and NAME.md are.
    """
    results = {
        name: (experiment, read_results(experiment, path))
        for name, experiment in experiments.items()
        if (path := folder / f"{name}.csv").exists()
    }
    rows: list[list[str]] = []
    for name, (experiment, values) in results.items():
        title, mark = f"[{experiment.title}]({name}.md)", needs_recurrence(values)
        for variant, each in values.items():
            rows.append([title, variant, *show_values(each), mark, f"`{name}`"])
        for reference, value in experiment.references.items():
            rows.append([title, f"reference: {reference}", f"{value:.2f}", "", mark, f"`{name}`"])
    header = [
        "task",
        "network",
        "mean [95 % interval]",
        "every seed",
        "needs recurrence",
        "experiment",
    ]
    text = OVERVIEW.format(
        published=_compare(results),
        cells=_compare_cells(results),
        table=table(header, rows),
        aggregates=_aggregate(results),
    )
    (folder / "README.md").write_text(text)
