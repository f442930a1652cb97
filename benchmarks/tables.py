"""Markdown tables of measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a table needs neither torch nor NumPy
    from .cases import Case
    from .timing import Timing


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Examples:
        >>> print(table(("B", "ms"), [("1", "2.5")]))
        | B | ms |
        | --- | --- |
        | 1 | 2.5 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def digits(value: float) -> str:
    """Return a positive number with three significant digits, or without fraction from 100 on.

    Examples:
        >>> digits(0.01234), digits(12.34), digits(1234.5)
        ('0.0123', '12.3', '1234')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def milliseconds(timing: Timing | None) -> str:
    """Return the median in ms and half the interquartile range; an empty text for None.

    Examples:
        >>> from benchmarks.timing import Timing
        >>> milliseconds(Timing(0.010, 0.009, 0.011, 5))
        '10 ±10%'
    """
    if timing is None:
        return ""
    return f"{digits(1e3 * timing.median)} ±{timing.spread / 2:.0%}"


def case_columns(case: Case) -> tuple[str, str]:
    """Return the shape of a case and its resets.

    Examples:
        >>> from benchmarks.cases import Case, Shape
        >>> case_columns(Case("GRU", Shape(1, 2, 3, 4), 0.0))
        ('(1, 2, 3, 4)', '0')
    """
    resets = case.resets if isinstance(case.resets, str) else f"{case.resets:g}"
    return str(case.shape), resets
