"""Checks of a policy by itself: its recurrent modules, their keys and their mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tensordict import unravel_key
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn

from ..checks import Problem
from ..keys import next_key
from ..mode import recurrent_mode
from ..modules.network import RecurrentLayer, RecurrentNetwork, find_networks

_OWN_KEYS = (
    "Give one of them state keys of its own: in_keys=[..., 'other_h', ...], out_keys=[..., "
    "('next', 'other_h'), ...]."
)


def find_module_problems(policy: nn.Module, layers: list[RecurrentLayer]) -> Iterator[Problem]:
    """Yield problems of a policy's recurrent modules: none there, states lost, shared keys."""
    if not layers:
        yield Problem(
            "no-recurrent-module",
            f"There is no recurrent module inside {type(policy).__name__}: it keeps no state.",
            "Put an rnnkeys.LSTMModule or GRUModule into the policy's TensorDictSequential.",
        )
    for layer in layers:
        if not _is_carried(layer):
            reads = _read_states(layer)
            yield Problem(
                "state-not-carried",
                f"{_name(layer)} reads {reads} and writes {_written_states(layer)}: no environment "
                "carries these to the next step, so the state is lost at every step.",
                f"Name its state out_keys {[next_key(key) for key in reads]}.",
            )
    parameters = [(layer, _pointers(layer.module.parameters())) for layer in layers]
    yield from find_shared_key_problems(type(policy).__name__, parameters)
    yield from _find_overwritten_states(policy, layers)


def _name(layer: RecurrentLayer) -> str:
    return str(type(layer.module).__name__)


def _read_states(layer: RecurrentLayer) -> list[Any]:
    """Return the in keys without the input and the flags."""
    keys = [unravel_key(key) for key in layer.module.in_keys]
    return [key for key in keys[1:] if key != unravel_key(layer.init_key)]


def _written_states(layer: RecurrentLayer) -> list[Any]:
    return [unravel_key(key) for key in layer.module.out_keys][1:]


def _is_carried(layer: RecurrentLayer) -> bool:
    written = set(_written_states(layer))
    # select_out_keys() hides states from out_keys, but they are written.
    return not written or {next_key(key) for key in _read_states(layer)} == written


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
        for key in _read_states(layer):
            other, others = owners.setdefault(key, (layer, parameters))
            if others.isdisjoint(parameters) and other is not layer:
                yield Problem(
                    "shared-key",
                    f"{_name(other)} and {_name(layer)} in {owner} have parameters of their own "
                    f"and keep their states under one key, {key!r}: each overwrites the other's "
                    "state, or starts from it, and a state of one means nothing to the other.",
                    _OWN_KEYS,
                )
                break


def find_parameters(loss: nn.Module) -> Iterator[tuple[RecurrentLayer, frozenset[int]]]:
    """Yield the recurrent modules of a loss's networks with the addresses of their parameters.

    Losses hold parameters outside their networks, one copy for each critic of an ensemble.
    """
    for name, network in vars(loss).items():
        if not isinstance(network, TensorDictModuleBase):
            continue
        held: Any = getattr(loss, f"{name}_params", None)
        paths = {id(one): path for path, one in network.named_modules()}
        for layer in RecurrentNetwork(network).layers:
            path = tuple(filter(None, paths.get(id(layer.module), "").split(".")))
            if held is None:
                yield layer, _pointers(layer.module.parameters())
            else:
                found = held.get(path) if path else held
                yield layer, _pointers(found.values(True, True))


def _pointers(tensors: Iterable[Any]) -> frozenset[int]:
    return frozenset(tensor.data_ptr() for tensor in tensors)


def _find_overwritten_states(policy: nn.Module, layers: list[RecurrentLayer]) -> Iterator[Problem]:
    owners: dict[Any, RecurrentLayer] = {
        next_key(key): layer for layer in layers for key in _read_states(layer)
    }
    for other in find_networks(policy):
        if not isinstance(other, TensorDictModuleBase) or _holds_others(other):
            continue
        for key in map(unravel_key, other.out_keys):
            if not hasattr(other, "recurrent_mode") and key in owners:
                yield Problem(
                    "shared-key",
                    f"{type(other).__name__} writes {key!r}, the state of a {_name(owners[key])}.",
                    f"Give {type(other).__name__} another out key.",
                )


def _holds_others(module: nn.Module) -> bool:
    return isinstance(module, TensorDictSequential) or any(
        isinstance(child, TensorDictModuleBase) for child in module.children()
    )


def find_mode_problems(layers: list[RecurrentLayer]) -> Iterator[Problem]:
    """Yield a problem if the policy would not collect in single steps."""
    mode = recurrent_mode()
    if mode:
        yield Problem(
            "mode",
            "set_recurrent_mode(True) is in force, so a policy that collects would take the "
            "environments of a batch for time steps.",
            "Leave the context before collecting: with set_recurrent_mode(True): ... only around "
            "calls on sequences.",
        )
        return
    for layer in layers:
        module: Any = layer.module
        if mode is None and module.recurrent_mode:
            yield Problem(
                "mode",
                f"{_name(layer)} is in recurrent mode by default (default_recurrent_mode=True), so "
                "a policy that collects would take the environments of a batch for time steps.",
                "Make it with default_recurrent_mode=None; losses enter recurrent mode themselves.",
            )
