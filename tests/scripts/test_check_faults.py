"""The check of the seeded faults, on a toy project: verdicts, report and exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.check_faults import CAUGHT, SURVIVED, TABLE, UNUSABLE
from tests.support.planting import find_target, load_faults

PROJECT = Path(__file__).resolve().parents[2]
TOY = """
def add(a, b):
    return a + b

def unseen(a):
    return a

class Sum:
    @staticmethod
    def of(*numbers):
        return sum(numbers)
"""
TESTS = """
import time

import pytest
from toy import Sum, add

def test_add():
    assert add(1, 2) == 3

def test_sum():
    assert Sum.of(1, 2) == 3

def test_add_rejects_text():
    with pytest.raises(TypeError):
        add(1, "2")

def test_slow():
    add(1, 2)

def test_red():
    assert add(1, 2) == 4
"""
HEAD = """
import os
import time
import toy_user
from tests.support.planting import seen_by
"""
# A module that holds the function under a name of its own.
USER = "from toy import add as plus\n"
Check = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Run the check on faults of the toy project, written as source, in a process of its own."""
    files = {"toy.py": TOY, "toy_user.py": USER, "test_toy.py": TESTS, "pytest.ini": "[pytest]\n"}
    for name, source in files.items():
        (tmp_path / name).write_text(source)

    def run(faults: str, *arguments: str) -> subprocess.CompletedProcess:
        (tmp_path / "toy_faults.py").write_text(HEAD + faults)
        path = os.pathsep.join([str(tmp_path), str(PROJECT)])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "scripts.check_faults", "--table", "toy_faults"]
        return subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def fault(body: str, test: str = "test_add", target: str = "toy:add", name: str = "mistake") -> str:
    """Return the source of a fault."""
    decorator = f'@seen_by("test_toy.py::{test}", target={target!r})'
    return f'{decorator}\ndef {name}(original, *args):\n    """A mistake."""\n    {body}\n'


def verdicts(done: subprocess.CompletedProcess) -> dict[str, str]:
    """Return the verdicts of a run by the names of its faults."""
    lines = [line.split() for line in done.stdout.splitlines() if " s  " in line]
    return {line[-1]: line[0] for line in lines if line[-1] != "fault)"}


def test_check_faults_of_a_function_that_tests_call_is_caught(check):
    done = check(fault("return original(*args) + 1"))
    assert verdicts(done) == {"mistake": CAUGHT}
    assert done.returncode == 0
    assert "faults: 1 planted" in done.stdout


def test_check_faults_of_a_static_method_is_caught(check):
    done = check(fault("return original(*args) + 1", "test_sum", "toy:Sum.of"))
    assert verdicts(done) == {"mistake": CAUGHT}


def test_check_faults_of_an_error_that_is_no_longer_raised_is_caught(check):
    done = check(fault("return None", "test_add_rejects_text"))
    assert verdicts(done) == {"mistake": CAUGHT}


def test_check_faults_that_no_test_sees_survives_and_fails(check):
    done = check(fault("return None", target="toy:unseen"))
    assert verdicts(done) == {"mistake": SURVIVED}
    assert done.returncode == 1
    assert "A mistake." in done.stdout
    assert "no test called the planted function" in done.stdout


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (fault("pass", target="toy:gone"), "the target toy:gone does not exist"),
        (fault("pass", target="gone:add"), "the target gone:add does not exist"),
        (fault("pass", target="toy:Sum"), "expected a function"),
        (fault("pass", "test_gone"), "test_gone"),
        (fault("return original(args)"), "no assertion failed"),
        (fault("os._exit(255)"), "the process ended with status 255"),
        (fault("os.abort()"), "the process ended with status -6"),
    ],
    ids=["function gone", "module gone", "class", "test gone", "crash", "exit", "abort"],
)
def test_check_faults_that_shows_nothing_is_unusable(check, source, reason):
    done = check(source)
    assert verdicts(done) == {"mistake": UNUSABLE}
    assert reason in done.stdout
    assert done.returncode == 1


def test_check_faults_that_hangs_is_unusable(check):
    done = check(fault("time.sleep(60)"), "--timeout", "3")
    assert verdicts(done) == {"mistake": UNUSABLE}
    assert "timed out after 3 s" in done.stdout


def test_check_faults_with_a_red_test_fails(check):
    done = check(fault("return 0", "test_red"))
    assert verdicts(done) == {"mistake": CAUGHT}
    assert "tests fail without any fault" in done.stdout
    assert done.returncode == 1


def test_check_faults_with_many_short_processes_loses_no_status(check):
    """A status that is read by two threads is lost to one of them, which reports 255."""
    names = [f"mistake_{i}" for i in range(12)]
    source = "".join(fault("os._exit(40)", name=name) for name in names)
    done = check(source, "--jobs", "6")
    assert Counter(verdicts(done).values()) == {CAUGHT: len(names)}


def test_check_faults_with_an_unknown_name_fails(check):
    done = check(fault("return 0"), "--only", "no such fault")
    assert done.returncode == 2
    assert "no fault has 'no such fault' in its name" in done.stderr


@pytest.mark.parametrize("fault", load_faults(TABLE).values(), ids=lambda fault: fault.name)
def test_faults_target_and_tests_exist(fault):
    find_target(fault.target)
    assert fault.mistake and fault.tests
    for test in fault.tests:
        path, *name = test.partition("[")[0].split("::")
        assert f"def {name[-1]}(" in (PROJECT / path).read_text(encoding="utf-8")
