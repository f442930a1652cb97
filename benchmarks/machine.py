"""Facts of the machine that figures depend on, without its name."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("torch", "torchrl", "tensordict", "hoptorch", "gymnasium", "numpy")


def cpu_facts(threads: int) -> dict[str, str]:
    """Return what a reader needs to compare figures with another machine's, by name.

    Args:
        threads: that torch used.
    """
    return {
        "CPU": _cpu_model(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "load when it began": load(),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def load() -> str:
    """Return how many processes wanted a core during the last minute.

    More than a few tenths before a run, or more than the number of threads during it, says that
    others worked on the machine.
    """
    return f"{os.getloadavg()[0]:.1f}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    first = info.read_text().split("\n\n")[0]
    facts = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in first.splitlines())
    }
    # Names of virtual machines' processors often leave the generation out.
    return ", ".join(
        [facts.get("model name", "unknown")]
        + [f"{name} {facts[name]}" for name in ("cpu family", "model") if name in facts]
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
