"""Run the tests in random order and with other random numbers, and keep a table of what failed.

    python -m scripts.seeds --seeds 11 12 13
    python -m scripts.seeds --seeds 11 --folders tests/modules tests/objectives

A seed, that of ``RNNKEYS_TEST_SEED``, gives one order of files and of the tests in each, and other
random numbers. The table is ``benchmarks/results/seeds.md``. A folder that has passed there under a
seed is left out, so that a second call continues the first; the others run in one process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "seeds.md"
FOLDERS = (
    *("tests/test_*.py", "tests/backends", "tests/cells", "tests/modules", "tests/sequences"),
    *("tests/checks", "tests/objectives", "tests/collectors", "tests/deploy", "tests/transforms"),
    *("tests/diagnostics", "tests/trainers", "tests/fuzz", "tests/tutorials", "tests/benchmarks"),
    *("tests/docs", "tests/scripts"),
)
HEAD = """# Tests in random order, with other random numbers

Made by `make seeds`. The seed of a row sets the order of the tests and, through
`RNNKEYS_TEST_SEED`, their random numbers. Cells count the tests that passed in the last run of a
folder under that seed; a test that failed was mended and ran again. The last four folders, whose
programs get their seeds from the tests, ran under a few seeds only.

"""
FAILED = "Failed:"

Rows = dict[tuple[int, str], tuple[int, list[str]]]
"""How many tests passed and which failed, by seed and folder."""


def read_table(path: Path = TABLE) -> Rows:
    """Return the rows of the table."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    ]
    failed: dict[tuple[int, str], list[str]] = defaultdict(list)
    for line in lines:
        if line.startswith("- "):
            seed, folder, name = line[2:].replace("`", "").split(" ", 2)
            failed[int(seed), folder].append(name)
    return {
        (int(seed), folder.strip("`")): (int(passed), failed[int(seed), folder.strip("`")])
        for seed, *counts in table[2:]
        for folder, passed in zip(table[0][1:], counts, strict=True)
        if passed
    }


def write_table(rows: Rows, path: Path = TABLE) -> None:
    """Write the table, and the tests that failed below it."""
    folders = list(dict.fromkeys([*FOLDERS, *(folder for _, folder in rows)]))
    lines = ["| seed |" + "".join(f" `{folder}` |" for folder in folders)]
    lines.append("|---" * (len(folders) + 1) + "|")
    for seed in sorted({seed for seed, _ in rows}):
        cells = (str(rows[seed, one][0]) if (seed, one) in rows else "" for one in folders)
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    failed = [
        f"- {seed} `{folder}` `{name}`" for (seed, folder), row in rows.items() for name in row[1]
    ]
    lines += ["", FAILED, "", *failed] if failed else []
    path.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


def run_tests(folders: Sequence[str], seed: int, jobs: int) -> Rows:
    """Run the tests of folders in one process, and return the rows of their outcome."""
    env = {**os.environ, "RNNKEYS_TEST_SEED": str(seed)}
    env.setdefault("OMP_NUM_THREADS", "1")
    paths = {
        folder: [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(folder))]
        for folder in folders
    }
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", "-n", str(jobs), f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *chain(*paths.values())]
        subprocess.run(command, cwd=ROOT, env=env)
        passed, failed = read_report(report)
    rows: Rows = {}
    for folder in folders:
        modules = tuple(path.removesuffix(".py").replace("/", ".") for path in paths[folder])
        rows[seed, folder] = (
            sum(name.startswith(modules) for name in passed),
            [name for name in failed if name.startswith(modules)],
        )
    return rows


def read_report(path: Path) -> tuple[list[str], list[str]]:
    """Return from pytest's JUnit report the names of tests that passed, and of those that failed.

    A test counts as failed, too, if its fixtures or its file raise. Skipped ones do not count.
    """
    passed, failed = [], []
    for case in ElementTree.parse(path).iter("testcase"):
        outcomes = {child.tag for child in case}
        parts = [part for part in (case.get("classname"), case.get("name")) if part]
        name = "::".join(parts).replace("\n", " ")
        if outcomes & {"failure", "error"}:
            failed.append(name)
        elif "skipped" not in outcomes:
            passed.append(name)
    return passed, failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing in the table; the exit status is 1 if a test failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(11, 31)])
    parser.add_argument("--folders", nargs="+", default=FOLDERS, help="or patterns of files")
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0 is this one alone")
    options = parser.parse_args(argv)
    rows = read_table()
    for seed in options.seeds:
        missing = [one for one in options.folders if rows.get((seed, one), (0, [""]))[1]]
        if missing:
            made = run_tests(missing, seed, options.jobs)
            rows = {**read_table(), **made}  # another process may have added some
            write_table(rows)
            for (_, folder), row in made.items():
                print(seed, folder, *row, flush=True)
    return int(any(failed for _, failed in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
