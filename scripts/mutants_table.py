"""The table of the mutants: score by folder, and a word on every survivor.

    python -m scripts.mutants_table            # after python -m scripts.mutants

Reasons why a mutant is equivalent stand in ``benchmarks/results/mutants_equivalent.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.mutants import FOLDERS, KILLED, ROOT, SURVIVED, read_all_results

TABLE = ROOT / "benchmarks" / "results" / "mutants.md"
EQUIVALENT = ROOT / "benchmarks" / "results" / "mutants_equivalent.json"
HEAD = """# Mutants

Each mutant is one small change in the body of a function of the package: another comparison,
operator or constant, an inverted condition, exchanged arguments, a dropped keyword or statement.
Changes are drawn by a fixed seed. For each, the tests that run its lines are run, for {seconds} s
at most, until one fails. Kernels for CUDA devices, Ray's actors and the processes that tests start
are out of reach of this method, and tests marked `slow` are left out. A survivor may therefore be
killed by a test that had no time, and not every survivor has been looked
at. The results are those before the tests that this run led to.

The score is the part killed of the mutants that are not equivalent: an equivalent one changes no
result, only speed or the way to it.

| folder | mutants | killed | equivalent | survived | score |
|---|---|---|---|---|---|
"""


def write_table(path: Path = TABLE) -> None:
    """Write the table from the results and the reasons."""
    reasons = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    history = read_all_results()
    last = {name: results[-1] for name, results in history.items()}
    text = HEAD.format(seconds=20) + "".join(_rows(last, reasons))
    lost = {name for name, results in history.items() if results[0]["verdict"] == SURVIVED}
    found = sorted(name for name in lost if last[name]["verdict"] == KILLED)
    survived = sorted(name for name in last if last[name]["verdict"] == SURVIVED)
    equivalent = [name for name in survived if name in reasons]
    left = [name for name in survived if name not in reasons]
    text += _section("Survived at first, killed now", [(n, last[n]["detail"]) for n in found])
    text += _section("Survive", [(name, f"line {last[name]['line']}") for name in left])
    text += _section("Equivalent", [(name, reasons[name]) for name in equivalent])
    path.write_text(text, encoding="utf-8")


def _rows(last: dict[str, Any], reasons: dict[str, str]) -> Iterator[str]:
    for folder in (*FOLDERS, ""):
        verdicts = {
            name: result["verdict"]
            for name, result in last.items()
            if name.startswith(f"rnnkeys/{folder}") and result["verdict"] in {KILLED, SURVIVED}
        }
        killed = sum(verdict == KILLED for verdict in verdicts.values())
        equal = sum(name in reasons for name, verdict in verdicts.items() if verdict == SURVIVED)
        counted = len(verdicts) - equal
        if counted:
            row = (len(verdicts), killed, equal, counted - killed, f"{killed / counted:.1%}")
            yield f"| {folder or 'all'} | " + " | ".join(map(str, row)) + " |\n"


def _section(title: str, lines: list[tuple[str, str]]) -> str:
    items = "".join(f"- `{name}`: {word}\n" for name, word in lines)
    return f"\n## {title}\n\n{items or 'None.' + chr(10)}"


if __name__ == "__main__":
    sys.exit(write_table())
