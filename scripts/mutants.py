"""Measure what the tests notice: make one small change of the package at a time and run them.

The tests are collected once. Each mutant is a fork of that process: the changed function gets its
new code there, and the tests that run its lines follow, those of the mirrored folder and the quick
ones first, until one fails. No file changes. Which tests run which lines is measured before.

Changes are drawn by a fixed seed, as many from each folder. Results are lines of JSON in .cache;
a second call continues the first.

    python -m scripts.mutants                              # 60 of each folder
    python -m scripts.mutants --only cells --count 100
    python -m scripts.mutants --again survived             # survivors once more
    python -m scripts.mutants_table                        # write the table

A tool such as mutmut or cosmic-ray imports the package and the tests for each mutant: 15 seconds
here, of which the tests take one.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import pytest

from scripts.mutations import Mutation, compile_mutation, list_mutations

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "mutants"
FOLDERS = (
    *("cells", "backends", "modules", "sequences", "checks"),
    *("objectives", "collectors", "deploy", "transforms", "diagnostics"),
)
# Tests of processes of their own, which a change in this process does not reach, are left out.
TESTS = ("rnnkeys", "tests", "--ignore=tests/benchmarks", "--ignore=tests/docs")
TESTS = (*TESTS, "--ignore=tests/scripts", "--ignore=tests/tutorials", "--ignore=tests/fuzz")
TESTS = (*TESTS, "--ignore=tests/collectors/test_ray_actors.py", "-m", "not slow")
# Of each test, so many cases are measured; the other cases run the same lines, or nearly.
CASES = 8
KILLED, SURVIVED, UNUSABLE = "killed", "survived", "unusable"


class Coverage(NamedTuple):
    """What each test runs.

    Attributes:
        seconds: duration by node id, of tests that pass.
        lines: node ids by file and line, as ``lines["rnnkeys/mode.py"]["12"]``.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[str, list[str]]]

    def tests_of(self, mutation: Mutation) -> list[str]:
        """Return the tests that run a mutation's statement, in the order to run them in."""
        lines = self.lines.get(mutation.path, {})
        span = range(mutation.line, mutation.last_line + 1)
        names = {name for line in span for name in lines.get(str(line), [])}
        folder = mutation.path.split("/")[1]
        near = (f"tests/{folder}/", f"rnnkeys/{folder}/")
        return sorted(
            names & self.seconds.keys(),
            key=lambda name: (not name.startswith(near), self.seconds[name], name),
        )


