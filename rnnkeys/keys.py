"""Keys of entries that several parts of the package read: defined once."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey

INIT_KEY = "is_init"
MASK_KEY = ("collector", "mask")
TRAJECTORY_KEY = ("collector", "traj_ids")
MULTI_STEP_KEY = "steps_to_next_obs"


def as_tuple(key: NestedKey) -> tuple[str, ...]:
    """Return a key as a tuple of strings.

    Examples:
        >>> as_tuple("is_init")
        ('is_init',)
    """
    key = unravel_key(key)
    return (key,) if isinstance(key, str) else tuple(str(part) for part in key)


def next_key(key: NestedKey) -> tuple[str, ...]:
    """Return where the ``next`` tensordict holds ``key``.

    Examples:
        >>> next_key(("agents", "is_init"))
        ('next', 'agents', 'is_init')
    """
    return ("next", *as_tuple(key))


def join_key(key: NestedKey) -> str:
    """Return the name of an entry as one string, parts of nested keys joined by dots.

    Examples:
        >>> join_key(("agents", "observation"))
        'agents.observation'
    """
    return ".".join(as_tuple(key))


def as_key(argument: str, key: Any) -> Any:
    """Return a key, unravelled.

    Args:
        argument: name of the argument, for the message.
        key: a string, or a tuple of strings for a nested key.

    Raises:
        TypeError: if it is anything else.

    Examples:
        >>> as_key("init_key", ("agents", ("is_init",)))
        ('agents', 'is_init')
    """
    if not _is_key(key):
        raise TypeError(
            f"{argument} must be a key: a string, or a tuple of strings. Got {key!r}. [argument]"
        )
    return unravel_key(key)


def _is_key(key: Any) -> bool:
    return isinstance(key, str) or (isinstance(key, tuple) and bool(key) and all(map(_is_key, key)))


def as_keys(key: NestedKey | list[NestedKey]) -> list[NestedKey]:
    """Return a list of unravelled keys: a tuple is one nested key, a list is several keys.

    Raises:
        ValueError: if the list is empty.
        TypeError: if an element is not a key.

    Examples:
        >>> as_keys(["is_init", ("agents", "is_init")])
        ['is_init', ('agents', 'is_init')]
    """
    keys = key if isinstance(key, list) else [key]
    if not keys:
        raise ValueError(
            "init_key=[] names no key: pass a key such as 'is_init', or a list of keys."
        )
    return [as_key("init_key", one) for one in keys]


def entry_names(tensordict: TensorDictBase) -> list[str]:
    """Return the names of the root entries, sorted, for error messages."""
    return sorted(map(str, tensordict.keys()))
