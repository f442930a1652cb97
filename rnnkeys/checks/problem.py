"""The result of a check: a problem with its remedy and the exception that reports it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from tensordict.utils import NestedKey
from torch import Tensor


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
        noun: what the entry is, for the message.
        key: of the entry.
        value: the entry.
    """
    return Problem(
        check,
        f"The {noun} {key!r} must be bool. Got {value.dtype}.",
        f"Convert it: batch.set({key!r}, batch.get({key!r}).bool()).",
        TypeError,
    )


def raise_first(problems: Iterable[Problem], stacklevel: int = 2) -> None:
    """Raise the first problem that is an error, if there is one; warn of those before it.

    Args:
        problems: what a ``find_..._problems`` function yields; the ones after the first error are
            never computed.
        stacklevel: of the warnings, as for ``warnings.warn``.

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
        warnings.warn(str(problem), problem.error, stacklevel=stacklevel + 1)
