"""Measure speed and memory on a CPU, side by side with torch and TorchRL.

Run ``python -m benchmarks.bench_cpu``: at most 20 minutes on two idle cores; figures, tables and
pictures go to ``benchmarks/results/cpu``. Cases without time left are left out and counted on the
page. What was measured is kept at every moment in ``cpu_unfinished.json`` beside them, so that a
run that is interrupted, by Ctrl-C for example, loses nothing: ``--render cpu_unfinished.json``
makes a page.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rnnkeys.backends import keep_freed_memory

from . import contestants
from .cases import GATES, Grid, full_grid, quick_grid
from .machine import cpu_facts, load
from .memory import measure
from .pictures_cpu import draw_all
from .records import Results
from .report_cpu import write_report
from .sequences import BOTH, FORWARD, names_for, time_growth, time_together
from .steps import one_core, time_collectors, time_modules, time_policies
from .timing import Budget

RESULTS = Path(__file__).resolve().parent / "results" / "cpu"
_FIGURES, _PAGE, _UNFINISHED = "cpu.json", "cpu.md", "cpu_unfinished.json"
_MINUTES = 18.0

Report = Callable[[str], None]


class Watch:
    """Prints which case runs next, and when the time is over.

    Args:
        minutes: the time limit, from now.
        keep: called before each message, to save the results so far.
    """

    def __init__(self, minutes: float, keep: Callable[[], None] = lambda: None) -> None:
        self._start, self._seconds, self._keep = time.perf_counter(), 60 * minutes, keep

    def __call__(self, text: str) -> None:
        """Save the results so far, and print what runs next."""
        self._keep()
        print(f"{self._passed():6.0f} s  {text}", file=sys.stderr, flush=True)

    def is_over(self) -> bool:
        """Whether the time is over, so that no further case should begin."""
        return self._passed() > self._seconds

    def _passed(self) -> float:
        return time.perf_counter() - self._start


def run_sequences(grid: Grid, results: Results, quick: bool, watch: Watch) -> None:
    """Time the grid; leave out cases for which no time is left."""
    budget = Budget(0.1, 3, 5) if quick else Budget(0.2, 2, 9)
    wanted = [(BOTH, case) for case in grid.cases] + [(FORWARD, case) for case in grid.forward]
    for done, (phase, case) in enumerate(wanted):
        if watch.is_over():
            left = len(wanted) - done
            results.machine["left out for lack of time"] = f"{left} of {len(wanted)} cases"
            return
        watch(f"{phase}: {case.cell} {case.shape} resets {case.resets}")
        results.sequences += time_together(phase, [(case, names_for(case))], budget)


def run_growth(grid: Grid, results: Results, quick: bool, report: Report) -> None:
    """Time rows of growing length."""
    budget = Budget(0.1, 3, 5) if quick else Budget(0.5, 3, 15)
    for cell in GATES:
        report(f"growth: {cell}")
        cases = [case for case in grid.growth if case.cell == cell]
        results.growth += time_growth(cases, grid.growth_torchrl, budget)


def run_steps(grid: Grid, results: Results, quick: bool, report: Report) -> None:
    """Time single steps and collection."""
    step = Budget(0.3, 3, 9, 0.02) if quick else Budget(2.0, 9, 51, 0.02)
    collect = Budget(0.3, 3, 3) if quick else Budget(2.0, 5, 11)
    with one_core():
        for cell in GATES:
            for batch in grid.batches:
                report(f"steps: {cell}, {batch} at a time")
                results.steps.append(time_modules(cell, batch, step))
                results.steps.append(time_policies(cell, batch, step))
            for environments in grid.environments:
                report(f"collection: {cell}, {environments} environments")
                results.steps.append(time_collectors(cell, environments, collect))


def run_memory(grid: Grid, results: Results, quick: bool, report: Report) -> None:
    """Measure peak memory."""
    threads = torch.get_num_threads()
    report("memory")
    ours = (contestants.NATIVE, contestants.AUTO, contestants.SCAN)
    results.memory += measure([(case, contestants.ALL) for case in grid.memory], threads)
    if grid.memory_growth:
        results.memory_growth += measure([(case, ours) for case in grid.memory_growth], threads)


# The part that takes all remaining time is last.
PARTS: dict[str, Callable[[Grid, Results, bool, Watch], None]] = {
    "steps": run_steps,
    "memory": run_memory,
    "growth": run_growth,
    "sequences": run_sequences,
}


def run(
    results: Results, grid: Grid, parts: Sequence[str], threads: int, quick: bool, watch: Watch
) -> None:
    """Measure.

    Args:
        results: to fill.
        grid: what to measure.
        parts: names of ``PARTS``, in the order to run them.
        threads: of torch, for sequences and memory.
        quick: whether to take few samples.
        watch: prints the name of each case before it runs.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    # A contestant with other results is not worth timing.
    contestants.check_agreement()
    for part in parts:
        PARTS[part](grid, results, quick, watch)
    results.machine["load when it ended"] = load()


def _render(folder: Path, figures: str = _FIGURES) -> None:
    results = Results.load(folder / figures)
    (folder / _PAGE).write_text(write_report(results, draw_all(results, folder)))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_cpu", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a small grid; ends in a minute")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument(
        "--output", type=Path, help="folder of figures, tables, pictures (benchmarks/results/cpu)"
    )
    parser.add_argument("--minutes", type=float, default=_MINUTES, help=f"limit ({_MINUTES:g})")
    parser.add_argument(
        "--render",
        nargs="?",
        const=_FIGURES,
        metavar="FIGURES",
        help=f"measure nothing, write tables and pictures again from a file ({_FIGURES})",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = _arguments(argv)
    folder = arguments.output or RESULTS
    if arguments.render:
        _render(folder, arguments.render)
        return
    grid = quick_grid() if arguments.quick else full_grid()
    results = Results(cpu_facts(arguments.threads))
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / _UNFINISHED
    watch = Watch(arguments.minutes, lambda: results.save(unfinished))
    try:
        run(results, grid, arguments.only, arguments.threads, arguments.quick, watch)
    except KeyboardInterrupt:
        results.machine["cut off"] = "yes"
        results.save(unfinished)
        print(write_report(results))
        sys.exit(f"Cut off. What was measured is in {unfinished}.")
    unfinished.unlink(missing_ok=True)
    print(write_report(results))
    # A quick look, or a part of a run, must not replace the kept figures of a whole one.
    if arguments.output or not (arguments.quick or arguments.only != list(PARTS)):
        results.save(folder / _FIGURES)
        _render(folder)


if __name__ == "__main__":
    main()
