"""Processes of their own: for what must not be disturbed, or takes effect where one begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PROJECT = Path(__file__).resolve().parent.parent
_NO_VARIABLES: Mapping[str, str] = {}


def ask(
    module: str, *arguments: str, question: Any = None, variables: Mapping[str, str] = _NO_VARIABLES
) -> Any:
    """Run a module of the benchmarks; it reads JSON from stdin and writes JSON to stdout.

    Args:
        module: its name, ``"benchmarks.memory"`` for example.
        *arguments: of its command line.
        question: what it reads.
        variables: of its environment, besides those that are set.

    Returns:
        What it wrote.

    Raises:
        RuntimeError: if it fails, with what it said.
    """
    child = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        cwd=_PROJECT,
        env={**os.environ, **variables, "PYTHONPATH": str(_PROJECT)},
    )
    if child.returncode:
        raise RuntimeError(f"The process that runs {module} failed:\n{child.stderr}")
    return json.loads(child.stdout)
