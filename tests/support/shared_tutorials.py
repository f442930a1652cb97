"""Helpers for the tests of tutorials that share modules in ``tutorials/``."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "learning_curve.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def read_checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def gradient_steps(checkpoint: dict[str, Any]) -> int:
    return int(checkpoint["learner"]["optimizer"]["state"][0]["step"])


def assert_complete(folder: Path, frames: list[int], tested: int = 20) -> None:
    """All files are there, and the records have a row for each of ``frames``."""
    rows = read_rows(folder)
    assert [row["frames"] for row in rows] == frames
    assert all(math.isfinite(value) for row in rows[1:] for value in row.values())
    assert (folder / "learning_curve.png").read_bytes().startswith(PNG_SIGNATURE)
    result = json.loads((folder / "result.json").read_text())
    assert len(result["test_returns"]) == tested
    assert result["test_return"] == pytest.approx(sum(result["test_returns"]) / tested)
    best = max(rows, key=lambda row: (row["evaluation"], row["frames"]))
    assert result["best_frames"] == best["frames"]
    assert result["best_evaluation"] == pytest.approx(best["evaluation"])


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b) or isinstance(a, dict)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    else:
        assert a == b


def interrupt(
    script: Path, argv: list[str], folder: Path, number: signal.Signals = signal.SIGINT
) -> None:
    """Run a tutorial, press Ctrl-C after its first evaluation, and check that all is written."""
    process = subprocess.Popen(
        [sys.executable, str(script), *argv, "--output", str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (folder / "checkpoint.pt").exists():
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert f"Stopped after {read_checkpoint(folder)['frames']} frames" in out
    assert f"--resume {folder / 'checkpoint.pt'}" in out
    assert (folder / "learning_curve.png").read_bytes().startswith(PNG_SIGNATURE)


def make_trainer(tutorial: ModuleType, folder: Path, *argv: str) -> Any:
    command_line, records = import_module("command_line"), import_module("records")
    argv = (*argv, "--output", str(folder))
    settings, _ = command_line.read_settings(tutorial.Settings, argv, "")
    return tutorial.Trainer(settings, records.Records(folder, "test"))
