"""The result of a check: a problem with its remedy and the exception that reports it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType

from tensordict.utils import NestedKey
from torch import Tensor

_LIBRARIES = ("rnnkeys", "tensordict", "torch", "torchrl")


@dataclass(frozen=True)
class Problem:
    """One mistake in a wiring or a batch.

    Functions named ``find_..._problems`` yield problems. A forward raises the first one
    (:func:`raise_first`); ``check_recurrent_policy`` collects all of them.

    Attributes:
        check: stable name of the check, such as ``"init-key"``; ``docs/errors.md`` explains each.
        message: the key or argument, its value, and what was expected.
        remedy: what to change.
        error: exception type to raise, or a warning category.

    Examples:
        >>> print(Problem("mask-dtype", "The mask must be bool. Got float32.", "Use .bool()."))
        The mask must be bool. Got float32. Use .bool(). [mask-dtype]
    """

    check: str
    message: str
    remedy: str
    error: type[Exception] = ValueError

    def __str__(self) -> str:
        return f"{self.message} {self.remedy} [{self.check}]"

    def as_error(self) -> Exception:
        """Return the exception whose text is this problem."""
        return self.error(str(self))


def make_bool_problem(check: str, noun: str, key: NestedKey, value: Tensor) -> Problem:
    """Return the problem of flags that are not bool.

    Args:
        check: name of the check.
        noun: kind of the entry, for the message.
        key: of the entry.
        value: the entry.
    """
    return Problem(
        check,
        f"The {noun} {key!r} must be bool. Got {value.dtype}.",
        f"Convert it: batch.set({key!r}, batch.get({key!r}).bool()).",
        TypeError,
    )


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the program that called: the innermost one outside of the libraries.

    A fixed ``stacklevel`` would name a line of torch, which calls the forward of a module.

    Args:
        message: what is wrong, and the remedy.
        category: of the warning.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and _is_of_library(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_of_library(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES


def raise_first(problems: Iterable[Problem]) -> None:
    """Raise the first problem that is an error, if there is one; warn of those before it.

    Args:
        problems: result of a ``find_..._problems`` function; the ones after the first error are
            never computed.

    Raises:
        Exception: of the type that the problem names.

    Warns:
        UserWarning: if a problem's type is a warning.

    Examples:
        >>> raise_first([])
        >>> raise_first([Problem("no-steps", "The batch is empty.", "Skip it.")])
        Traceback (most recent call last):
        ValueError: The batch is empty. Skip it. [no-steps]
    """
    for problem in problems:
        if not issubclass(problem.error, Warning):
            raise problem.as_error()
        warn_caller(str(problem), problem.error)