class Campaign:
    """A pytest plugin that runs tests as often as there are mutants."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.items: dict[str, pytest.Item] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Measure the coverage unless it is known, then run the mutants."""
        self.items = {item.nodeid: item for item in session.items}
        for path in _list_files(self.options.only):
            importlib.import_module(path.removesuffix(".py").replace("/", "."))
        gc.freeze()
        if not (CACHE / "coverage.json").exists():
            self._measure_coverage(session)
        coverage = read_coverage()
        verdicts = {n: results[-1]["verdict"] for n, results in read_all_results().items()}
        wanted = draw_mutations(self.options)
        left = [m for m in wanted if verdicts.get(m.name) in self.options.again]
        done = 0
        with (CACHE / "results.jsonl").open("a", encoding="utf-8") as log:
            for result in self._run_all(session, left, coverage):
                log.write(json.dumps(result) + "\n")
                log.flush()
                done += 1
                count = f"{done}/{len(left)}"
                print(
                    count,
                    *(result[key] for key in ("verdict", "seconds", "name", "detail")),
                    flush=True,
                )
        return True

    def _measure_coverage(self, session: pytest.Session) -> None:
        items, jobs = list(_thin_out(self.items)), self.options.jobs
        parts = [items[i::jobs] for i in range(jobs)]
        for child in [_fork(lambda part=part: cover(part, session)) for part in parts]:
            os.waitpid(child, 0)

    def _run_all(
        self, session: pytest.Session, mutations: Sequence[Mutation], coverage: Coverage
    ) -> Iterator[dict[str, Any]]:
        running: dict[int, tuple[Mutation, float, Path, list[str]]] = {}
        waiting = list(reversed(mutations))
        while waiting or running:
            while waiting and len(running) < self.options.jobs:
                mutation = waiting.pop()
                tests = self._choose_tests(mutation, coverage)
                note = CACHE / f"note-{os.getpid()}-{mutation.slot}.txt"
                items = [self.items[name] for name in tests]
                task = _Task(session, mutation, items, coverage.seconds, note)
                running[_fork(task.run)] = mutation, time.monotonic(), note, tests
            child, status = os.wait()
            mutation, began, note, tests = running.pop(child)
            _kill_group(child)
            detail = note.read_text(encoding="utf-8") if note.exists() else ""
            note.unlink(missing_ok=True)
            verdict = {0: SURVIVED, 42 << 8: UNUSABLE}.get(status, KILLED)
            yield {
                "name": mutation.name,
                "line": mutation.line,
                "verdict": verdict,
                "detail": f"{len(tests)} tests" if verdict == SURVIVED else detail,
                "seconds": round(time.monotonic() - began, 1),
            }

    def _choose_tests(self, mutation: Mutation, coverage: Coverage) -> list[str]:
        """Return the covering tests that fit into the time, then other cases of the same tests."""
        names = [name for name in coverage.tests_of(mutation) if name in self.items]
        typical = {_function_of(name): coverage.seconds[name] for name in names}
        cases = [name for name in self.items if _function_of(name) in typical]
        others = sorted(set(cases) - set(names), key=lambda name: typical[_function_of(name)])
        chosen, seconds = [], 0.0
        for name in [*names, *others]:
            seconds += coverage.seconds.get(name, typical[_function_of(name)])
            if seconds < self.options.seconds:
                chosen.append(name)
        return chosen


class _Task(NamedTuple):
    """A mutant and its tests, run in a fork."""

    session: pytest.Session
    mutation: Mutation
    items: list[pytest.Item]
    seconds: dict[str, float]
    note: Path

    def run(self) -> int:
        try:
            plant(self.mutation)
        except (LookupError, ValueError) as error:
            self.note.write_text(repr(error), encoding="utf-8")
            return 42
        for item, following in zip(self.items, [*self.items[1:], None], strict=True):
            # The note stays if the process ends here: by the alarm or by a crash.
            self.note.write_text(item.nodeid, encoding="utf-8")
            # In seconds of computation, which other programs do not change; a deadlock has none.
            signal.setitimer(signal.ITIMER_PROF, 10 * self.seconds.get(item.nodeid, 1.0) + 20)
            signal.alarm(600)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.session.testsfailed:
                return 1
        return 0


def plant(mutation: Mutation) -> None:
    """Give the functions of this process the code of a mutation.

    Raises:
        LookupError: if no function has the code, such as one that a test makes.
        ValueError: if the new code has other closed-over variables.
    """
    codes = compile_mutation(ROOT, mutation)
    gc.unfreeze()
    found = 0
    for function in gc.get_objects():
        if type(function) is FunctionType and function.__code__ in codes:
            if function.__code__.co_filename == str(ROOT / mutation.path):
                function.__code__ = codes[function.__code__]
                found += 1
    if not found:
        raise LookupError("no function has this code")


