"""The run of the tests with other versions: what is installed, and what is read and written."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from scripts import test_versions as script
from scripts.test_versions import LANES, Lane

OUTPUT = """
.F.s
FAILED tests/a.py::test_b[x-y] - AssertionError: 1 - 2
ERROR tests/c.py::test_d
1 failed, 3 passed, 2 skipped, 1 error in 65.21s (0:01:05)
"""


def test_read_counts_with_failures_names_them():
    assert script.read_counts(OUTPUT) == {
        "passed": 3,
        "failed": 2,
        "skipped": 2,
        "failures": ["tests/a.py::test_b[x-y]", "tests/c.py::test_d"],
    }


def test_read_counts_without_a_summary_counts_nothing():
    assert script.read_counts("Segmentation fault") == {
        "passed": 0,
        "failed": 0,
        "skipped": 0,
        "failures": [],
    }


def test_write_constraints_puts_the_versions_of_the_lane_in_place_of_pins(tmp_path: Path):
    lane = Lane("python3", instead=("torch==2.11.*", "triton", "setuptools==81.*"))
    script.write_constraints(lane, tmp_path / "constraints.txt")
    lines = (tmp_path / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = ("torch=", "triton", "setuptools")
    assert [one for one in lines if one.startswith(names)] == ["torch==2.11.*", "setuptools==81.*"]
    assert "torchrl==0.14.1" in lines


def test_build_of_the_newest_torch_ignores_constraints_of_pips_configuration(
    monkeypatch, tmp_path: Path
):
    calls = []
    monkeypatch.setattr(script, "_call", lambda *args, **variables: calls.append((args, variables)))
    (tmp_path / "lane").mkdir()
    script.build(LANES["newest"], tmp_path / "lane")
    constraints = (tmp_path / "lane" / "constraints.txt").as_uri()
    assert calls[0][0][0][0] == "python3.13"
    assert [variables for _, variables in calls[1:]] == [{"PIP_CONSTRAINT": constraints}] * 2
    assert not any("-c" in args[0] for args, _ in calls)


def test_build_of_the_nightly_replaces_the_released_packages(monkeypatch, tmp_path: Path):
    calls = []
    monkeypatch.setattr(script, "_call", lambda command, **variables: calls.append(command[3:]))
    (tmp_path / "lane").mkdir()
    script.build(LANES["nightly"], tmp_path / "lane")
    assert calls[-2:] == [
        ["uninstall", "-y", "torchrl", "tensordict"],
        ["install", "torchrl-nightly", "tensordict-nightly"],
    ]


def test_build_with_an_absent_python_names_it(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"python3\.absent does not run"):
        script.build(Lane("python3.absent"), tmp_path)


def test_check_lane_that_cannot_be_built_gives_the_reason(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(script, "CACHE", tmp_path)
    monkeypatch.setitem(LANES, "pinned", Lane("python3.absent"))
    assert "python3.absent does not run" in script.check_lane("pinned", [])["not run"]
    assert not list((tmp_path / "versions").glob("*"))


def test_check_lane_that_keeps_its_environment_builds_once(monkeypatch, tmp_path: Path):
    built = []

    def build(lane: Lane, folder: Path) -> Path:
        folder.mkdir(parents=True)
        built.append(folder)
        return folder / "bin" / "python"

    monkeypatch.setattr(script, "CACHE", tmp_path)
    monkeypatch.setattr(script, "build", build)
    monkeypatch.setattr(script, "run", lambda python, arguments: {"python": str(python)})
    first = script.check_lane("pinned", [], keep=True)
    assert script.check_lane("pinned", [], keep=True) == first
    assert len(built) == 1 and built[0].exists()
    script.check_lane("pinned", [])
    assert len(built) == 2 and not built[0].exists()


def test_render_shows_versions_counts_failures_and_lanes_not_run():
    versions = {"python": "3.11.7", "torch": "2.14.1"}
    result = {**script.read_counts(OUTPUT), "versions": versions, "minutes": 1.1}
    result |= {"commit": "abc", "tests": "all"}
    page = script.render({"torch 2.14": result, "python 3.14": {"not run": "it is absent"}})
    assert "| torch 2.14 | 3.11.7 | 2.14.1 |  |  |  |  | 3 | 2 | 2 | 1.1 | abc | all |" in page
    assert "- `tests/c.py::test_d`" in page
    assert "Not run, python 3.14: it is absent" in page


def test_main_with_failed_runs_the_failed_tests_and_adds_their_results(monkeypatch, tmp_path: Path):
    results = tmp_path / "versions.json"
    first = {**script.read_counts(OUTPUT), "versions": {}, "minutes": 1.1}
    first |= {"commit": "abc", "tests": "all"}
    again = {"passed": 1, "failed": 1, "skipped": 0, "failures": ["tests/c.py::test_d"]}
    again |= {"versions": {}, "minutes": 0.2, "commit": "def", "tests": "two"}
    ran = {}

    def check_lane(name: str, arguments: list[str], keep: bool):
        ran[name] = arguments
        return again

    monkeypatch.setattr(script, "RESULTS", results)
    monkeypatch.setattr(script, "check_lane", check_lane)
    results.write_text(json.dumps({"pinned": {**first, "failures": []}, "nightly": first}))
    assert script.main(["--lanes", "pinned", "nightly", "--jobs", "1", "--failed"]) == 1
    assert ran == {"nightly": ["-n", "1", "tests/a.py::test_b[x-y]", "tests/c.py::test_d"]}
    merged = json.loads(results.read_text())["nightly"]
    assert (merged["passed"], merged["failed"], merged["skipped"]) == (4, 1, 2)
    assert merged["failures"] == ["tests/c.py::test_d"] and merged["tests"] == "all"
    assert merged["commit"] == "abc, those that failed (2) with def"


def end_pytest_with(monkeypatch, status: int) -> None:
    ended = subprocess.CompletedProcess([], status)
    monkeypatch.setattr(script.subprocess, "run", lambda *args, **options: ended)
    monkeypatch.setattr(script, "_versions", lambda python: {})
    monkeypatch.setattr(script, "_commit", lambda: "abc")


def test_run_names_the_chosen_tests(monkeypatch, tmp_path: Path):
    end_pytest_with(monkeypatch, 0)
    python = tmp_path / "lane" / "bin" / "python"
    assert script.run(python, ["-n", "1"])["tests"] == "all"
    assert script.run(python, ["-n", "1", "tests/cells"])["tests"] == "tests/cells"
    assert (tmp_path / "lane.log").exists()


def test_run_of_tests_that_end_early_is_an_error(monkeypatch, tmp_path: Path):
    end_pytest_with(monkeypatch, -11)
    with pytest.raises(RuntimeError, match=r"status -11: see .*lane\.log"):
        script.run(tmp_path / "lane" / "bin" / "python", [])


def test_main_with_a_lane_that_did_not_run_returns_one(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(script, "RESULTS", tmp_path / "versions.json")
    monkeypatch.setattr(script, "check_lane", lambda *arguments: {"not run": "no such Python"})
    assert script.main(["--lanes", "pinned"]) == 1
