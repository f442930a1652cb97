"""Keeps a run in bounds: who is slow on a case takes no part in larger ones, and time is up."""

from __future__ import annotations

import time
from collections.abc import Callable

from .cases import Case


class Patience:
    """What a run waits for.

    Args:
        seconds: that a call may take; slower ones are measured, but not on larger cases.
        minutes: that a run may take, or None.
        clock: returns seconds.

    Examples:
        >>> from benchmarks.cases import Shape
        >>> patience = Patience(seconds=2.0)
        >>> patience.note("snail", Case("GRU", Shape(4, 64, 8, 16), 0.0), 3.5)
        >>> patience.refuses("snail", Case("GRU", Shape(4, 256, 8, 16), 0.1))
        'took 3.5 s on GRU (4, 64, 8, 16)'
        >>> patience.refuses("snail", Case("GRU", Shape(1, 256, 8, 16), 0.1)) is None
        True
    """

    def __init__(
        self,
        seconds: float,
        minutes: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds, self._clock = seconds, clock
        self._end = None if minutes is None else clock() + 60 * minutes
        self._slow: dict[str, list[tuple[Case, float]]] = {}

    @property
    def is_over(self) -> bool:
        """Whether the run's time is up."""
        return self._end is not None and self._clock() > self._end

    def note(self, name: str, case: Case, seconds: float) -> None:
        """Remember how long a call took."""
        if seconds > self._seconds:
            self._slow.setdefault(name, []).append((case, seconds))

    def refuses(self, name: str, case: Case) -> str | None:
        """Return why a contestant takes no part in a case, or None."""
        for slow, seconds in self._slow.get(name, ()):
            sizes = zip(case.shape, slow.shape, strict=True)
            if case.cell == slow.cell and all(size >= least for size, least in sizes):
                return f"took {seconds:.1f} s on {slow.cell} {slow.shape}"
        return None
