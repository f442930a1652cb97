"""Measures speed and memory on a CPU, side by side with what else there is.

Run ``python -m benchmarks.bench_cpu``: 25 minutes on two idle cores; figures, tables and pictures
go to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import contestants
from .cases import GATES, Grid, full_grid, quick_grid, short_grid
from .machine import cpu_facts, load
from .memory import measure
from .pictures_cpu import draw_all
from .records import Results
from .report_cpu import write_report
from .sequences import BOTH, FORWARD, names_for, time_growth, time_together
from .steps import one_core, time_collectors, time_modules, time_policies
from .timing import Budget

RESULTS = Path(__file__).resolve().parent / "results"
_FIGURES, _PAGE = "cpu.json", "cpu.md"

Say = Callable[[str], None]


def run_sequences(grid: Grid, results: Results, quick: bool, say: Say) -> None:
    """Time the grid."""
    budget = Budget(0.1, 3, 5) if quick else Budget(0.25, 3, 11)
    for phase, cases in ((BOTH, grid.cases), (FORWARD, grid.forward)):
        for case in cases:
            say(f"{phase}: {case.cell} {case.shape} resets {case.resets}")
            results.sequences += time_together(phase, [(case, names_for(case))], budget)


def run_growth(grid: Grid, results: Results, quick: bool, say: Say) -> None:
    """Time rows of growing length."""
    budget = Budget(0.1, 3, 5) if quick else Budget(0.5, 3, 15)
    for cell in GATES:
        say(f"growth: {cell}")
        cases = [case for case in grid.growth if case.cell == cell]
        results.growth += time_growth(cases, grid.growth_torchrl, budget)


def run_steps(grid: Grid, results: Results, quick: bool, say: Say) -> None:
    """Time single steps and collection."""
    step = Budget(0.3, 3, 9, 0.02) if quick else Budget(2.0, 9, 51, 0.02)
    collect = Budget(0.3, 3, 3) if quick else Budget(2.0, 5, 11)
    with one_core():
        for cell in GATES:
            for batch in grid.batches:
                say(f"steps: {cell}, {batch} at a time")
                results.steps.append(time_modules(cell, batch, step))
                results.steps.append(time_policies(cell, batch, step))
            for environments in grid.environments:
                say(f"collection: {cell}, {environments} environments")
                results.steps.append(time_collectors(cell, environments, collect))


def run_memory(grid: Grid, results: Results, quick: bool, say: Say) -> None:
    """Measure peak memory."""
    threads = torch.get_num_threads()
    say("memory")
    ours = (contestants.VENDOR, contestants.AUTO, contestants.STARTS, contestants.SCAN)
    results.memory += measure([(case, contestants.ALL) for case in grid.memory], threads)
    if grid.memory_growth:
        results.memory_growth += measure([(case, ours) for case in grid.memory_growth], threads)


PARTS: dict[str, Callable[[Grid, Results, bool, Say], None]] = {
    "sequences": run_sequences,
    "growth": run_growth,
    "steps": run_steps,
    "memory": run_memory,
}


def run(grid: Grid, parts: Sequence[str], threads: int, quick: bool, say: Say) -> Results:
    """Measure.

    Args:
        grid: what to measure.
        parts: names of ``PARTS``, in the order to run them.
        threads: of torch, for sequences and memory.
        quick: whether to take few samples.
        say: told what runs next.
    """
    torch.set_num_threads(threads)
    # Whoever computes something else is not worth timing.
    contestants.check_agreement()
    results = Results(cpu_facts(threads))
    for part in parts:
        PARTS[part](grid, results, quick, say)
    results.machine["load when it ended"] = load()
    return results


def _say_with_time(start: float) -> Say:
    def say(text: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {text}", file=sys.stderr, flush=True)

    return say


def _render(folder: Path) -> None:
    results = Results.load(folder / _FIGURES)
    (folder / _PAGE).write_text(write_report(results, draw_all(results, folder)))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_cpu")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a small grid; ends in a minute")
    size.add_argument(
        "--short",
        action="store_true",
        help="a part of the grid; ends in ten minutes; needs --output",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument(
        "--output", type=Path, help="folder for figures, tables and pictures (benchmarks/results)"
    )
    parser.add_argument(
        "--render", action="store_true", help="measure nothing, write tables and pictures anew"
    )
    arguments = parser.parse_args(argv)
    if arguments.short and not arguments.output:
        parser.error("--short must not replace the figures of a whole run: name an --output")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = _arguments(argv)
    folder = arguments.output or RESULTS
    if arguments.render:
        _render(folder)
        return
    grid = quick_grid() if arguments.quick else short_grid() if arguments.short else full_grid()
    say = _say_with_time(time.perf_counter())
    results = run(grid, arguments.only, arguments.threads, arguments.quick, say)
    print(write_report(results))
    # A quick look, or a part of a run, must not replace the kept figures of a whole one.
    if arguments.output or not (arguments.quick or arguments.only != list(PARTS)):
        folder.mkdir(parents=True, exist_ok=True)
        results.save(folder / _FIGURES)
        _render(folder)


if __name__ == "__main__":
    main()
