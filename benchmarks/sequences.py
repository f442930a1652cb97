"""Time whole sequences: every way to run them, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import contestants
from .cases import Case, make_batch
from .contestants import Contestant
from .timing import Budget, Clock, Timing, interleave

FORWARD, BOTH = "forward", "forward + backward"


@dataclass(frozen=True)
class Record:
    """The measurements of one case.

    Attributes:
        case: what ran.
        phase: ``FORWARD`` or ``BOTH``.
        timings: by contestant.
    """

    case: Case
    phase: str
    timings: dict[str, Timing]

    def seconds(self, name: str) -> float:
        """Median time of a contestant's call."""
        return self.timings[name].median

    def bound(self) -> float:
        """Seconds that the matmuls of the case take at the speed of one large sgemm."""
        return self.case.matmul_flops * self.seconds(contestants.GEMM)


def time_together(
    phase: str,
    wanted: Iterable[tuple[Case, Iterable[str]]],
    budget: Budget,
    clock: Clock = time.perf_counter,
) -> list[Record]:
    """Time contestants in one or several cases, all in turns.

    Args:
        phase: ``FORWARD`` or ``BOTH``.
        wanted: cases, each with the names of contestants.
        budget: how long to measure.
        clock: returns seconds.

    Returns:
        A record per case. Each holds ``GEMM`` too, the time of *one floating point operation* of a
        large sgemm that took its turns among the others.
    """
    gemm, flops = contestants.make_gemm()
    calls: dict[tuple[Case | None, str], Callable[[], object]] = {}
    cases: list[Case] = []
    for case, names in wanted:
        batch = make_batch(case)
        cases.append(case)
        for name in names:
            contestant = Contestant(name, case, batch)
            calls[case, name] = contestant.forward if phase == FORWARD else contestant.both
    calls[None, contestants.GEMM] = gemm
    timings = interleave(calls, budget, clock)
    median, low, high, rounds = timings[None, contestants.GEMM]
    per_flop = Timing(median / flops, low / flops, high / flops, rounds)
    records = []
    for case in cases:
        own = {name: timing for (of, name), timing in timings.items() if of == case}
        records.append(Record(case, phase, {**own, contestants.GEMM: per_flop}))
    return records


def names_for(case: Case) -> tuple[str, ...]:
    """Return the contestants of a case; resets and states are compared at one reset in ten."""
    extra = (contestants.NO_RESETS, contestants.STORED) if case.resets == 0.1 else ()
    return (*contestants.ALL, *extra)


def time_growth(cases: Iterable[Case], torchrl_up_to: int, budget: Budget) -> list[Record]:
    """Time rows of growing length against each other.

    Args:
        cases: of one cell.
        torchrl_up_to: longest rows that TorchRL runs; its ``scan`` takes seconds there.
        budget: how long to measure.
    """
    fast = tuple(name for name in contestants.ALL if name not in contestants.TORCHRL)
    wanted = [(case, contestants.ALL if case.shape.T <= torchrl_up_to else fast) for case in cases]
    return time_together(BOTH, wanted, budget)
