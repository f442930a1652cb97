"""Kill, stop and starve runs of the tutorials, and see that they continue or end with one line.

    python -m scripts.chaos                               # all tutorials, 20 kills each
    python -m scripts.chaos --tutorials r2d2 --kills 5 --seed 1
    python -m scripts.chaos --only actor Ray              # scenarios whose name has a word

After every disturbance the run is started again: it must keep the rows of its checkpoint, finish,
and leave no process and no temporary file. The table goes to ``benchmarks/results/chaos.md``; the
folder of a run with a problem is kept. It needs Linux.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from .program import ARGUMENTS, NEEDS, Program, load_tutorial
from .scenarios import Scenario, disturb, list_actor_scenarios, list_scenarios

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "chaos.md"
HEAD = """\
# Runs that were killed, stopped and starved

Made by `make chaos`. Runs of a second are disturbed and started again. *18 / 20*: of 20 runs, 18
had no problem. After a kill or a signal no temporary file and no process is left, and the next run
keeps every row of the checkpoint and finishes. With a full disk, a read-only folder or a wrong
checkpoint the run ends with exit status 1 or 2 and a line that names the cause, and the next run
finishes from the last good checkpoint. A run that loses an actor warns and finishes. Every
checkpoint was loaded with `weights_only=True`.
"""


class Outcome(NamedTuple):
    """What one disturbance led to; ``problem`` is empty where all is well."""

    tutorial: str
    scenario: str
    problem: str


def run_tutorial(name: str, base: Path, options: argparse.Namespace) -> Iterator[Outcome]:
    """Run all disturbances of one tutorial."""
    load_tutorial(name)
    start = time.perf_counter()
    problem = Program(name, base / "first").check_next_run()
    seconds = time.perf_counter() - start
    yield Outcome(name, "undisturbed", problem)

    def choose(scenarios: Iterator[Scenario]) -> Iterator[Scenario]:
        for scenario, run in scenarios:
            if not options.only or any(word in scenario for word in options.only):
                yield scenario, run

    forks = choose(list_scenarios(options.kills, options.writes, seconds))
    scripts = choose(list_actor_scenarios(name))
    for folder, scenarios, is_script in (("f", forks, False), ("s", scripts, True)):
        for scenario, problem in disturb(name, base / folder, scenarios, is_script):
            yield Outcome(name, scenario, problem)


def format_table(outcomes: list[Outcome]) -> str:
    """Return a table of the outcomes by scenario and tutorial, and the problems."""
    names = list(dict.fromkeys(one.tutorial for one in outcomes))
    lines = [HEAD, "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for scenario in dict.fromkeys(one.scenario for one in outcomes):
        cells = []
        for name in names:
            problems = [o.problem for o in outcomes if (o.tutorial, o.scenario) == (name, scenario)]
            cells.append(f"{problems.count('')} / {len(problems)}" if problems else "")
        lines.append(f"| {scenario} | " + " | ".join(cells) + " |")
    bad = [f"- {o.tutorial}, {o.scenario}: {o.problem}" for o in outcomes if o.problem]
    if bad:
        lines += ["", "Problems:", "", *bad]
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the campaign; the exit status is 1 if there was a problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tutorials", nargs="+", choices=ARGUMENTS, default=list(ARGUMENTS))
    parser.add_argument("--kills", type=int, default=20, help="at random moments")
    parser.add_argument("--writes", type=int, default=60, help="file operations, at most")
    parser.add_argument("--only", nargs="+", help="scenarios whose name contains a word")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=RESULTS, help="file for the table")
    options = parser.parse_args()
    random.seed(options.seed)
    torch.set_num_threads(1)
    outcomes = []
    base = Path(tempfile.mkdtemp(prefix="c-"))  # paths of Ray's sockets have to be short
    base.chmod(0o755)
    for number, name in enumerate(options.tutorials):
        if name in NEEDS and find_spec(NEEDS[name]) is None:
            print(f"{name}  skipped: it needs {NEEDS[name]} (pip install 'rnnkeys[marl]')")
            continue
        for outcome in run_tutorial(name, base / str(number), options):
            outcomes.append(outcome)
            print(*outcome[:2], outcome.problem or "ok", sep="  ", flush=True)
            options.report.write_text(format_table(outcomes))
    sys.exit(any(one.problem for one in outcomes))


if __name__ == "__main__":
    main()
