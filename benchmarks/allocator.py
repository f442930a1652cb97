"""Measure the time that is saved if the process keeps the memory that it frees.

Run ``python -m benchmarks.allocator``. glibc gives large pieces of memory back to the system as
soon as they are freed, and the next pass gets them again, page by page. Environment variables stop
it, which take effect where a process begins: children with and without them take turns. Results go
to ``benchmarks/results/allocator.md``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median

import torch

from .cases import GATES, Case, Shape
from .child_process import run_module
from .contestants import AUTO, NATIVE
from .machine import cpu_facts
from .sequences import BOTH, time_together
from .tables import case_columns, digits, table
from .timing import Budget

RESULTS = Path(__file__).resolve().parent / "results" / "allocator.md"
KEEP = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
WAYS: dict[str, dict[str, str]] = {"default": {}, "kept": KEEP}
CASES = tuple(
    Case(cell, shape, resets)
    for cell in GATES
    for shape in (Shape(16, 64, 64, 128), Shape(64, 128, 64, 128), Shape(32, 512, 64, 128))
    for resets in (0.0, 0.1)
)
ROUNDS, THREADS = 3, 2

# Seconds of a call by case (its place in CASES) and contestant.
Seconds = dict[str, float]


def time_cases(cases: Iterable[Case], budget: Budget) -> Seconds:
    """Time forward and backward passes in this process."""
    return {
        f"{place} {name}": record.seconds(name)
        for place, case in enumerate(cases)
        for record in time_together(BOTH, [(case, (NATIVE, AUTO))], budget)
        for name in (NATIVE, AUTO)
    }


def report(runs: Mapping[str, list[Seconds]], cases: tuple[Case, ...]) -> str:
    """Return a table of medians over the processes of each way."""
    rows = []
    for place, case in enumerate(cases):
        row = [case.cell, *case_columns(case)]
        for name in (NATIVE, AUTO):
            default, kept = (median(run[f"{place} {name}"] for run in runs[way]) for way in WAYS)
            row += [digits(1e3 * default), digits(1e3 * kept), f"{default / kept:.2f}"]
        rows.append(row)
    columns = [f"{name}{what}" for name in (NATIVE, AUTO) for what in ("", ", kept", ", ratio")]
    return table(("cell", "batch", "resets", *columns), rows)


def main() -> None:
    """Measure in child processes; with the argument ``child``, be one of them."""
    torch.set_num_threads(THREADS)
    if sys.argv[1:] == ["child"]:
        json.dump(time_cases(CASES, Budget(1.0, 5, 15)), sys.stdout)
        return
    facts = cpu_facts(THREADS)
    runs: dict[str, list[Seconds]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, found in runs.items():
            found.append(run_module("benchmarks.allocator", "child", variables=WAYS[way]))
    variables = " ".join(f"{name}={value}" for name, value in KEEP.items())
    text = [
        "# Memory that the process keeps",
        "Written by `python -m benchmarks.allocator`. Milliseconds of a forward and backward pass, "
        f"by default and with `{variables}`: medians over {ROUNDS} processes each, which took "
        "turns. `nn` is `nn.LSTM` or `nn.GRU` on the same batch without resets.",
        table(("", ""), list(facts.items())),
        report(runs, CASES),
    ]
    RESULTS.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print(text[-1])


if __name__ == "__main__":
    main()
