"""Checks of the keys that a recurrent module reads and writes."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import unravel_key
from tensordict.utils import NestedKey

from ..keys import INIT_KEY, as_key, as_tuple

DEFAULT_STATE_KEY = "recurrent_state"


def make_state_keys(state_key: NestedKey, state_names: Sequence[str]) -> list[NestedKey]:
    """Return the keys of the states: ``state_key``, with the name of each if there are several.

    Examples:
        >>> make_state_keys("state", ["h"]), make_state_keys(("agents", "state"), ["h", "c"])
        (['state'], [('agents', 'state_h'), ('agents', 'state_c')])
    """
    *groups, last = as_tuple(as_key("state_key", state_key))
    names = [last] if len(state_names) == 1 else [f"{last}_{name}" for name in state_names]
    return [unravel_key((*groups, name)) for name in names]


def check_state_key(
    state_key: NestedKey | None,
    in_keys: Sequence[NestedKey] | None,
    out_keys: Sequence[NestedKey] | None,
) -> None:
    """Raise ValueError if ``state_key`` is passed and would not be used."""
    if state_key is not None and in_keys is not None and out_keys is not None:
        raise ValueError(
            f"state_key={state_key!r} contradicts in_keys={in_keys} and out_keys={out_keys}, which "
            "name the states. Pass in_key and out_key along with state_key, or leave it out."
        )


def join_keys(
    side: str,
    key: NestedKey | None,
    keys: Sequence[NestedKey] | None,
    defaults: Sequence[NestedKey],
) -> list[NestedKey]:
    """Return the list of keys that was passed, or the one key with the default state keys.

    Args:
        side: ``"in"`` or ``"out"``, for error messages.
        key: the argument ``in_key`` or ``out_key``.
        keys: the argument ``in_keys`` or ``out_keys``.
        defaults: state keys that belong to ``key``.

    Raises:
        ValueError: if both arguments are passed, or none.
        TypeError: if ``keys`` is not a list, or a key is not one.
    """
    if (key is None) == (keys is None):
        raise ValueError(
            f"Either {side}_keys or {side}_key must be specified but not both or none. "
            f"Got {side}_keys={keys} and {side}_key={key}."
        )
    if key is not None:
        return [as_key(f"{side}_key", key), *map(unravel_key, defaults)]
    if not isinstance(keys, (list, tuple)):
        raise TypeError(
            f"incompatible function arguments: {side}_keys must be a list of keys. Got {keys!r}, a "
            f"{type(keys).__name__}; for the default state keys use {side}_key={keys!r}."
        )
    return [as_key(f"{side}_keys", one) for one in keys]


def split_init_key(
    owner: str, keys: list[NestedKey], init_key: NestedKey | None, state_names: Sequence[str]
) -> tuple[list[NestedKey], NestedKey]:
    """Split ``in_keys`` into those of input and states, and the init key, which may stand last.

    Raises:
        ValueError: if the number of keys does not fit, or if a key occurs twice.
    """
    wanted = INIT_KEY if init_key is None else as_key("init_key", init_key)
    if len(keys) == 2 + len(state_names) and keys[-1] == wanted:
        keys = keys[:-1]
    optional = f" (optionally the init key {wanted!r} last; for another name use init_key=)"
    check_keys(owner, "in", keys, state_names, optional)
    _check_distinct(owner, "in_keys", [*keys, wanted])
    return keys, wanted


def check_keys(
    owner: str, side: str, keys: list[NestedKey], state_names: Sequence[str], also: str = ""
) -> None:
    """Raise ValueError unless there is one distinct key for the first entry and for each state.

    Args:
        owner: name of the module's class.
        side: ``"in"``, whose first entry is the input, or ``"out"``, whose first is the output.
        keys: to check.
        state_names: of the cell.
        also: further keys that are allowed, for the message.
    """
    expected = 1 + len(state_names)
    if len(keys) != expected:
        states = f" and the states {', '.join(state_names)}" if state_names else ""
        raise ValueError(
            f"{owner} expects {expected} {side}_keys: the {side}put{states}{also}. Got {keys}."
        )
    _check_distinct(owner, f"{side}_keys", keys)


def _check_distinct(owner: str, side: str, keys: list[NestedKey]) -> None:
    twice = sorted({str(k) for k in keys if keys.count(k) > 1})
    if twice:
        raise ValueError(
            f"{owner}: {side} name {', '.join(twice)} more than once in {keys}; one entry would "
            "overwrite the other. Give every entry a key of its own."
        )


def check_carried(state_keys: Sequence[NestedKey], next_keys: Sequence[NestedKey]) -> None:
    """Raise RuntimeError unless every next state is written at ``("next", <in key>)``."""
    for in_key, out_key in zip(state_keys, next_keys, strict=True):
        if as_tuple(out_key) != ("next", *as_tuple(in_key)):
            raise RuntimeError(
                f"The state read at {in_key!r} is written at {out_key!r}, so that no environment "
                "carries it to the next step. make_tensordict_primer needs out_keys named "
                f"('next', <in_key>): here {('next', *as_tuple(in_key))!r}."
            )
