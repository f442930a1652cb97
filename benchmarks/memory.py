"""Measure the peak memory of a forward and backward pass, in a process of its own.

torch's profiler reports every allocation and release of torch's CPU allocator, from which oneDNN
takes its workspaces and scratchpads too; the largest running sum is the peak. The figure is exact,
does not depend on the load of the machine, and counts what is asked for even if it is never
touched. A process of its own keeps the profiler's hooks away from what is timed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .cases import Case, Shape, make_batch
from .child_process import run_module
from .contestants import Contestant


@dataclass(frozen=True)
class MemoryRecord:
    """Peak memory of one case.

    Attributes:
        case: what ran.
        peaks: bytes beyond what was there before the call, by contestant.
    """

    case: Case
    peaks: dict[str, int]


def running_peak(changes: Iterable[int]) -> int:
    """Return the largest sum of any number of first changes, at least 0.

    Examples:
        >>> running_peak([4, 4, -4, 2, -6])
        8
    """
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak


def peak_of(name: str, case: Case) -> int:
    """Return the bytes that a forward and backward pass holds at most, with its results."""
    return peak_bytes(Contestant(name, case, make_batch(case)).both)


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the bytes that a call holds at most, by torch's profiler."""
    # Caches and kernels are made once and do not count as memory of a call.
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return running_peak(event.nbytes() for event in events)


def measure(wanted: Sequence[tuple[Case, Sequence[str]]], threads: int) -> list[MemoryRecord]:
    """Measure in a child process.

    Args:
        wanted: cases, each with names of contestants.
        threads: of torch; some kernels hold a buffer for each.
    """
    question = [(asdict(case), names) for case, names in wanted]
    peaks = run_module("benchmarks.memory", str(threads), request=question)
    return [MemoryRecord(case, found) for (case, _), found in zip(wanted, peaks, strict=True)]


def main() -> None:
    """Read cases and names from stdin and write peaks to stdout."""
    torch.set_num_threads(int(sys.argv[1]))
    peaks = []
    for fields, names in json.load(sys.stdin):
        case = Case(fields["cell"], Shape(*fields["shape"]), fields["resets"])
        peaks.append({name: peak_of(name, case) for name in names})
    json.dump(peaks, sys.stdout)


if __name__ == "__main__":
    main()
