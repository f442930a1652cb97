"""Time limits of a benchmark: a slow contestant skips larger cases, and the whole run ends."""

from __future__ import annotations

import time
from collections.abc import Callable

from .cases import Case


class TimeLimits:
    """The limits of a run, and the calls that exceeded them.

    Args:
        call_seconds: limit of a call. A slower call is measured, but its contestant skips larger
            cases.
        run_minutes: limit of the run, or None.
        clock: returns seconds.

    Examples:
        >>> from benchmarks.cases import Shape
        >>> limits = TimeLimits(call_seconds=2.0)
        >>> limits.record("slow", Case("GRU", Shape(4, 64, 8, 16), 0.0), 3.5)
        >>> limits.find_reason_to_skip("slow", Case("GRU", Shape(4, 256, 8, 16), 0.1))
        'took 3.5 s on GRU (4, 64, 8, 16)'
        >>> limits.find_reason_to_skip("slow", Case("GRU", Shape(1, 256, 8, 16), 0.1)) is None
        True
    """

    def __init__(
        self,
        call_seconds: float,
        run_minutes: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._call_seconds, self._clock = call_seconds, clock
        self._end = None if run_minutes is None else clock() + 60 * run_minutes
        self._slow: dict[str, list[tuple[Case, float]]] = {}

    @property
    def is_over(self) -> bool:
        """Whether the run has reached its limit."""
        return self._end is not None and self._clock() > self._end

    def record(self, name: str, case: Case, seconds: float) -> None:
        """Store the time of a call if it exceeds the limit."""
        if seconds > self._call_seconds:
            self._slow.setdefault(name, []).append((case, seconds))

    def find_reason_to_skip(self, name: str, case: Case) -> str | None:
        """Return the slow call because of which a contestant skips a case, or None."""
        for slow, seconds in self._slow.get(name, ()):
            sizes = zip(case.shape, slow.shape, strict=True)
            if case.cell == slow.cell and all(size >= least for size, least in sizes):
                return f"took {seconds:.1f} s on {slow.cell} {slow.shape}"
        return None
