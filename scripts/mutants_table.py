"""The table of the mutants: score by folder, and a word on every survivor.

    python -m scripts.mutants_table            # after python -m scripts.mutants

Why a mutant is equivalent, or survives, stands in ``benchmarks/results/mutants.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.mutants import (
    FOLDERS,
    KILLED,
    ROOT,
    SURVIVED,
    UNUSABLE,
    draw_mutations,
    parse_arguments,
    read_all_results,
)

TABLE = ROOT / "benchmarks" / "results" / "mutants.md"
WORDS = ROOT / "benchmarks" / "results" / "mutants.json"
HEAD = """# Mutants

Each mutant is one small change in the body of a function of the package: another comparison,
operator or constant, an inverted condition, exchanged arguments, a dropped keyword or statement.
Changes are drawn by a fixed seed, {count} from each folder and {inside} more inside the positional
arguments of a call, which have a row of their own; {ran} of these {drawn} have run. For each, tests
that run its lines are run, for some seconds only, until one fails. One that survived ran again
after a test was added; for twelve of these, that test alone ran, with the change in the source.
Where a change was expected to survive, from reading it, the test was written before its first run,
so that the numbers "at first" are better than those of the tests before. A mutant that no measured
test runs is not counted.

Kernels for CUDA devices, Ray's actors and the processes that tests start are out of reach of this
method, and tests marked `slow` are left out.

The score is the part killed of the mutants that are not equivalent: an equivalent one changes no
result, only speed or the way to it.

| folder | mutants | killed at first | killed now | equivalent | survive | score |
|---|---|---|---|---|---|---|
"""


def write_table(path: Path = TABLE) -> None:
    """Write the table from the results and the reasons."""
    words = json.loads(WORDS.read_text(encoding="utf-8"))
    options = parse_arguments([])
    sample = {mutation.name: mutation for mutation in draw_mutations(options)}
    runs = {
        name: results
        for name, results in read_all_results().items()
        if name in sample and results[-1]["verdict"] != UNUSABLE
    }
    first = {name: results[0]["verdict"] for name, results in runs.items()}
    last = {name: results[-1] for name, results in runs.items()}
    counts = {"count": options.count, "inside": options.inside}
    text = HEAD.format(**counts, ran=len(last), drawn=len(sample))
    groups = {f: [n for n in last if n.startswith(f"rnnkeys/{f}/")] for f in FOLDERS}
    inside = {name for name in last if sample[name].is_inside}
    groups = {folder: [n for n in names if n not in inside] for folder, names in groups.items()}
    groups |= {"inside arguments": sorted(inside), "all": list(last)}
    verdicts = {name: result["verdict"] for name, result in last.items()}
    text += "".join(_rows(groups, first, verdicts, words["equivalent"]))
    survived = sorted(name for name in last if last[name]["verdict"] == SURVIVED)
    found = [name for name in first if first[name] == SURVIVED and last[name]["verdict"] == KILLED]
    text += _section("Survived at first, killed now", {n: last[n]["detail"] for n in sorted(found)})
    left = {
        name: words["survives"].get(name, f"line {sample[name].line}; not looked at")
        for name in survived
        if name not in words["equivalent"]
    }
    text += _section("Survive", left)
    equivalent = {name: words["equivalent"].get(name) for name in survived}
    text += _section("Equivalent", {name: word for name, word in equivalent.items() if word})
    path.write_text(text, encoding="utf-8")


def _rows(
    groups: dict[str, list[str]], first: dict[str, str], last: dict[str, str], equivalent: Any
) -> Iterator[str]:
    for group, names in groups.items():
        killed = sum(last[name] == KILLED for name in names)
        at_first = sum(last[name] == first[name] == KILLED for name in names)
        equal = sum(last[name] == SURVIVED and name in equivalent for name in names)
        survive = sum(last[name] == SURVIVED for name in names) - equal
        if killed + survive:
            counts = (len(names), at_first, killed - at_first, equal, survive)
            row = (group, *counts, f"{killed / (killed + survive):.1%}")
            yield f"| {' | '.join(map(str, row))} |\n"


def _section(title: str, words: dict[str, str]) -> str:
    items = "".join(f"- `{name}`: {word}\n" for name, word in words.items())
    return f"\n## {title}\n\n{items or 'None.' + chr(10)}"


if __name__ == "__main__":
    sys.exit(write_table())
