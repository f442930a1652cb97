"""Batches that were cut out of data that has been checked, so that values are read once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from tensordict import TensorDictBase
from tensordict.utils import NestedKey

_Keys = frozenset[NestedKey]
_checked: dict[int, tuple[weakref.ref[TensorDictBase], _Keys]] = {}


def set_checked(batch: TensorDictBase, state_keys: Iterable[NestedKey]) -> None:
    """Record that the steps of a batch follow each other: it was cut out of checked data.

    Args:
        batch: sequences ``[*, T]``. It is not kept alive.
        state_keys: keys of the states that were checked.

    Examples:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({}, [5])
        >>> set_checked(batch, ["h"])
        >>> is_checked(batch, ["h"]), is_checked(batch, ["c"]), is_checked(batch.copy(), ["h"])
        (True, False, False)
    """
    number = id(batch)
    reference = weakref.ref(batch, lambda _: _checked.pop(number, None))
    _checked[number] = (reference, frozenset(state_keys))


def is_checked(batch: TensorDictBase, state_keys: Iterable[NestedKey]) -> bool:
    """Return whether this very object was passed to :func:`set_checked` with these states."""
    found = _checked.get(id(batch))
    return found is not None and found[0]() is batch and found[1].issuperset(state_keys)
