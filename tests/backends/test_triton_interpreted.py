"""Runs the contract test and ``tests/support/triton_*.py`` in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
# What takes longest in the interpreter and says least about kernels is left to a GPU.
LONG = "any_drawn_problem or over_long_time"
LONG += " or (equals_the_reference and not (plain or random or layout))"
CONTRACT = f"triton and not ({LONG})"


def _pytest_interpreted(*arguments: str) -> str:
    """Run pytest with interpreted kernels; an own process, for Triton reads the mode on import."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def _passed(output: str) -> int:
    found = re.search(r"(\d+) passed", output)
    return int(found[1]) if found else 0


@needs_triton
@pytest.mark.slow
def test_interpreted_kernels_keep_the_contract_of_all_backends():
    assert _passed(_pytest_interpreted("tests/backends/test_contract.py", "-k", CONTRACT)) > 50


@needs_triton
@pytest.mark.slow
def test_interpreted_kernels_are_right_in_every_form():
    assert _passed(_pytest_interpreted("tests/support/triton_kernels.py")) > 60


@needs_triton
@pytest.mark.slow
def test_interpreted_linear_kernels_equal_the_cpu():
    assert _passed(_pytest_interpreted("tests/support/triton_linear.py")) > 20


@needs_triton
@pytest.mark.parametrize("form", ["split", "stepwise"])
def test_interpreted_kernel_of_one_problem_equals_the_reference(form):
    """What the seeded faults are shown to; the other tests see more and take longer."""
    case = f"test_form_equals_the_reference[{form}-lstm-random]"
    assert _passed(_pytest_interpreted(f"tests/support/triton_kernels.py::{case}")) == 1
