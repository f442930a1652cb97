"""The Makefile with a PYTHON that cannot build the environment, or may not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def _python(path: Path, version: str, imports: str) -> str:
    """Write a program that answers like a Python of some version; returns its path."""
    path.write_text(
        f'#!/bin/sh\ncase "$2" in\n*ensurepip*) {imports};;\n*) echo {version};;\nesac\n'
    )
    path.chmod(0o755)
    return str(path)


def _make(folder: Path, python: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run ``make env`` beside an environment that was built before."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, folder)
    (folder / ".venv").mkdir(exist_ok=True)
    (folder / ".venv" / "kept").touch()
    command = ["make", "env", f"PYTHON={python}", *options]
    # The tests may themselves run below make, which passes its own settings on.
    settings = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
    env = {name: value for name, value in os.environ.items() if name not in settings}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env=env)


def _assert_rejected(done: subprocess.CompletedProcess[str], folder: Path, *words: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert all(word in line for word in words)
    assert (folder / ".venv" / "kept").exists()


def test_make_with_an_absent_python_keeps_the_environment(tmp_path):
    done = _make(tmp_path, "python3.absent")
    _assert_rejected(done, tmp_path, "PYTHON=python3.absent does not run", "3.10 or newer")


@pytest.mark.parametrize("version", ["3.9.18", "3.1.5", "2.7.18"])
def test_make_with_an_old_python_names_its_version(tmp_path, version):
    python = _python(tmp_path / "python", version, "echo yes")
    _assert_rejected(_make(tmp_path, python), tmp_path, version, "rnnkeys needs 3.10 or newer")


def test_make_with_a_python_without_venv_names_the_package(tmp_path):
    python = _python(tmp_path / "python", "3.10.0", "exit 1")
    _assert_rejected(_make(tmp_path, python), tmp_path, "has no venv", "apt install python3-venv")


def test_make_with_a_new_python_says_that_pip_may_find_no_versions(tmp_path):
    python = _python(tmp_path / "python", "3.15.0", "echo yes")
    done = _make(tmp_path, python, "--dry-run")
    assert "holds versions for Python 3.10 to 3.13" in done.stdout and "3.15.0" in done.stdout
    tested = _make(tmp_path, _python(tmp_path / "python", "3.12.1", "echo yes"), "--dry-run")
    assert "holds versions" not in tested.stdout
