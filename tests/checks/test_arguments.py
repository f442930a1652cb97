"""Checks of arguments."""

from __future__ import annotations

import pytest

from rnnkeys.checks import as_int


def test_as_int_accepts_both_limits_and_nothing_beyond() -> None:
    assert [as_int("n", value, 2, 5) for value in (2, 5)] == [2, 5]
    with pytest.raises(ValueError, match="n must be an int of at least 2. Got n=1"):
        as_int("n", 1, 2, 5)
    with pytest.raises(ValueError, match="n must be at most 5. Got n=6"):
        as_int("n", 6, 2, 5)
