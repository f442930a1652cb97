"""Seeded faults: mistakes that replace a function of the package in the running process.

No source file changes, so a rewritten line leaves a fault as it is; a fault whose function is
renamed or gone cannot be planted. ``tests.support.faults`` is the table, ``scripts.check_faults``
plants each fault and runs its tests.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple


class Fault(NamedTuple):
    """One mistake, and the tests that must notice it.

    Attributes:
        name: name of the function that makes the mistake.
        mistake: the mistake in a sentence.
        target: the function that is replaced, ``"package.module:Qualified.name"``.
        make: the replacement; it takes the original function, then the original's arguments.
        tests: node ids of tests; at least one of them must fail.
    """

    name: str
    mistake: str
    target: str
    make: Callable[..., Any]
    tests: tuple[str, ...]


class Planted:
    """A fault in place.

    Attributes:
        calls: number of calls of the replacement.
    """

    def __init__(self) -> None:
        self.calls = 0


def seen_by(*tests: str, target: str) -> Callable[[Callable[..., Any]], Fault]:
    """Make a fault of the decorated function, whose first argument is the original function.

    Args:
        *tests: node ids of tests; at least one of them must fail.
        target: the function that is replaced, ``"package.module:Qualified.name"``.

    Examples:
        >>> @seen_by("tests/test_roots.py", target="math:sqrt")
        ... def root_is_forgotten(original, x):
        ...     "The root is the number itself."
        ...     return x
        >>> root_is_forgotten.name, root_is_forgotten.mistake
        ('root_is_forgotten', 'The root is the number itself.')
    """

    def decorate(make: Callable[..., Any]) -> Fault:
        return Fault(make.__name__, inspect.getdoc(make) or "", target, make, tests)

    return decorate


def plant(fault: Fault) -> Planted:
    """Replace the fault's target wherever a module of its package has imported it.

    Returns:
        A counter of the replacement's calls.

    Raises:
        LookupError: if the target does not exist.
        TypeError: if the target is not a function.

    Examples:
        >>> import textwrap
        >>> original = textwrap.shorten
        >>> double = Fault("double", "", "textwrap:shorten", lambda original, text: 2 * text, ())
        >>> plant(double).calls, textwrap.shorten("a")
        (0, 'aa')
        >>> textwrap.shorten = original
    """
    owner, name = find_target(fault.target)
    held = inspect.getattr_static(owner, name)
    is_bound = isinstance(held, (staticmethod, classmethod))
    original = held.__func__ if is_bound else held
    if not callable(original) or isinstance(original, type):
        raise TypeError(
            f"{fault.target} is a {type(held).__name__}; expected a function or method."
        )
    planted = Planted()

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        planted.calls += 1
        return fault.make(original, *args, **kwargs)

    replaced = type(held)(replacement) if is_bound else replacement
    setattr(owner, name, replaced)
    package = fault.target.partition(":")[0].partition(".")[0]
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] == package:
            _replace_values(vars(module), held, replaced)
    return planted


def find_target(target: str) -> tuple[Any, str]:
    """Return the module or class that holds a target, and the target's name in it.

    Raises:
        LookupError: if the target does not exist.
    """
    path, _, qualified = target.partition(":")
    *outer, name = qualified.split(".")
    try:
        owner: Any = importlib.import_module(path)
        for part in outer:
            owner = getattr(owner, part)
        inspect.getattr_static(owner, name)
    except (ImportError, AttributeError) as error:
        raise LookupError(f"the target {target} does not exist: {error}") from error
    return owner, name


def load_faults(table: str) -> dict[str, Fault]:
    """Return the faults that a module defines, by name."""
    values = vars(importlib.import_module(table)).values()
    return {value.name: value for value in values if isinstance(value, Fault)}


def _replace_values(namespace: dict[str, Any], old: Any, new: Any) -> None:
    for name in [name for name, value in namespace.items() if value is old]:
        namespace[name] = new
