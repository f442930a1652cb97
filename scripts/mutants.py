"""Measure what the tests notice: make one small change of the package at a time and run them.

The tests are collected once. Each mutant is a fork of that process: the changed function gets its
new code there, and the tests that run its lines follow, those of the mirrored folder and the quick
ones first, until one fails. No file changes. Which tests run which lines is measured before.

Changes are drawn by a fixed seed, as many from each folder. Results are lines of JSON in .cache;
a second call continues the first.

    python -m scripts.mutants                              # 60 of each folder, and 10 in arguments
    python -m scripts.mutants --only cells backends --count 100
    python -m scripts.mutants --again survived --seconds 60
    python -m scripts.mutants --only cells --tests tests/cells rnnkeys/cells
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
from itertools import pairwise
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import pytest

from scripts.mutations import Mutation, compile_mutation, find_places, list_mutations, parse_file

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "mutants"
FOLDERS = (
    *("cells", "backends", "modules", "sequences", "checks"),
    *("objectives", "collectors", "deploy", "transforms", "diagnostics"),
)
# Tests of processes of their own, which a change in this process does not reach, are left out, and
# so are the files of the package that only they run.
TESTS = ("rnnkeys", "tests")
FLAGS = ("--ignore=tests/benchmarks", "--ignore=tests/docs", "--ignore=tests/scripts")
FLAGS = (*FLAGS, "--ignore=tests/tutorials", "--ignore=tests/fuzz", "-m", "not slow")
FLAGS = (*FLAGS, "--ignore=tests/collectors/test_ray_actors.py", "-p", "no:randomly")
FLAGS = (*FLAGS, "-p", "no:cacheprovider", "-q", "-s")
# Of each test, so many cases are measured; the other cases run the same lines, or nearly.
CASES = 4
KILLED, SURVIVED, UNUSABLE = "killed", "survived", "unusable"

Functions = dict[CodeType, list[FunctionType]]


class Coverage(NamedTuple):
    """What each test runs.

    Attributes:
        seconds: duration by node id, of tests that pass.
        lines: node ids by file and place, as ``lines["rnnkeys/mode.py"]["recurrent_mode+12"]``: a
            line counted from that of its function, which an edit above it does not move.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[str, list[str]]]

    def tests_of(self, mutation: Mutation) -> list[str]:
        """Return the tests that run a mutation's statement, in the order to run them in.

        Where there are none, those of its function: a case that is not measured may run it.
        """
        lines = self.lines.get(mutation.path, {})
        span = range(mutation.offset, mutation.offset + mutation.last_line - mutation.line + 1)
        places = [f"{mutation.function}+{offset}" for offset in span]
        names = {name for place in places for name in lines.get(place, [])}
        if not names:
            every = [place for place in lines if place.startswith(f"{mutation.function}+")]
            names = {name for place in every for name in lines[place]}
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
        self.functions: Functions = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Measure the coverage as far as it is not known, then run the mutants."""
        self.items = {item.nodeid: item for item in session.items}
        for path in _list_files(self.options.only):
            importlib.import_module(path.removesuffix(".py").replace("/", "."))
        self.functions = find_functions()
        gc.freeze()
        coverage = self._measure_coverage(session)
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

    def _measure_coverage(self, session: pytest.Session) -> Coverage:
        known = read_coverage().seconds
        files: dict[Path, list[pytest.Item]] = defaultdict(list)
        for item in _thin_out(self.items):
            if item.nodeid not in known:
                files[item.path].append(item)
        running: set[int] = set()
        for items in files.values():
            if len(running) == self.options.jobs:
                running.remove(os.wait()[0])
            running.add(_fork(lambda items=items: cover(items, session)))
        while running:
            running.remove(os.wait()[0])
        return read_coverage()

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
                task = _Task(session, mutation, self.functions, items, coverage.seconds, note)
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
    functions: Functions
    items: list[pytest.Item]
    seconds: dict[str, float]
    note: Path

    def run(self) -> int:
        try:
            plant(self.mutation, self.functions)
        except (LookupError, ValueError) as error:
            self.note.write_text(repr(error), encoding="utf-8")
            return 42
        for item, following in pairwise([*self.items, None]):
            assert item is not None
            # The note stays if the process ends here: by the alarm or by a crash.
            self.note.write_text(item.nodeid, encoding="utf-8")
            # In seconds of computation, which other programs do not change; a deadlock has none.
            seconds = self.seconds.get(item.nodeid, 1.0)
            signal.setitimer(signal.ITIMER_PROF, 10 * seconds + 20)
            signal.alarm(int(20 * seconds) + 60)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.session.testsfailed:
                return 1
        return 0


def find_functions() -> Functions:
    """Return the functions of the package in this process, by their code.

    Once, before the forks: to look at every object in each would copy all memory there.
    """
    functions: Functions = defaultdict(list)
    for one in gc.get_objects():
        if type(one) is FunctionType and one.__code__.co_filename.startswith(f"{ROOT}/rnnkeys/"):
            functions[one.__code__].append(one)
    return functions


def plant(mutation: Mutation, functions: Functions) -> None:
    """Give functions the code of a mutation.

    Args:
        mutation: the change.
        functions: those of :func:`find_functions`.

    Raises:
        LookupError: if no function has the code, such as one that a test makes.
        ValueError: if the new code has other closed-over variables.
    """
    changed = [
        (function, new)
        for old, new in compile_mutation(ROOT, mutation).items()
        for function in functions.get(old, [])
        if function.__code__.co_filename == str(ROOT / mutation.path)
    ]
    for function, new in changed:
        function.__code__ = new
    if not changed:
        raise LookupError("no function has this code")


def cover(items: Sequence[pytest.Item], session: pytest.Session) -> int:
    """Run tests and write which lines they run."""
    import coverage  # noqa: PLC0415  (needed once)

    measure = coverage.Coverage(
        data_file=None, source=[str(ROOT / "rnnkeys")], config_file=False, messages=False
    )
    measure.start()
    seconds, failed = {}, 0
    for item, following in pairwise([*items, None]):
        assert item is not None
        measure.switch_context(item.nodeid)
        began = time.perf_counter()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed == failed:
            seconds[item.nodeid] = round(time.perf_counter() - began, 4)
        failed = session.testsfailed
    measure.stop()
    data = measure.get_data()
    lines: dict[str, dict[str, list[str]]] = {}
    for file in data.measured_files():
        path = os.path.relpath(file, ROOT)
        places = find_places(parse_file(ROOT, path))
        lines[path] = {
            "{}+{}".format(*places[line]): [name for name in names if name]
            for line, names in data.contexts_by_lineno(file).items()
            if line in places
        }
    part = CACHE / f"coverage-{os.getpid()}-{int(time.time())}.json"
    part.write_text(json.dumps({"seconds": seconds, "lines": lines}), encoding="utf-8")
    return 0


def read_coverage() -> Coverage:
    """Return what the tests run, joined from what several processes measured."""
    seconds: dict[str, float] = {}
    lines: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    for part in CACHE.glob("coverage-*.json"):
        data = json.loads(part.read_text(encoding="utf-8"))
        seconds |= data["seconds"]
        for file, places in data["lines"].items():
            for place, names in places.items():
                lines[file][place] += names
    return Coverage(seconds, lines)


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
    for folder in options.only:
        found = [m for path in _list_files([folder]) for m in list_mutations(ROOT, path)]
        found = sorted(found, key=lambda mutation: mutation.rank(options.seed))
        found = [mutation for mutation in found if options.match in mutation.name]
        for is_inside, count in ((False, options.count), (True, options.inside)):
            sample += enumerate([m for m in found if m.is_inside == is_inside][:count])
    return [mutation for _, mutation in sorted(sample, key=lambda pair: pair[0])]


def _list_files(folders: Sequence[str]) -> list[str]:
    paths = [path for name in folders for path in (ROOT / "rnnkeys" / name).glob("*.py")]
    paths = [path for path in paths if not path.name.startswith("ray_")]
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


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line; None stands for that of the program."""
    parser = argparse.ArgumentParser(description="Run the tests on mutants.", allow_abbrev=False)
    parser.add_argument("--count", type=int, default=60, help="mutants of each folder")
    parser.add_argument("--inside", type=int, default=10, help="and inside arguments")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--only", nargs="*", default=FOLDERS, choices=FOLDERS, help="folders")
    parser.add_argument("--match", default="", metavar="TEXT", help="mutants with it in their name")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=30.0, help="of tests per mutant, at most")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="paths to run, instead of all")
    parser.add_argument("--again", nargs="*", default=[], help="run these verdicts once more")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the mutants."""
    options = parse_arguments()
    # Without a verdict those that have not run.
    options.again = set(options.again) or {None}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("PYTEST_ADDOPTS", None)
    CACHE.mkdir(parents=True, exist_ok=True)
    return int(pytest.main([*FLAGS, *options.tests], plugins=[Campaign(options)]))


if __name__ == "__main__":
    sys.exit(main())
