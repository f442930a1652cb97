"""The progress bar of a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from tqdm import tqdm


def make_bar(frames: int, done: int) -> tqdm:
    """Make a bar of ``frames`` frames, of which some are ``done``."""
    return tqdm(
        total=frames,
        initial=min(done, frames),
        unit=" frames",
        smoothing=0.1,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log file should stay short
    )


def show(bar: tqdm, done: int, numbers: Mapping[str, float]) -> None:
    """Move the bar to ``done`` frames, and show the numbers that are known already."""
    known = [f"{name} {_round(value)}" for name, value in numbers.items() if value == value]
    bar.set_postfix_str(", ".join(known), refresh=False)
    bar.update(min(done, bar.total) - bar.n)


def _round(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"
