"""Run the tests in random order and with other random numbers, and keep a table of what failed.

    python -m scripts.seeds --seeds 11 12 13
    python -m scripts.seeds --seeds 11 --folders tests/modules tests/objectives

A seed, that of ``RNNKEYS_TEST_SEED``, gives one order of files and of the tests in each, and other
random numbers. The table is ``benchmarks/results/seeds.md``. A folder that has passed there under a
seed is left out, so that a second call continues the first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "seeds.md"
FOLDERS = (
    *("tests/test_*.py", "tests/backends", "tests/cells", "tests/modules", "tests/sequences"),
    *("tests/checks", "tests/objectives", "tests/collectors", "tests/deploy", "tests/transforms"),
    *("tests/diagnostics", "tests/trainers", "tests/fuzz"),
)
HEAD = """# Tests in random order, with other random numbers

Made by `make seeds ARGS="--seeds 11 12"`. Each row is one run of a folder: the seed sets the order
of the tests and, through `RNNKEYS_TEST_SEED`, their random numbers. The rows are those of the last
run of each folder under each seed; a test that failed was mended and ran again.

| seed | folder | passed | failed |
|---|---|---|---|
"""

Rows = dict[tuple[int, str], tuple[int, list[str]]]
"""Passed and failed tests by seed and folder."""


def read_table(path: Path = TABLE) -> Rows:
    """Return the rows of the table."""
    rows: Rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if cells[0].isdigit():
            seed, folder, passed, failed = cells
            rows[int(seed), folder.strip("`")] = int(passed), failed.replace("`", "").split()[1:]
    return rows


def write_table(rows: Rows, path: Path = TABLE) -> None:
    """Write the table."""
    lines = []
    for (seed, folder), (passed, failed) in sorted(rows.items()):
        names = [str(len(failed)), *(f"`{name}`" for name in failed)]
        lines.append(f"| {seed} | `{folder}` | {passed} | {' '.join(names)} |\n")
    path.write_text(HEAD + "".join(lines), encoding="utf-8")


def run_tests(folder: str, seed: int, jobs: int) -> tuple[int, list[str]]:
    """Run the tests of a folder; returns how many passed, and the names of the others."""
    env = {**os.environ, "RNNKEYS_TEST_SEED": str(seed)}
    env.setdefault("OMP_NUM_THREADS", "1")
    paths = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(folder))
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", "-n", str(jobs), f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", *options, *paths], cwd=ROOT, env=env)
        return read_report(report)


def read_report(path: Path) -> tuple[int, list[str]]:
    """Return from pytest's JUnit report how many tests passed, and the names of those that failed.

    A test counts as failed, too, if its fixtures or its file raise. Skipped ones do not count.
    """
    passed, failed = 0, []
    for case in ElementTree.parse(path).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            failed.append(f"{case.get('classname')}::{case.get('name')}".replace(" ", "_"))
        elif "skipped" not in outcomes:
            passed += 1
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
        for folder in options.folders:
            if (seed, folder) in rows and not rows[seed, folder][1]:
                continue
            rows[seed, folder] = run_tests(folder, seed, options.jobs)
            write_table(rows)
            print(seed, folder, *rows[seed, folder], flush=True)
    return int(any(failed for _, failed in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
