"""Run the test suite with every version of torch and TorchRL that ``pyproject.toml`` admits.

Each lane gets an environment of its own in ``.cache/versions``, which is removed after its tests: a
lane takes up to 7 GB of disk, and up to 4 GB of downloads. Results are kept in
``benchmarks/results/versions.json``, and ``versions.md`` beside it shows them as a table.

    python -m scripts.test_versions                         # all lanes, one after the other
    python -m scripts.test_versions --lanes nightly         # one of them
    python -m scripts.test_versions --lanes nightly --keep  # again in the environment that it left
    python -m scripts.test_versions --failed                # the failed tests of last time alone
    python -m scripts.test_versions -- tests/cells -x       # with other arguments for pytest
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

# tomllib is tomli, which came into Python with 3.11.
tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

PROJECT = Path(__file__).resolve().parent.parent
CACHE = PROJECT / ".cache"
RESULTS = PROJECT / "benchmarks" / "results" / "versions.json"
SHOWN = ("torch", "torchrl", "tensordict", "triton", "numpy")


class Lane(NamedTuple):
    """Versions that differ from those of ``constraints.txt``.

    Attributes:
        instead: packages that are not pinned, and the requirements that are installed instead.
        python: the interpreter; the one that runs this script by default.
        left_out: tests that cannot run, as arguments of pytest.
    """

    instead: dict[str, str]
    python: str = sys.executable
    left_out: tuple[str, ...] = ()


# The nightly builds are distributions of another name, which the packaging tests look for in vain.
NIGHTLY = {"torchrl": "torchrl-nightly", "tensordict": "tensordict-nightly"}
# torch 2.11 rejects newer setuptools, and the interpreter of its triton, 3.6, newer NumPy.
OLDEST = {
    "torch": "torch==2.11.*",
    "triton": "triton",
    "setuptools": "setuptools<82",
    "numpy": "numpy==2.3.*",
}
LANES = {
    "torch 2.11": Lane(OLDEST),
    "pinned": Lane({}),
    "torch 2.14": Lane({"torch": "torch==2.14.*", "triton": "triton"}),
    "newest torch": Lane({"torch": "torch", "triton": "triton"}),
    "nightly": Lane(NIGHTLY, left_out=("--ignore=tests/test_packaging.py",)),
    "python 3.10": Lane({}, python="python3.10"),
    "python 3.12": Lane({}, python="python3.12"),
    "python 3.13": Lane({}, python="python3.13"),
    "python 3.14": Lane({}, python="python3.14"),
}


def requirements(extra: str = "test") -> Iterator[Requirement]:
    """Yield what the package and one of its extras require; extras name each other."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [*project["dependencies"], f"rnnkeys[{extra}]"]
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name == "rnnkeys":
            for name in requirement.extras:
                waiting += project["optional-dependencies"][name]
        elif requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def write_constraints(lane: Lane, path: Path) -> None:
    """Write ``constraints.txt`` with the lane's versions in place of the pins that it replaces."""
    lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in lane.instead]
    # A name without a version is no constraint.
    kept += [text for text in lane.instead.values() if Requirement(text).specifier]
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")


def build(lane: Lane, folder: Path) -> Path:
    """Build the environment of a lane in a folder; return its Python.

    Raises:
        RuntimeError: if the interpreter or a package cannot be had.
    """
    _call([lane.python, "-m", "venv", str(folder)])
    python = folder / "bin" / "python"
    write_constraints(lane, folder / "constraints.txt")
    wanted = {_plain(one) for one in requirements() if one.name not in lane.instead}
    install = [str(python), "-m", "pip", "install", "--progress-bar", "off"]
    # torch first: what is installed later takes the build that is there.
    pins = [lane.instead.get(name, name) for name in ("torch", "tensordict", "torchrl")]
    for packages in (pins[:1], pins[1:], [*wanted, "setuptools", *lane.instead.values()]):
        _call([*install, "-c", str(folder / "constraints.txt"), *packages])
    return python


def _plain(requirement: Requirement) -> str:
    """Return a requirement without its marker."""
    extras = f"[{','.join(requirement.extras)}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    except OSError as error:
        raise RuntimeError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise RuntimeError(f"{' '.join(command[:4])}: {''.join(last)}")


def run(lane: Lane, python: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run the tests in a lane's environment; return versions, counts and names of failed tests."""
    began = time.monotonic()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": str(python.parent / "matplotlib"),
        "TORCHINDUCTOR_CACHE_DIR": str(python.parent / "inductor"),
        "TRITON_CACHE_DIR": str(python.parent / "triton"),
        "XDG_CACHE_HOME": str(python.parent / "cache"),
    }
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *lane.left_out]
    # Written as it comes: tail -f .cache/versions/nightly.log.
    folder = python.parents[1]
    log = folder.parent / f"{folder.name}.log"
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(
            [*command, *arguments], cwd=PROJECT, env=environment, stdout=file, stderr=file
        )
    return {
        "versions": _versions(python),
        "commit": _commit(),
        "tests": _describe_tests(lane, arguments),
        **read_counts(log.read_text(encoding="utf-8")),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def _describe_tests(lane: Lane, arguments: Sequence[str]) -> str:
    chosen = " ".join(one for one in arguments if one.startswith(("tests", "rnnkeys", "docs")))
    left_out = " and ".join(one.partition("=")[2] for one in lane.left_out)
    return chosen or (f"all but {left_out}" if left_out else "all")


def merge(before: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """Return a lane's result after its failed tests ran again.

    Args:
        before: the result with ``failures``.
        again: the result of these tests.
    """
    commit = before["commit"]
    if again["commit"] != commit:
        commit = f"{commit}, {len(before['failures'])} tests again with {again['commit']}"
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
    folder = CACHE / "versions" / name.replace(" ", "-")
    built = folder / "built"
    python = folder / "bin" / "python"
    try:
        if not (keep and built.exists()):
            shutil.rmtree(folder, ignore_errors=True)
            python = build(LANES[name], folder)
            built.touch()
        return run(LANES[name], python, arguments)
    except RuntimeError as error:
        return {"not run": str(error)}
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def render(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown page."""
    counted = ["passed", "failed", "skipped", "minutes", "commit", "tests"]
    head = ["lane", "Python", *SHOWN, *counted]
    text = "The test suite with other versions, from `make test-versions`, whole or in parts."
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
    """Run lanes and write their results; return 1 if a test failed, else 0."""
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
    failed = 0
    for name in options.lanes:
        before = _read_results().get(name, {})
        tests = before.get("failures", []) if options.failed else []
        if options.failed and not tests:
            print(f"{name}: no test failed last time", flush=True)
            continue
        print(f"{name}: building the environment", flush=True)
        result = check_lane(name, ["-n", options.jobs, *tests, *options.pytest], options.keep)
        print(f"{name}: {json.dumps(result)}", flush=True)
        failed += result.get("failed", 0)
        _write_result(name, merge(before, result) if tests and "failed" in result else result)
    return 1 if failed else 0


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
