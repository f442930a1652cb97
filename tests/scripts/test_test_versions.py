"""The run of the tests with other versions: what is installed, and what is read and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import test_versions as script
from scripts.test_versions import LANES, NIGHTLY, Lane

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


def test_requirements_include_those_of_nested_extras():
    names = {one.name for one in script.requirements()}
    assert {"torch", "torchrl", "tensordict", "pytest", "ray", "onnx", "gymnasium"} <= names
    assert "rnnkeys" not in names and "ruff" not in names


def test_write_constraints_leaves_out_the_pins_of_replaced_packages(tmp_path: Path):
    script.write_constraints(Lane(NIGHTLY), tmp_path / "constraints.txt")
    pinned = (tmp_path / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = {line.partition("==")[0] for line in pinned}
    assert {"torch", "numpy"} <= names
    assert not {"torchrl", "tensordict"} & names


def test_write_constraints_keeps_the_versions_of_the_lane(tmp_path: Path):
    script.write_constraints(LANES["torch 2.11"], tmp_path / "constraints.txt")
    lines = (tmp_path / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "torch==2.11.*" in lines and "triton" not in lines
    assert not any(line.startswith("torch==2.13") for line in lines)


def test_build_with_an_absent_python_names_it(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"python3\.absent does not run"):
        script.build(Lane({}, python="python3.absent"), tmp_path)


def test_check_lane_that_cannot_be_built_gives_the_reason(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(script, "CACHE", tmp_path)
    monkeypatch.setitem(LANES, "pinned", Lane({}, python="python3.absent"))
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
    monkeypatch.setattr(script, "run", lambda lane, python, arguments: {"python": str(python)})
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
    assert merged["commit"] == "abc, 2 tests again with def"


def test_run_says_which_tests_are_left_out(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(script.subprocess, "run", lambda *args, **options: None)
    monkeypatch.setattr(script, "_versions", lambda python: {})
    monkeypatch.setattr(script, "_commit", lambda: "abc")
    (tmp_path / "lane" / "bin").mkdir(parents=True)
    python = tmp_path / "lane" / "bin" / "python"
    whole = script.run(LANES["nightly"], python, ["-n", "1"])
    assert whole["tests"] == "all but tests/test_packaging.py"
    assert (
        script.run(LANES["nightly"], python, ["-n", "1", "tests/cells"])["tests"] == "tests/cells"
    )
    assert (tmp_path / "lane.log").exists()
