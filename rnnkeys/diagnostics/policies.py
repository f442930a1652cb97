"""Checks of a policy by itself: its recurrent modules, their keys and their mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensordict import unravel_key
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn

from ..checks import Problem, find_shared_key_problems, read_state_keys
from ..keys import next_key
from ..mode import recurrent_mode
from ..modules.network import RecurrentLayer, find_networks
from ..objectives.loss_parameters import find_addresses


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
            reads = read_state_keys(layer)
            yield Problem(
                "state-not-carried",
                f"{layer.name} reads {reads} and writes {_written_states(layer)}: no environment "
                "carries these to the next step, so the state is lost at every step.",
                f"Name its state out_keys {[next_key(key) for key in reads]}.",
            )
    parameters = [(layer, find_addresses(layer.module.parameters())) for layer in layers]
    yield from find_shared_key_problems(type(policy).__name__, parameters)
    yield from _find_overwritten_states(policy, layers)


def _written_states(layer: RecurrentLayer) -> list[Any]:
    return [unravel_key(key) for key in layer.module.out_keys][1:]


def _is_carried(layer: RecurrentLayer) -> bool:
    written = set(_written_states(layer))
    # select_out_keys() hides states from out_keys, but they are written.
    return not written or {next_key(key) for key in read_state_keys(layer)} == written


def _find_overwritten_states(policy: nn.Module, layers: list[RecurrentLayer]) -> Iterator[Problem]:
    owners: dict[Any, RecurrentLayer] = {
        next_key(key): layer for layer in layers for key in read_state_keys(layer)
    }
    for other in find_networks(policy):
        if not isinstance(other, TensorDictModuleBase) or _holds_others(other):
            continue
        for key in map(unravel_key, other.out_keys):
            if not hasattr(other, "recurrent_mode") and key in owners:
                yield Problem(
                    "shared-key",
                    f"{type(other).__name__} writes {key!r}, the state of a {owners[key].name}.",
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
                f"{layer.name} is in recurrent mode by default (default_recurrent_mode=True), so "
                "a policy that collects would take the environments of a batch for time steps.",
                "Make it with default_recurrent_mode=None; losses enter recurrent mode themselves.",
            )
