"""Checks of arguments; numbers may be Python's or NumPy's."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def as_int(name: str, value: Any, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
    """Return an integer argument as an int.

    Args:
        name: of the argument, for the message.
        value: a Python or NumPy integer, not a bool.
        minimum: least value.
        maximum: greatest value. Without one, a number that is huge by mistake would seem to hang.

    Raises:
        ValueError: if it is not an integer, or out of range.

    Examples:
        >>> import numpy
        >>> as_int("burn_in", numpy.int64(4), minimum=0)
        4
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < minimum:
        raise ValueError(
            f"{name} must be an int of at least {minimum}. Got {name}={value!r}. [argument]"
        )
    if int(value) > maximum:
        raise ValueError(f"{name} must be at most {maximum}. Got {name}={value!r}. [argument]")
    return int(value)


def as_float(name: str, value: Any, maximum: float = 1.0) -> float:
    """Return a real argument, 0 or more, as a float.

    Args:
        name: of the argument, for the message.
        value: a Python or NumPy number, not a bool.
        maximum: greatest value.

    Raises:
        ValueError: if it is not a number, or out of range.

    Examples:
        >>> import numpy
        >>> as_float("gamma", numpy.float64(0.99))
        0.99
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 <= float(value) <= maximum:
        raise ValueError(
            f"{name} must be a number from 0.0 to {maximum}. Got {name}={value!r}. [argument]"
        )
    return float(value)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ValueError unless an argument is one of a few.

    Args:
        name: of the argument.
        value: its value.
        choices: the accepted values.
    """
    choices = tuple(choices)
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {listed}. Got {value!r}. [argument]")
