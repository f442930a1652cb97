"""Show that the tests can fail: plant the faults of ``tests.support.faults`` one by one.

Each fault is planted in a process of its own, which then runs the fault's tests. A fault is caught
when one of them fails by an assertion. The check fails when a fault survives; when it shows
nothing, because its target or its tests are gone or because it only makes the code crash; and when
the tests fail without any fault.

    python -m scripts.check_faults                  # all, two at a time
    python -m scripts.check_faults --only gates     # those with "gates" in their name
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.planting import load_faults, plant

TABLE = "tests.support.faults"
# Processes are forks of a server that has imported the table, and so torch and the package.
FORKS = multiprocessing.get_context("forkserver")

CAUGHT, SURVIVED, UNUSABLE = "caught", "SURVIVED", "UNUSABLE"
# Exit statuses of a child; any other one, such as that of a crash, is no verdict.
VERDICTS = {40: CAUGHT, 41: SURVIVED, 42: UNUSABLE}
NO_FAULT = "(no fault)"


class Job(NamedTuple):
    """Tests to run in a process, with a fault planted or, with ``name`` ``NO_FAULT``, without.

    Attributes:
        table: module that defines the fault.
        name: of the fault.
        tests: node ids.
        timeout: seconds after which the process is ended.
    """

    table: str
    name: str
    tests: tuple[str, ...]
    timeout: float


class Result(NamedTuple):
    """How a job ended; ``detail`` is the end of its output."""

    name: str
    verdict: str
    detail: str
    seconds: float


class Running:
    """A job's process, from its start to its result."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.log = folder / f"{job.name}.txt"
        self.began = time.monotonic()
        self.process = FORKS.Process(target=_run, args=(job, self.log))
        self.process.start()

    @property
    def is_late(self) -> bool:
        """Whether the process has run for too long."""
        return time.monotonic() - self.began > self.job.timeout

    def finish(self) -> Result | None:
        """Return the result if the process has ended or is late, else None."""
        if self.process.exitcode is None and not self.is_late:
            return None
        return Result(self.job.name, *self._judge(), time.monotonic() - self.began)

    def _judge(self) -> tuple[str, str]:
        if self.process.exitcode is None:
            self.stop()
            return UNUSABLE, f"timed out after {self.job.timeout:.0f} s"
        output = self.log.read_text(encoding="utf-8", errors="replace")[-3000:].strip()
        status: Any = self.process.exitcode
        if status not in VERDICTS:
            return UNUSABLE, f"{output}\nthe process ended with status {status}"
        return VERDICTS[status], output

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()


def run_jobs(jobs: Sequence[Job], at_a_time: int) -> Iterator[Result]:
    """Run jobs in processes of their own; yield results in the order in which the jobs end.

    One thread starts the processes and reads their exit statuses: two threads would race for a
    status, which a process reports once.
    """
    waiting, running = deque(jobs), []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        try:
            while waiting or running:
                while waiting and len(running) < at_a_time:
                    running.append(Running(waiting.popleft(), Path(folder)))
                wait([one.process.sentinel for one in running], timeout=1.0)
                for one in list(running):
                    result = one.finish()
                    if result is not None:
                        running.remove(one)
                        yield result
        finally:
            for one in running:
                one.stop()


class Findings:
    """A pytest plugin that collects the exceptions of failed tests."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    def pytest_runtest_makereport(self, call: pytest.CallInfo[Any]) -> None:
        """Collect the exception of one phase of a test."""
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
            self.errors.append(call.excinfo.value)

    @property
    def are_assertions(self) -> bool:
        """Whether a test failed by an assertion, and not because the fault made it crash."""
        return any(map(_is_assertion, self.errors))


def _is_assertion(error: BaseException) -> bool:
    # Hypothesis reports several failures in a group.
    parts = getattr(error, "exceptions", None)
    return any(map(_is_assertion, parts)) if parts else isinstance(error, _ASSERTIONS)


_ASSERTIONS = (AssertionError, pytest.fail.Exception)


def _run(job: Job, log: Path) -> None:
    """Plant the fault and run pytest in this process, which does nothing else."""
    with log.open("w", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.pop("PYTEST_ADDOPTS", None)
    gc.freeze()  # pytest collects garbage as it ends; what the server made is none
    verdict = _judge_here(job)
    sys.stdout.flush()
    sys.exit(next(status for status, name in VERDICTS.items() if name == verdict))


def _judge_here(job: Job) -> str:
    planted = None
    if job.name != NO_FAULT:
        try:
            planted = plant(load_faults(job.table)[job.name])
        except (LookupError, TypeError) as error:
            print(error)
            return UNUSABLE
    findings = Findings()
    # Rewriting assertions would take longer than most tests here, and nobody reads their values.
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--assert=plain"]
    status = pytest.main([*options, *job.tests], plugins=[findings])
    if status == pytest.ExitCode.OK:
        if planted is not None and not planted.calls:
            print("no test called the planted function")
        return SURVIVED
    if status != pytest.ExitCode.TESTS_FAILED:
        return UNUSABLE
    if not findings.are_assertions:
        print("no assertion failed: the fault makes the code crash, which any test would notice")
        return UNUSABLE
    return CAUGHT


def report(results: Iterator[Result], table: str) -> int:
    """Print each result as it comes, then a summary; return 0 if every fault was caught, else 1."""
    began, faults = time.monotonic(), load_faults(table)
    seen, bad = 0, 0
    for result in results:
        is_fault = result.name != NO_FAULT
        passed = result.verdict == (CAUGHT if is_fault else SURVIVED)
        seen += is_fault
        bad += not passed
        word = result.verdict if is_fault else "green" if passed else "RED"
        print(f"{word:9}{result.seconds:6.1f} s  {result.name}", flush=True)
        if not passed:
            what = faults[result.name].mistake if is_fault else "tests fail without any fault"
            print(f"    {what}\n    " + result.detail.replace("\n", "\n    "), flush=True)
    print(f"faults: {seen} planted in {time.monotonic() - began:.0f} s, problems: {bad}")
    return 1 if bad else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check and print one line per fault; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Plant faults and show that the tests catch them.", allow_abbrev=False
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--only", default="", metavar="TEXT", help="faults with TEXT in their name")
    parser.add_argument("--table", default=TABLE, help=f"module of the faults (default: {TABLE})")
    parser.add_argument("--timeout", type=float, default=180.0, help="of a process, in seconds")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Triton reads it on import; kernels are then interpreted on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    faults = [f for name, f in load_faults(options.table).items() if options.only in name]
    if not faults:
        parser.error(f"no fault has {options.only!r} in its name")
    FORKS.set_forkserver_preload([options.table, "hypothesis"])
    tests = tuple(sorted({test for fault in faults for test in fault.tests}))
    runs = [(NO_FAULT, tests), *((fault.name, fault.tests) for fault in faults)]
    jobs = [Job(options.table, name, selected, options.timeout) for name, selected in runs]
    return report(run_jobs(jobs, options.jobs), options.table)


if __name__ == "__main__":
    sys.exit(main())
