"""Runs of tutorials, and the files that they write."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
NEEDS_SIGNALS = pytest.mark.skipif(sys.platform == "win32", reason="no signals between processes")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def load_tutorial(name: str) -> ModuleType:
    """Import ``tutorials/NAME.py`` alone: its folder is not on the path."""
    spec = spec_from_file_location(f"tutorial_{name}", ROOT / "tutorials" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def read_rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "learning_curve.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def read_checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def read_result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def read_files(folder: Path) -> tuple[list[dict[str, float]], dict[str, Any], dict[str, Any]]:
    """Return rows, result and checkpoint of a finished run, which has drawn its picture."""
    assert (folder / "learning_curve.png").read_bytes().startswith(_PNG_SIGNATURE)
    return read_rows(folder), read_result(folder), read_checkpoint(folder)


def assert_complete(folder: Path, frames: list[int], tested: int = 20) -> None:
    """Assert that a finished run wrote all files, with a row for each entry of ``frames``."""
    rows, result = read_rows(folder), read_result(folder)
    assert [row["frames"] for row in rows] == frames
    assert all(math.isfinite(value) for row in rows[1:] for value in row.values())
    assert (folder / "learning_curve.png").read_bytes().startswith(_PNG_SIGNATURE)
    assert len(result["test_returns"]) == tested
    assert math.isclose(result["test_return"], sum(result["test_returns"]) / tested, rel_tol=1e-6)
    best = max(rows, key=lambda row: (row["evaluation"], row["frames"]))
    assert result["best_frames"] == best["frames"]
    assert math.isclose(result["best_evaluation"], best["evaluation"], rel_tol=1e-6)


def assert_exits(capsys: pytest.CaptureFixture[str], text: str, call: Callable[[], Any]) -> str:
    """Assert that a tutorial ends with status 2 and a text on stderr, which is returned."""
    with pytest.raises(SystemExit) as stopped:
        call()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert text in error and "Traceback" not in error
    return error


def assert_fails(capsys: pytest.CaptureFixture[str], message: str, call: Callable[[], Any]) -> None:
    """Assert that a tutorial ends with one line on stderr that matches ``message``."""
    error = assert_exits(capsys, "error: ", call).splitlines()[-1]
    assert re.search(rf"error: .*{message}", error), error


def assert_same(a: Any, b: Any) -> None:
    """Assert that two nests of dicts, sequences and tensors are equal to the last bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    else:
        assert a == b or (a != a and b != b)


def start_script(script: Path, argv: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start a copy of a tutorial in ``folder``, away from the repository's other files."""
    copy = folder / script.name
    copy.write_bytes(script.read_bytes())
    return subprocess.Popen(
        [sys.executable, copy.name, *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupt_script(
    script: Path, argv: list[str], folder: Path, number: signal.Signals = signal.SIGINT
) -> str:
    """Send a signal to a tutorial after its first evaluation, and return its output."""
    process = start_script(script, [*argv, "--output", "out"], folder)
    while process.poll() is None and not (folder / "out" / "checkpoint.pt").exists():
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert (folder / "out" / "learning_curve.png").read_bytes().startswith(_PNG_SIGNATURE)
    assert not (folder / "out" / "result.json").exists()
    return out
