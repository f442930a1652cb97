"""Run the test suite with other versions of Python, torch and TorchRL.

Each lane gets an environment of its own in ``.cache/versions``, which is removed after its tests: a
lane takes up to 7 GB of disk, and up to 4 GB of downloads. Results are kept in
``benchmarks/results/versions.json``, and ``versions.md`` beside it shows them as a table.

    python -m scripts.test_versions                         # all lanes, one after the other
    python -m scripts.test_versions --lanes nightly         # one of them
    python -m scripts.test_versions --lanes nightly --keep  # again in the environment that it left
    python -m scripts.test_versions --failed                # the failed tests of last time alone
    python -m scripts.test_versions -- tests/cells -x       # with other arguments for pytest

Each lane's Python is looked up on the path. pyenv finds those that it has installed with
``PYENV_VERSION=3.10:3.11:3.12:3.13``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
CACHE = PROJECT / ".cache"
RESULTS = PROJECT / "benchmarks" / "results" / "versions.json"
SHOWN = ("torch", "torchrl", "tensordict", "triton", "numpy")


class Lane(NamedTuple):
    """An interpreter, and versions that differ from those of ``constraints.txt``.

    Attributes:
        python: the interpreter.
        instead: requirements in place of the pins of these packages: ``"torch==2.11.*"``, or
            ``"torch"`` for the newest that pip finds.
        nightly: distributions of another name that replace those of the same packages.
    """

    python: str
    instead: tuple[str, ...] = ()
    nightly: tuple[str, ...] = ()


LANES = {
    # torch 2.11 rejects newer setuptools.
    "oldest": Lane("python3.10", instead=("torch==2.11.*", "triton", "setuptools==81.*")),
    "pinned": Lane("python3.11"),
    "nightly": Lane("python3.12", nightly=("torchrl-nightly", "tensordict-nightly")),
    "newest": Lane("python3.13", instead=("torch", "triton")),
}


def write_constraints(lane: Lane, path: Path) -> None:
    """Write ``constraints.txt`` with the lane's versions in place of the pins that it replaces."""
    replaced = {re.split(r"[=<>]", text)[0]: text for text in lane.instead}
    lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in replaced]
    # A name without a version is no constraint.
    kept += [text for name, text in replaced.items() if text != name]
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")


def build(lane: Lane, folder: Path) -> Path:
    """Build the environment of a lane in a folder; return its Python.

    Raises:
        RuntimeError: if the interpreter or a package cannot be had.
    """
    _call([lane.python, "-m", "venv", str(folder)])
    python = folder / "bin" / "python"
    constraints = folder / "constraints.txt"
    write_constraints(lane, constraints)

    def pip(command: str, *arguments: str) -> None:
        # The variable replaces constraints of pip's own configuration; -c would add to them, and
        # "the newest torch" would be the newest that they allow.
        _call([str(python), "-m", "pip", command, *arguments], PIP_CONSTRAINT=constraints.as_uri())

    # torch first: what is installed later takes the triton that it brought.
    pip("install", "torch", "setuptools")
    pip("install", "--no-build-isolation", "-e", ".[dev]")
    if lane.nightly:
        pip("uninstall", "-y", *(name.removesuffix("-nightly") for name in lane.nightly))
        pip("install", *lane.nightly)
    return python


def _call(command: list[str], **variables: str) -> None:
    environment = {**os.environ, **variables}
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=environment)
    except OSError as error:
        raise RuntimeError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise RuntimeError(f"{' '.join(command[:4])}: {''.join(last)}")


