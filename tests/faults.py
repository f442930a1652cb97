"""Faults that the tests have to catch; ``python -m scripts.check_faults`` plants them one by one.

A fault is a mistake that somebody could make. When the source that it changes moves, rewrite it: a
fault that is dropped is a test that nobody has seen fail. Its tests are few and fast, so that the
whole list runs in a minute or two.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One mistake, and the tests that see it.

    Attributes:
        name: the mistake in words.
        file: path of the changed file, from the root of the project.
        before: source that is there exactly once.
        after: what replaces it; must still be valid Python.
        tests: arguments of pytest that select the tests which have to fail.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


FAULTS: tuple[Fault, ...] = ()
