"""Constructors and functions take an argument, or raise an error that names it."""

from __future__ import annotations

import pytest

from tests.support.bad_batches import run
from tests.support.fuzzed_arguments import ARGUMENTS, Argument, try_wrong_argument

NAMES = [f"{i} {name}" for i, (_, name, _, _) in enumerate(ARGUMENTS)]


@pytest.mark.parametrize("argument", ARGUMENTS, ids=NAMES)
def test_argument_that_fits_is_taken(argument: Argument) -> None:
    function, name, right, _ = argument
    for value in right:
        error, _ = run(lambda one: function(**{name: one}), value)
        assert error is None, (value, error)


@pytest.mark.parametrize("argument", ARGUMENTS, ids=NAMES)
def test_argument_that_does_not_fit_raises_by_name(argument: Argument) -> None:
    for value in argument[3]:
        assert try_wrong_argument(argument, value).fault is None
