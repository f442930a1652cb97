"""The check of the seeded faults, on a toy project: what it must report, and when it must fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import check_faults
from scripts.check_faults import CAUGHT, SURVIVED, UNUSABLE
from tests.faults import FAULTS, Fault

SOURCE = """
def add(a, b):
    return a + b

def unseen(a):
    return a
"""
TESTS = """
from toy import add

def test_add():
    assert add(1, 2) == 3
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(check_faults, "COPIED", ("pyproject.toml", "toy.py", "tests"))
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    (tmp_path / "toy.py").write_text(SOURCE)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_toy.py").write_text(TESTS)
    return tmp_path


def _fault(before: str, after: str, tests: str = "tests", file: str = "toy.py") -> Fault:
    return Fault("a fault", file, before, after, (tests,))


def test_a_fault_that_the_tests_see_is_caught_and_the_project_is_left_as_it_was(toy):
    result = check_faults.judge(_fault("a + b", "a - b"), toy)
    assert result.verdict == CAUGHT
    assert (toy / "toy.py").read_text() == SOURCE


def test_a_fault_that_no_test_sees_survives(toy):
    result = check_faults.judge(_fault("return a\n", "return None\n"), toy)
    assert result.verdict == SURVIVED
    assert "1 passed" in result.detail


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (_fault("a * b", "a"), "holds the snippet 0 times"),
        (_fault("return", "pass"), "holds the snippet 2 times"),
        (_fault("a + b", "a", file="gone.py"), "gone.py holds the snippet 0 times"),
        (_fault("a + b", "a + b"), "changes nothing"),
        (_fault("a + b", "a +"), "SyntaxError"),
        (_fault("a + b", "a", tests="tests/test_toy.py::test_gone"), "test_gone"),
    ],
)
def test_a_fault_that_shows_nothing_is_unusable_not_caught(toy, fault, reason):
    result = check_faults.judge(fault, toy)
    assert result.verdict == UNUSABLE
    assert reason in result.detail


def test_a_hanging_fault_is_unusable(toy, monkeypatch):
    monkeypatch.setattr(check_faults, "TIMEOUT_S", 2)
    result = check_faults.judge(_fault("return a + b", "while True: pass"), toy)
    assert result.verdict == UNUSABLE
    assert "timed out" in result.detail


def test_tests_that_are_red_without_a_fault_are_refused(toy):
    (toy / "tests" / "test_toy.py").write_text(TESTS.replace("== 3", "== 4"))
    with pytest.raises(RuntimeError, match="fail without any fault"):
        list(check_faults.check([_fault("a + b", "a - b")], toy, jobs=1))


def test_the_report_fails_unless_every_fault_is_caught(toy, capsys):
    caught, survives = _fault("a + b", "a - b"), _fault("return a\n", "return None\n")
    assert check_faults.report(check_faults.check([caught], toy, jobs=1)) == 0
    assert "faults: 1 of 1 caught" in capsys.readouterr().out
    assert check_faults.report(check_faults.check([caught, survives], toy, jobs=2)) == 1
    out = capsys.readouterr().out
    assert "faults: 1 of 2 caught" in out
    assert "toy.py: 'return a\\n' -> 'return None\\n'" in out


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        check_faults.main(["--only", "no such fault"])
    assert "no fault has 'no such fault' in its name" in capsys.readouterr().err


def test_every_fault_can_be_planted(tmp_path):
    for i, fault in enumerate(FAULTS):
        source = check_faults.PROJECT / fault.file
        copy = tmp_path / str(i) / fault.file
        copy.parent.mkdir(parents=True)
        copy.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        check_faults.plant(fault, tmp_path / str(i))
        compile(copy.read_text(encoding="utf-8"), fault.file, "exec")


def test_names_of_faults_differ():
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names))
