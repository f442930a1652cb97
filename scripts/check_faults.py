"""Show that the tests can fail: plant the faults of ``tests/faults.py`` and see each one caught.

Every fault is planted alone in a temporary copy of the project, and the tests that have to catch it
are run there. The check fails when a fault survives, and when one can no longer be planted, because
the source that it changes is gone: then the fault is rewritten, not dropped.

    python -m scripts.check_faults                      # all, two at a time
    python -m scripts.check_faults --only "gates"       # those with "gates" in their name
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults import FAULTS, Fault

PROJECT = Path(__file__).resolve().parent.parent
COPIED = ("pyproject.toml", "rnnkeys", "tests", "tutorials")
TIMEOUT_S = 180
# Tests run in forks of a server that has imported what takes long and is not changed by a fault.
FORKS = multiprocessing.get_context("forkserver")
IMPORTED_ONCE = ["torch", "torchrl.envs", "torchrl.modules", "torchrl.objectives", "pytest"]

CAUGHT, SURVIVED, UNUSABLE = "caught", "SURVIVED", "UNUSABLE"


class Result(NamedTuple):
    """What became of one fault; ``detail`` explains anything but ``CAUGHT``."""

    fault: Fault
    verdict: str
    detail: str = ""
    seconds: float = 0.0


def plant(fault: Fault, project: Path) -> None:
    """Write the fault into the project.

    Raises:
        LookupError: if the source to change is not there exactly once, or the change is none.
    """
    path = project / fault.file
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    count = source.count(fault.before)
    if count != 1:
        raise LookupError(f"{fault.file} holds the snippet {count} times, expected once")
    if fault.before == fault.after:
        raise LookupError("the fault changes nothing")
    path.write_text(source.replace(fault.before, fault.after), encoding="utf-8")


def judge(fault: Fault, project: Path) -> Result:
    """Plant one fault in a copy of the project, run its tests there, and say what happened."""
    began = time.monotonic()
    with _copy_of(project) as copy:
        try:
            plant(fault, copy)
            code, output = _run_tests(fault.tests, copy)
        except (LookupError, TimeoutError) as error:
            return Result(fault, UNUSABLE, str(error), time.monotonic() - began)
    # pytest: 0 all passed, 1 some failed; else it could not run them, so they showed nothing.
    verdict = SURVIVED if code == 0 else CAUGHT if code == 1 else UNUSABLE
    detail = "" if verdict == CAUGHT else output
    return Result(fault, verdict, detail, time.monotonic() - began)


def check(faults: Sequence[Fault], project: Path, jobs: int) -> Iterator[Result]:
    """Judge all faults, ``jobs`` at a time, in order.

    Raises:
        RuntimeError: if the tests are red without any fault, where red would show nothing.
    """
    tests = sorted({test for fault in faults for test in fault.tests})
    with _copy_of(project) as copy:
        code, output = _run_tests(tests, copy)
    if code != 0:
        raise RuntimeError(f"the tests fail without any fault:\n{output}")
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda fault: judge(fault, project), faults)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check and print one line per fault; returns the exit status."""
    parser = argparse.ArgumentParser(description="Plant faults and show that the tests catch them.")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time (default: 2)")
    parser.add_argument("--only", default="", metavar="TEXT", help="faults with TEXT in their name")
    options = parser.parse_args(arguments)
    faults = [fault for fault in FAULTS if options.only in fault.name]
    if not faults:
        parser.error(f"no fault has {options.only!r} in its name")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    FORKS.set_forkserver_preload(IMPORTED_ONCE)
    return report(check(faults, PROJECT, options.jobs))


def report(results: Iterator[Result]) -> int:
    """Print each result as it comes, then a summary; returns 0 if all were caught, else 1."""
    began, seen, missed = time.monotonic(), 0, 0
    for result in results:
        seen += 1
        missed += result.verdict != CAUGHT
        print(f"{result.verdict:9}{result.seconds:6.1f} s  {result.fault.name}", flush=True)
        if result.verdict != CAUGHT:
            print(f"    {result.fault.file}: {result.fault.before!r} -> {result.fault.after!r}")
            print("    " + result.detail.replace("\n", "\n    "), flush=True)
    print(f"faults: {seen - missed} of {seen} caught in {time.monotonic() - began:.0f} s")
    return 1 if missed else 0


@contextmanager
def _copy_of(project: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for name in COPIED:
            source, target = project / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.is_file():
                shutil.copy(source, target)
        yield Path(folder)


def _run_tests(tests: Sequence[str], project: Path) -> tuple[int | None, str]:
    """Run pytest until the first failure; returns its exit status and the end of its output."""
    log = project / "output.txt"
    process = FORKS.Process(target=_pytest, args=(tuple(tests), project, log))
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"timed out after {TIMEOUT_S} s")
    return process.exitcode, log.read_text(encoding="utf-8")[-2000:].strip()


def _pytest(tests: tuple[str, ...], project: Path, log: Path) -> None:
    """Run pytest in this process, which does nothing else, on the copy and not on the original."""
    with log.open("w", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(project)
    os.environ.pop("PYTEST_ADDOPTS", None)
    sys.dont_write_bytecode = True
    copied = {path.stem for path in project.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in copied]:
        del sys.modules[name]
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


if __name__ == "__main__":
    sys.exit(main())
