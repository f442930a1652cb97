"""Call every entry point with thousands of bad batches and arguments, and keep a table.

    python -m scripts.fuzz                                      # 5,000 batches for each
    python -m scripts.fuzz --only Windows R2D2Loss --examples 1000 --seed 3

Hypothesis draws one or two changes of a batch (``tests.support.bad_batches``). A call has a right
result, or raises an error in the package's own words that names what was changed, and leaves the
batch as it was; everything else is a problem, which ends the draws of that entry point. Wrong
arguments are few: all are tried. The table is ``benchmarks/results/fuzz.md``; a row stays until its
entry point runs again.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.support.bad_batches import Change, Outcome, changes, try_call
from tests.support.fuzzed_arguments import ARGUMENTS, try_wrong_argument
from tests.support.fuzzed_calls import CALLS, make_batch

TABLE = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "fuzz.md"
NAME_OF_ARGUMENTS = "wrong arguments"
HEAD = """# Bad batches and arguments

Made by `make fuzz`. Each row is an entry point that was called with so many changed batches: with
entries that are missing, nested, of another rank, dtype or device, empty, not finite, huge,
expanded, or only laid out differently. *Result*: the call returned what it returns for the same
numbers in plain memory. *Error*: it raised one of the package's own errors, which names the entry
or the batch, and the batch was bit by bit what it had been. *Problem*: the first draw that had
neither outcome.

| entry point | draws | result | error | problem |
|---|---|---|---|---|
"""

FOUND = "## Found and mended\n"
"""Title of a list that is written by hand, and stays when the table is written again."""

Rows = dict[str, tuple[str, ...]]
"""Cells of the table by entry point."""


def read_table(path: Path = TABLE) -> Rows:
    """Return the rows of the table."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [line.strip("| ").split(" | ", 4) for line in lines if line.startswith("| ")][1:]
    return {name: tuple(cells) for name, *cells in rows if name != "all"}


def write_table(rows: Rows, path: Path = TABLE) -> None:
    """Write the rows, and their sum."""
    sums = [sum(int(row[i].replace(",", "")) for row in rows.values()) for i in range(3)]
    bad = sum(row[3] != "none" for row in rows.values())
    every = {**rows, "all": (*(f"{number:,}" for number in sums), str(bad or "none"))}
    lines = (f"| {' | '.join([name, *cells])} |\n" for name, cells in every.items())
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    _, title, found = text.partition(FOUND)
    found = f"\n{title}{found}" if title else ""
    path.write_text(HEAD + "".join(lines) + found, encoding="utf-8")


def fuzz_call(name: str, examples: int, number: int) -> tuple[Counter[str], str]:
    """Draw changed batches for a call.

    Args:
        name: of the call, in ``CALLS``.
        examples: batches to draw.
        number: seed of the draws.

    Returns:
        How many calls had a result and how many an error, and the problem in its smallest form;
        without any, the empty text.
    """
    call = CALLS[name]
    counts: Counter[str] = Counter()
    phases = [Phase.generate, Phase.shrink]
    checks: list[Any] = list(HealthCheck)
    options = settings(max_examples=examples, phases=phases, suppress_health_check=checks)

    @seed(f"{number} {name}")
    @settings(options, deadline=None, database=None)
    @given(changes(tuple(call.keys)))
    def draw(made: list[Change]) -> None:
        outcome = try_call(call.run, make_batch, made)
        counts[outcome.kind] += 1
        assert outcome.fault is None, f"{made}: {outcome.fault}"

    try:
        draw()
    except AssertionError as error:
        return counts, str(error)
    return counts, ""


def try_arguments() -> tuple[Counter[str], str]:
    """Try every wrong argument; returns what :func:`fuzz_call` returns."""
    outcomes: list[Outcome] = [
        try_wrong_argument(argument, value) for argument in ARGUMENTS for value in argument[3]
    ]
    problems = [one.fault for one in outcomes if one.fault]
    return Counter(one.kind for one in outcomes), problems[0] if problems else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Call every entry point; the exit status is 1 if one has a problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*CALLS, NAME_OF_ARGUMENTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--examples", type=int, default=5000, help="for each entry point")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rows = {name: row for name, row in read_table().items() if name in names}
    for name in options.only:
        if name == NAME_OF_ARGUMENTS:
            counts, problem = try_arguments()
        else:
            counts, problem = fuzz_call(name, options.examples, options.seed)
        results, errors = counts["result"], counts["error"]
        cells = (f"{number:,}" for number in (results + errors, results, errors))
        rows[name] = (*cells, " ".join(problem.split()) or "none")
        print(name, *rows[name], sep=" | ", flush=True)
        write_table({key: rows[key] for key in names if key in rows})
    return int(any(row[3] != "none" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