def run(python: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run the tests in a lane's environment; return versions, counts and names of failed tests.

    Raises:
        RuntimeError: if pytest ended early, and its counts mean nothing.
    """
    began = time.monotonic()
    folder = python.parents[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    # Written as it comes: tail -f .cache/versions/pinned.log.
    log = folder.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=PROJECT, env=environment, stdout=file, stderr=file)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended early, with status {done.returncode}: see {log}")
    chosen = [one for one in arguments if one.startswith(("tests", "rnnkeys", "docs"))]
    return {
        "versions": _versions(python),
        "commit": _commit(),
        "tests": " ".join(chosen) or "all",
        **read_counts(log.read_text(encoding="utf-8")),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def merge(before: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """Return a lane's result after its failed tests ran again.

    Args:
        before: the result with ``failures``.
        again: the result of these tests.
    """
    commit = before["commit"]
    if again["commit"] != commit:
        commit = f"{commit}, those that failed ({len(before['failures'])}) with {again['commit']}"
    return {
        **before,
        "commit": commit,
        "passed": before["passed"] + again["passed"],
        "failed": again["failed"],
        "skipped": before["skipped"] + again["skipped"],
        "failures": again["failures"],
        "minutes": round(before["minutes"] + again["minutes"], 1),
    }


def read_counts(output: str) -> dict[str, Any]:
    r"""Read counts and names of failed tests from pytest's output.

    Examples:
        >>> read_counts("FAILED tests/a.py::test_b - Error\n1 failed, 20 passed in 3.00s\n")
        {'passed': 20, 'failed': 1, 'skipped': 0, 'failures': ['tests/a.py::test_b']}
    """
    summary = "".join(output.strip().splitlines()[-1:])
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", summary)
    number = {what: int(count) for count, what in found}
    counts = {name: number.get(name, 0) for name in ("passed", "failed", "skipped")}
    counts["failed"] += number.get("error", 0)
    failures = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", output, re.MULTILINE)
    return {**counts, "failures": failures}


def _versions(python: Path) -> dict[str, str]:
    script = "import importlib, json, platform, sys\nfound = {'python': platform.python_version()}"
    script += f"\nfor name in {SHOWN}:\n    found[name] = importlib.import_module(name).__version__"
    done = subprocess.run(
        [str(python), "-c", script + "\nprint(json.dumps(found))"], capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


def _commit() -> str:
    """Return the commit that is checked out, or nothing outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    return done.stdout.strip()


def check_lane(name: str, arguments: Sequence[str], keep: bool = False) -> dict[str, Any]:
    """Build a lane, run its tests and remove it.

    Args:
        name: one of ``LANES``.
        arguments: arguments of pytest.
        keep: use the environment that is there, if it was built whole, and do not remove it.

    Returns:
        The result, or the reason why there is none under ``"not run"``.
    """
    folder = CACHE / "versions" / name
    built = folder / "built"
    python = folder / "bin" / "python"
    try:
        if not (keep and built.exists()):
            shutil.rmtree(folder, ignore_errors=True)
            python = build(LANES[name], folder)
            built.touch()
        return run(python, arguments)
    except RuntimeError as error:
        return {"not run": str(error)}
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def render(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown page."""
    counted = ["passed", "failed", "skipped", "minutes", "commit", "tests"]
    head = ["lane", "Python", *SHOWN, *counted]
    text = "The test suite with other versions, from `make test-versions`."
    lines = ["# Versions", "", text, ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, result in results.items():
        if "not run" in result:
            continue
        versions = [result["versions"].get(one, "") for one in ("python", *SHOWN)]
        counts = [str(result[one]) for one in counted]
        lines.append(f"| {' | '.join([name, *versions, *counts])} |")
    for name, result in results.items():
        if "not run" in result:
            lines += ["", f"Not run, {name}: {result['not run']}"]
        elif result["failures"]:
            lines += ["", f"Failed, {name}:", "", *(f"- `{one}`" for one in result["failures"])]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run lanes and write their results; return 0 if every test passed, else 1."""
    parser = argparse.ArgumentParser(
        description="Run the tests with other versions.", allow_abbrev=False
    )
    parser.add_argument("--lanes", nargs="*", choices=LANES, default=[*LANES], metavar="LANE")
    parser.add_argument("--jobs", default="2", help="processes of pytest (default: 2)")
    parser.add_argument(
        "--keep", action="store_true", help="keep the environments and use them again"
    )
    parser.add_argument(
        "--failed", action="store_true", help="run only what failed last time, and add the results"
    )
    parser.add_argument("pytest", nargs="*", help="other arguments for pytest")
    options = parser.parse_args(arguments)
    status = 0
    for name in options.lanes:
        before = _read_results().get(name, {})
        tests = before.get("failures", []) if options.failed else []
        if options.failed and not tests:
            print(f"{name}: no test failed last time", flush=True)
            continue
        print(f"{name}: building the environment", flush=True)
        result = check_lane(name, ["-n", options.jobs, *tests, *options.pytest], options.keep)
        print(f"{name}: {json.dumps(result)}", flush=True)
        if result.get("failed", 1):
            status = 1
        _write_result(name, merge(before, result) if tests and "failed" in result else result)
    return status


def _read_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def _write_result(name: str, result: dict[str, Any]) -> None:
    """Write a lane's result beside those of the others, which may have been written meanwhile."""
    results = {**_read_results(), name: result}
    ordered = {lane: results[lane] for lane in LANES if lane in results}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(render(ordered), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
