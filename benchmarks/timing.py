"""Time contestants side by side: every round runs each of them once, in an order of its own.

A machine's speed drifts. Contestants that are timed in turns drift together, so that ratios of
their medians stand where the figures themselves do not. A call finds the caches and the memory as
the one before it has left them, so each comes after any other.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

K = TypeVar("K")
Clock = Callable[[], float]

# Calls this long (s) are dear: the one that estimates their time counts as a sample.
_COUNTS_AS_SAMPLE = 1.0


class Timing(NamedTuple):
    """Time of one call, in seconds.

    Attributes:
        median: over the samples.
        low: lower quartile.
        high: upper quartile.
        rounds: number of samples.
    """

    median: float
    low: float
    high: float
    rounds: int

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a share of the median."""
        return (self.high - self.low) / self.median


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Attributes:
        seconds: of samples for each contestant.
        fewest: rounds, however slow a contestant is.
        most: rounds, however fast it is.
        sample: shortest sample in seconds; faster calls are repeated within one.
    """

    seconds: float = 0.25
    fewest: int = 3
    most: int = 11
    sample: float = 0.002


class _Contestant:
    def __init__(self, call: Callable[[], object], budget: Budget, clock: Clock) -> None:
        self.call, self.clock, self.repeats = call, clock, 1
        self.samples: list[float] = []
        # The first call may compile, trace or plan.
        self._time()
        estimate = self._time()
        if estimate >= _COUNTS_AS_SAMPLE:
            self.samples.append(estimate)
        self.repeats = max(1, math.ceil(budget.sample / estimate))
        rounds = int(budget.seconds / (estimate * self.repeats))
        self.rounds = min(max(rounds, budget.fewest), budget.most) - len(self.samples)

    def _time(self) -> float:
        # As timeit does: a collection of garbage would hit whoever runs when it is due.
        gc.disable()
        try:
            start = self.clock()
            for _ in range(self.repeats):
                self.call()
            return (self.clock() - start) / self.repeats
        finally:
            gc.enable()

    def take_part(self, turn: int, turns: int) -> None:
        """Take a sample if it is due, ``rounds`` of them spread evenly over all turns."""
        if (turn + 1) * self.rounds // turns > turn * self.rounds // turns:
            self.samples.append(self._time())

    def summary(self) -> Timing:
        low, median, high = np.quantile(self.samples, (0.25, 0.5, 0.75)).tolist()
        return Timing(median, low, high, len(self.samples))


def interleave(
    calls: Mapping[K, Callable[[], object]], budget: Budget, clock: Clock = time.perf_counter
) -> dict[K, Timing]:
    """Time calls in turns.

    Args:
        calls: what to time, by name.
        budget: how long; slow contestants get fewer samples, spread over the same stretch of time.
        clock: returns seconds.

    Returns:
        For every name the time of one call.
    """
    contestants = {key: _Contestant(call, budget, clock) for key, call in calls.items()}
    turns = max((c.rounds for c in contestants.values()), default=0)
    order, shuffle = list(contestants.values()), random.Random(0).shuffle
    for turn in range(turns):
        shuffle(order)
        for contestant in order:
            contestant.take_part(turn, turns)
    return {key: c.summary() for key, c in contestants.items()}


def geomean(ratios: Iterable[float]) -> float:
    """Return the geometric mean: that of the inverse ratios is its inverse.

    Examples:
        >>> geomean([2.0, 8.0])
        4.0
    """
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(math.fsum(logs) / len(logs))
