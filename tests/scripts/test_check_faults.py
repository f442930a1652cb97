"""The check of the seeded faults, on a toy project: verdicts, report and exit status."""

from __future__ import annotations

import os
import subprocess
import sys
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
# A module that holds the function under a name of its own.
USER = "from toy import add as plus\n"
TESTS = """
import pytest
from toy import Sum, add
from toy_user import plus

def test_add():
    assert add(1, 2) == 3

def test_plus():
    assert plus(1, 2) == 3

def test_sum():
    assert Sum.of(1, 2) == 3

def test_add_rejects_text():
    with pytest.raises(TypeError):
        add(1, "2")

def test_red():
    assert add(1, 2) == 4
"""
HEAD = """
import os
import time
import toy_user
from tests.support.planting import seen_by
"""


def fault(name: str, body: str, test: str = "test_add", target: str = "toy:add") -> str:
    """Return the source of a fault of the toy project."""
    decorator = f'@seen_by("test_toy.py::{test}", target={target!r})'
    return f'{decorator}\ndef {name}(original, *args):\n    """A mistake."""\n    {body}\n'


CASES = {
    "function": (CAUGHT, "return original(*args) + 1", "test_add", "toy:add"),
    "imported_name": (CAUGHT, "return original(*args) + 1", "test_plus", "toy_user:plus"),
    "static_method": (CAUGHT, "return original(*args) + 1", "test_sum", "toy:Sum.of"),
    "error_not_raised": (CAUGHT, "return None", "test_add_rejects_text", "toy:add"),
    "right_value": (SURVIVED, "return original(*args)", "test_add", "toy:add"),
    "not_called": (SURVIVED, "return None", "test_add", "toy:unseen"),
    "function_gone": (UNUSABLE, "pass", "test_add", "toy:gone"),
    "module_gone": (UNUSABLE, "pass", "test_add", "gone:add"),
    "a_class": (UNUSABLE, "pass", "test_add", "toy:Sum"),
    "test_gone": (UNUSABLE, "pass", "test_nowhere", "toy:add"),
    "crash": (UNUSABLE, "return original(args)", "test_add", "toy:add"),
    "exit": (UNUSABLE, "os._exit(255)", "test_add", "toy:add"),
    "abort": (UNUSABLE, "os.abort()", "test_add", "toy:add"),
}
REASONS = {
    "right_value": "1 passed",
    "not_called": "no test called the planted function",
    "function_gone": "the target toy:gone does not exist",
    "module_gone": "the target gone:add does not exist",
    "a_class": "expected a function or method",
    "test_gone": "test_nowhere",
    "crash": "no assertion failed",
    "exit": "the process ended with status 255",
    "abort": "the process ended with status -6",
}


def run_check(folder: Path, faults: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the check on faults of the toy project, in a process of its own."""
    files = {"toy.py": TOY, "toy_user.py": USER, "test_toy.py": TESTS, "pytest.ini": "[pytest]\n"}
    for name, source in {**files, "toy_faults.py": HEAD + faults}.items():
        (folder / name).write_text(source, encoding="utf-8")
    path = os.pathsep.join([str(folder), str(PROJECT)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "scripts.check_faults", "--table", "toy_faults", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def read_sections(output: str) -> dict[str, tuple[str, str]]:
    """Return the verdict and the details of each fault from the report."""
    sections: dict[str, tuple[str, str]] = {}
    name = ""
    for line in output.splitlines():
        if line.startswith(" "):
            verdict, details = sections[name]
            sections[name] = verdict, f"{details}\n{line}"
        elif " s  " in line:
            name = line.split(" s  ")[1]
            sections[name] = line.split()[0], ""
    return sections


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Verdicts and details of all ``CASES``, from one run of the check."""
    faults = "".join(fault(name, *case[1:]) for name, case in CASES.items())
    done = run_check(tmp_path_factory.mktemp("toy"), faults, "--jobs", "4")
    assert done.returncode == 1
    # The green run stops at the test that is gone, so it is none.
    return read_sections(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_check_faults_with_a_fault_gives_its_verdict(report, name):
    assert report[name][0] == CASES[name][0]


@pytest.mark.parametrize("name", REASONS)
def test_check_faults_with_a_fault_not_caught_gives_the_reason(report, name):
    assert "A mistake." in report[name][1]
    assert REASONS[name] in report[name][1]


def test_check_faults_with_a_fault_that_hangs_is_unusable(tmp_path):
    done = run_check(tmp_path, fault("hang", "time.sleep(600)"), "--timeout", "3")
    verdict, details = read_sections(done.stdout)["hang"]
    assert verdict == UNUSABLE
    assert "timed out after 3 s" in details


def test_check_faults_with_all_caught_passes(tmp_path):
    done = run_check(tmp_path, fault("wrong", "return 0"))
    assert read_sections(done.stdout) == {"wrong": (CAUGHT, ""), "(no fault)": ("green", "")}
    assert done.returncode == 0


def test_check_faults_with_a_test_that_is_red_without_a_fault_fails(tmp_path):
    done = run_check(tmp_path, fault("wrong", "return 0", "test_red"))
    sections = read_sections(done.stdout)
    assert sections["wrong"][0] == CAUGHT
    assert sections["(no fault)"][0] == "RED"
    assert "tests fail without any fault" in sections["(no fault)"][1]
    assert done.returncode == 1


def test_check_faults_with_many_short_processes_loses_no_exit_status(tmp_path):
    """A status that two threads wait for reaches one of them; the other reports 255."""
    names = [f"fault_{i}" for i in range(12)]
    done = run_check(
        tmp_path, "".join(fault(name, "os._exit(40)") for name in names), "--jobs", "6"
    )
    sections = read_sections(done.stdout)
    assert {name: sections[name][0] for name in names} == dict.fromkeys(names, CAUGHT)


def test_check_faults_with_an_unknown_name_is_an_error(tmp_path):
    done = run_check(tmp_path, fault("wrong", "return 0"), "--only", "no such fault")
    assert done.returncode == 2
    assert "no fault has 'no such fault' in its name" in done.stderr


@pytest.mark.parametrize("fault", load_faults(TABLE).values(), ids=lambda fault: fault.name)
def test_fault_in_the_table_has_a_target_and_tests(fault):
    find_target(fault.target)
    assert fault.mistake
    assert fault.tests
    for test in fault.tests:
        path, *names = test.partition("[")[0].split("::")
        assert f"def {names[-1]}(" in (PROJECT / path).read_text(encoding="utf-8")
