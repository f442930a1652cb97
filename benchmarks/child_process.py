"""Child processes for measurements that need an undisturbed process or other variables."""

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


def run_module(
    module: str,
    *arguments: str,
    request: Any = None,
    variables: Mapping[str, str] = _NO_VARIABLES,
    python: str = sys.executable,
) -> Any:
    """Run a module of the benchmarks, which reads JSON from stdin and writes JSON to stdout.

    Args:
        module: name, for example ``"benchmarks.memory"``.
        *arguments: arguments of its command line.
        request: value that the module reads.
        variables: environment variables to set in addition.
        python: interpreter of the process.

    Returns:
        The value that the module writes.

    Raises:
        RuntimeError: if the module fails, with its error output.
    """
    child = subprocess.run(
        [python, "-m", module, *arguments],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=_PROJECT,
        env={**os.environ, **variables, "PYTHONPATH": str(_PROJECT)},
    )
    if child.returncode:
        raise RuntimeError(f"The process that runs {module} failed:\n{child.stderr}")
    return json.loads(child.stdout)
