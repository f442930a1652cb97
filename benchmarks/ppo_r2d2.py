"""PPO against R2D2 on tasks with discrete actions, from finished runs of `make results`.

    python -m benchmarks.ppo_r2d2                        # reads runs/learn
    python -m benchmarks.ppo_r2d2 --runs FOLDER

It runs nothing. The table goes to ``benchmarks/results/ppo_r2d2.md``, and shows every seed.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.learn import ALL, RESULTS, ROOT, Run, describe_machine, folder_of, run
from benchmarks.summary import show_values
from benchmarks.tables import table


class Side(NamedTuple):
    """An algorithm's runs on a task.

    Attributes:
        algorithm: its name.
        experiment: where its runs are.
        variant: those of the experiment that count.
    """

    algorithm: str
    experiment: str
    variant: str


class Task(NamedTuple):
    """A task that both algorithms have run on.

    Attributes:
        title: name in the table.
        goal: return that a regular evaluation has to reach.
        sides: the runs of each algorithm.
    """

    title: str
    goal: float
    sides: tuple[Side, ...]


TASKS = (
    Task(
        "CartPole with its velocities hidden",
        475.0,
        (Side("PPO", "start_states_ppo", "stored, 64 steps"), Side("R2D2", "r2d2", "LSTM")),
    ),
    Task(
        "POPGym's RepeatPreviousEasy",
        0.5,
        (Side("PPO", "popgym_repeat_previous", "GRU"), Side("R2D2", "r2d2_memory", "LSTM")),
    ),
    Task(
        "passive T-maze, corridor of 50",
        0.9,
        (Side("PPO", "t_maze_50_ppo", "GRU"), Side("R2D2", "t_maze_50", "GRU")),
    ),
)
TEXT = """# PPO against R2D2

Made by `python -m benchmarks.ppo_r2d2` from the runs of the experiments that the table names, whose
pages have their settings and commands. Each algorithm has the settings and the cell of its own
experiment; neither was tuned for this comparison. R2D2's weights are those of its best regular
evaluation, PPO's those of its last step. The returns are those of fresh episodes without
exploration; intervals are bootstrap intervals of the mean over seeds. *Goal reached* is the frame
of the first regular evaluation that returned *goal* or more on average, for each seed; PPO is
evaluated less often. CPU minutes and goals are missing where the runs are older than this page.

{table}

{machine}, one thread per run; the pages of the experiments name the commits of their runs.
"""


def find_goal(done: Run, goal: float) -> str:
    """Return the frame of a run's first evaluation that reaches ``goal``, or a dash."""
    frames = (row["frames"] for row in done.curve if row["evaluation"] >= goal)
    return next((f"{one:,.0f}" for one in frames), "-")


def read_runs(side: Side, folder: Path) -> list[Run]:
    """Return the finished runs of one algorithm on one task, by seed."""
    seeds = ALL[side.experiment].seeds_of(side.variant)
    wanted = [(side.variant, seed) for seed in seeds]
    finished = [
        one for one in wanted if (folder_of(one, side.experiment, folder) / "result.json").exists()
    ]
    return [run(one, side.experiment, folder) for one in finished]


def show_runs(goal: float, runs: Sequence[Run]) -> list[str]:
    """Return the cells of an algorithm on a task: returns, frames, CPU minutes, goal reached."""
    return [
        *show_values([float(np.mean(one.result["test_returns"])) for one in runs]),
        f"{max(one.result['frames'] for one in runs):,}",
        f"{np.mean([one.cpu_seconds for one in runs]) / 60:.1f}",
        "; ".join(find_goal(one, goal) for one in runs),
    ]


def show_table(side: Side, folder: Path) -> list[str]:
    """Return the same cells from the table of an experiment, which has returns and frames alone.

    Args:
        side: the algorithm and its experiment.
        folder: where NAME.csv is.

    Returns:
        The cells; none if the table does not exist or has no such variant.
    """
    path = folder / f"{side.experiment}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["variant"] == side.variant]
    if not rows:
        return []
    returns = [float(row["fresh episodes: mean"]) for row in rows]
    return [*show_values(returns), f"{max(int(row['frames']) for row in rows):,}", "", ""]


def show_sides(task: Task, folder: Path) -> list[list[str]]:
    """Return a row for each algorithm on a task; none where one of them has not run."""
    rows = []
    for side in task.sides:
        runs = read_runs(side, folder)
        cells = show_runs(task.goal, runs) if runs else show_table(side, RESULTS)
        if not cells:
            return []
        page = f"[`{side.experiment}`]({side.experiment}.md), {side.variant}"
        rows.append([task.title, side.algorithm, page, *cells[:-1], f"{task.goal:g}", cells[-1]])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learn")
    options = parser.parse_args()
    rows = [row for task in TASKS for row in show_sides(task, options.runs)]
    header = ["task", "algorithm", "experiment", "return: mean [95 % interval]", "every seed"]
    header += ["frames", "CPU minutes", "goal", "goal reached, frames"]
    text = TEXT.format(table=table(header, rows), machine=describe_machine())
    (RESULTS / "ppo_r2d2.md").write_text(text)


if __name__ == "__main__":
    main()