def cover(items: Sequence[pytest.Item], session: pytest.Session) -> int:
    """Run tests and write which lines they run."""
    import coverage  # noqa: PLC0415  (needed once)

    measure = coverage.Coverage(
        data_file=None, source=[str(ROOT / "rnnkeys")], config_file=False, messages=False
    )
    measure.start()
    seconds, failed = {}, 0
    for item, following in zip(items, [*items[1:], None], strict=True):
        measure.switch_context(item.nodeid)
        began = time.perf_counter()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed == failed:
            seconds[item.nodeid] = round(time.perf_counter() - began, 4)
        failed = session.testsfailed
    measure.stop()
    data = measure.get_data()
    lines = {
        os.path.relpath(file, ROOT): {
            line: [name for name in names if name]
            for line, names in data.contexts_by_lineno(file).items()
        }
        for file in data.measured_files()
    }
    path = CACHE / f"coverage-{os.getpid()}.part"
    path.write_text(json.dumps({"seconds": seconds, "lines": lines}), encoding="utf-8")
    return 0


def read_coverage() -> Coverage:
    """Return what the tests run, and join what several processes measured."""
    whole = CACHE / "coverage.json"
    if not whole.exists():
        seconds: dict[str, float] = {}
        lines: dict[str, Any] = defaultdict(lambda: defaultdict(list))
        for part in CACHE.glob("coverage-*.part"):
            data = json.loads(part.read_text(encoding="utf-8"))
            seconds |= data["seconds"]
            for file, tests in data["lines"].items():
                for line, names in tests.items():
                    lines[file][line] += names
        whole.write_text(json.dumps({"seconds": seconds, "lines": lines}), encoding="utf-8")
    return Coverage(**json.loads(whole.read_text(encoding="utf-8")))


def read_all_results() -> dict[str, list[dict[str, Any]]]:
    """Return the results of each mutant, by its name, the latest one last."""
    log = CACHE / "results.jsonl"
    results = defaultdict(list)
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        result = json.loads(line)
        results[result["name"]].append(result)
    return results


def draw_mutations(options: argparse.Namespace) -> list[Mutation]:
    """Return the sample, the first of each folder first."""
    sample = []
    for folder in (name for name in FOLDERS if options.only in name):
        found = [m for path in _list_files(folder) for m in list_mutations(ROOT, path)]
        found = sorted(found, key=lambda mutation: mutation.rank(options.seed))
        found = [mutation for mutation in found if options.match in mutation.name]
        sample += enumerate(found[: options.count])
    return [mutation for _, mutation in sorted(sample, key=lambda pair: pair[0])]


def _list_files(folder: str) -> list[str]:
    folders = [name for name in FOLDERS if folder in name]
    paths = [path for name in folders for path in (ROOT / "rnnkeys" / name).glob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def _thin_out(items: dict[str, pytest.Item]) -> Iterator[pytest.Item]:
    """Yield some cases of each test, evenly spread."""
    cases = defaultdict(list)
    for name, item in items.items():
        cases[_function_of(name)].append(item)
    for same in cases.values():
        yield from same[:: -(-len(same) // CASES)]


def _function_of(name: str) -> str:
    return name.partition("[")[0]


def _fork(task: Any) -> int:
    child = os.fork()
    if child:
        return child
    os.setsid()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    status = 42
    try:
        status = task()
    finally:
        os._exit(status)


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass


def main() -> int:
    """Run the mutants, or write their table."""
    parser = argparse.ArgumentParser(description="Run the tests on mutants.", allow_abbrev=False)
    parser.add_argument("--count", type=int, default=60, help="mutants of each folder")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--only", default="", metavar="FOLDER", help="folders with this name")
    parser.add_argument("--match", default="", metavar="TEXT", help="mutants with it in their name")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=30.0, help="of tests per mutant, at most")
    parser.add_argument("--again", nargs="*", default=[], help="verdicts to run once more")
    options = parser.parse_args()
    options.again = {None, *options.again}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("PYTEST_ADDOPTS", None)
    CACHE.mkdir(parents=True, exist_ok=True)
    flags = ["-p", "no:cacheprovider", "-p", "no:randomly", "-q", "-s"]
    return int(pytest.main([*flags, *TESTS], plugins=[Campaign(options)]))


if __name__ == "__main__":
    sys.exit(main())
