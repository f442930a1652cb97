"""Measures how good the choice of ``recurrent_backend="auto"`` is on a CPU.

Run ``python -m benchmarks.fit_auto``: every backend and ``auto`` take turns on a grid of cells,
sizes and chances of a reset, forward alone and with a backward pass. It prints, as a page of
Markdown and worst first, what ``auto`` costs over the best single backend (its regret). Cases
beyond the limit are timed again, more often, before they count. The exit status is 1 if any is
left. On a machine that is not idle, ``--cpu-time`` counts the time that one thread computes, not
that which passes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch

from .cases import GATES, Case, Shape
from .contestants import AUTO, LOOP, PAD, PAD_OWN, SCAN, check_agreement
from .goals import regret
from .machine import cpu_facts
from .sequences import BOTH, FORWARD, Record, time_together
from .tables import case_columns, milliseconds, table
from .timing import Budget, Clock, geomean

LIMIT = 1.15
BACKENDS = (PAD, SCAN, LOOP)
# Ways to run that no name of a backend asks for; "auto" could choose them.
VARIANTS = (PAD_OWN,)
CONTESTANTS = (AUTO, *BACKENDS, *VARIANTS)
_regret = partial(regret, others=BACKENDS)

_ROWS_AND_STEPS = (
    (1, 64),
    (1, 1024),
    (8, 16),
    (8, 128),
    (8, 1024),
    (64, 16),
    (64, 128),
    (256, 32),
)
_RESETS = (0.0, 0.005, 0.02, 0.1, 0.5)


def fit_cases(quick: bool) -> list[Case]:
    """Return the cases to fit to."""
    rows_and_steps = _ROWS_AND_STEPS[2:4] if quick else _ROWS_AND_STEPS
    sizes = (64,) if quick else (64, 256)
    resets = (0.0, 0.1) if quick else _RESETS
    return [
        Case(cell, Shape(B, T, 64, H), p)
        for cell in GATES
        for B, T in rows_and_steps
        for H in sizes
        for p in resets
    ]


def measure(
    cases: Iterable[Case], budget: Budget, limit: float, clock: Clock = time.perf_counter
) -> list[Record]:
    """Time all contestants in all cases, twice where ``auto`` is beyond the limit."""
    records = []
    for phase in (BOTH, FORWARD):
        for case in cases:
            (record,) = time_together(phase, [(case, CONTESTANTS)], budget, clock)
            if _regret(record) > limit:
                patient = replace(budget, seconds=4 * budget.seconds, most=4 * budget.most)
                (record,) = time_together(phase, [(case, CONTESTANTS)], patient, clock)
            records.append(record)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return records


def summarize(records: Sequence[Record], limit: float) -> str:
    """Return the tables: all cases, worst first, then a line per cell and phase."""
    ranked = sorted(records, key=_regret, reverse=True)
    return "\n\n".join((_cases(ranked), _totals(records, limit)))


def _cases(records: Sequence[Record]) -> str:
    header = ("cell", "phase", "batch", "resets", *CONTESTANTS, "best", "regret")
    rows = []
    for record in records:
        best = min((*BACKENDS, *VARIANTS), key=record.seconds)
        times = (milliseconds(record.timings[name]) for name in CONTESTANTS)
        columns = (record.case.cell, record.phase, *case_columns(record.case))
        rows.append((*columns, *times, best, f"{_regret(record):.2f}"))
    return table(header, rows)


def _totals(records: Sequence[Record], limit: float) -> str:
    header = ("cell", "phase", "mean regret", "worst", f"over {limit:g}", "worst with variants")
    rows = []
    for cell in GATES:
        for phase in (BOTH, FORWARD):
            own = [r for r in records if (r.case.cell, r.phase) == (cell, phase)]
            regrets = [_regret(record) for record in own]
            with_variants = max(regret(record, (*BACKENDS, *VARIANTS)) for record in own)
            over = sum(value > limit for value in regrets)
            rows.append(
                (
                    cell,
                    phase,
                    f"{geomean(regrets):.2f}",
                    f"{max(regrets):.2f}",
                    f"{over} of {len(own)}",
                    f"{with_variants:.2f}",
                )
            )
    return table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit_auto", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a few cases, few samples")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"of the regret ({LIMIT})")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread")
    arguments = parser.parse_args(argv)
    if arguments.cpu_time:
        arguments.threads = 1
    torch.set_num_threads(arguments.threads)
    check_agreement(CONTESTANTS)
    what = "CPU time of one thread" if arguments.cpu_time else "time that passes"
    print(
        '# What `recurrent_backend="auto"` costs over the best backend\n\nWritten by `python -m '
        f"benchmarks.fit_auto`. Milliseconds per call, {what}; `±` is half the distance between "
        "the quartiles. The regret is the time of `auto` over that of the best single backend; the "
        "lower of its own time and that of the backend that it runs counts, which are one code.\n",
        table(("", ""), cpu_facts(arguments.threads).items()),
        sep="\n",
        end="\n\n",
    )
    budget = Budget(0.02, 3, 5) if arguments.quick else Budget(0.15, 5, 15)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    records = measure(fit_cases(arguments.quick), budget, arguments.limit, clock)
    print(summarize(records, arguments.limit))
    return int(any(_regret(record) > arguments.limit for record in records))


if __name__ == "__main__":
    sys.exit(main())
