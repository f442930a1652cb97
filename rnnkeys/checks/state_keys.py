"""Checks of the keys that recurrent modules keep their states under."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tensordict import unravel_key
from tensordict.utils import NestedKey

from .problem import Problem


class RecurrentLayer(NamedTuple):
    """A recurrent module inside a network, and the keys that it works with.

    Attributes:
        module: the module.
        init_key: key of its ``is_init`` flags.
        state_keys: keys of its recurrent states.
        writes_states: whether recurrent mode writes the state after every step; TorchRL's writes
            zeros.
    """

    module: Any
    init_key: NestedKey
    state_keys: tuple[NestedKey, ...]
    writes_states: bool

    @property
    def name(self) -> str:
        """Name of the module's class."""
        return type(self.module).__name__


def read_state_keys(layer: RecurrentLayer) -> list[NestedKey]:
    """Return the keys that a recurrent module reads, without the input and the flags.

    They are those of its states, also where none of its out keys is ``("next", key)``.
    """
    keys = [unravel_key(key) for key in layer.module.in_keys]
    return [key for key in keys[1:] if key != unravel_key(layer.init_key)]


def find_shared_key_problems(
    owner: str, layers: Iterable[tuple[RecurrentLayer, frozenset[int]]]
) -> Iterator[Problem]:
    """Yield a problem if modules with parameters of their own share the keys of their states.

    Args:
        owner: name of the policy or loss that contains them.
        layers: each with the addresses of its parameters.
    """
    owners: dict[Any, tuple[RecurrentLayer, frozenset[int]]] = {}
    for layer, parameters in layers:
        for key in read_state_keys(layer):
            other, others = owners.setdefault(key, (layer, parameters))
            if others.isdisjoint(parameters) and other is not layer:
                yield Problem(
                    "shared-key",
                    f"{other.name} and {layer.name} in {owner} have parameters of their own "
                    f"and keep their states under one key, {key!r}: each overwrites the other's "
                    "state, or starts from it, and a state of one means nothing to the other.",
                    "Give one of them state keys of its own: in_keys=[..., 'other_h', ...], "
                    "out_keys=[..., ('next', 'other_h'), ...].",
                )
                break
