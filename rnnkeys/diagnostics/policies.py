"""Checks of a policy by itself: its recurrent modules, their keys and their mode."""

from __future__ import annotations

from typing import Any

from tensordict import unravel_key
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn

from ..keys import next_key
from ..mode import recurrent_mode
from ..modules.network import Recurrent, find_networks
from .report import Report


def check_modules(policy: nn.Module, recurrent: list[Recurrent], report: Report) -> None:
    """Check that there is memory, and that every state has a key of its own that is carried."""
    if not recurrent:
        report.add(
            "no-recurrent-module",
            f"there is no recurrent module inside {type(policy).__name__}: it remembers nothing",
            "put an rnnkeys.LSTMModule or GRUModule into the policy's TensorDictSequential",
        )
    for one in recurrent:
        if not one.state_keys or not _is_carried(one):
            report.add(
                "state-not-carried",
                f"{_name(one)} reads {_in_states(one)} and writes {_out_states(one)}: no "
                "environment carries these to the next step, so memory is lost at every step",
                f"name its state out_keys {[next_key(key) for key in _in_states(one)]}",
            )
    _check_keys(policy, recurrent, report)


def _name(recurrent: Recurrent) -> str:
    return str(type(recurrent.module).__name__)


def _in_states(recurrent: Recurrent) -> list[Any]:
    """In keys without the input, and without the marks."""
    keys = [unravel_key(key) for key in recurrent.module.in_keys]
    return [key for key in keys[1:] if key != unravel_key(recurrent.init_key)]


def _out_states(recurrent: Recurrent) -> list[Any]:
    return [unravel_key(key) for key in recurrent.module.out_keys][1:]


def _is_carried(recurrent: Recurrent) -> bool:
    written = set(_out_states(recurrent))
    # Nothing of the states in out_keys: select_out_keys() hid them, which changes nothing.
    return not written or {next_key(key) for key in _in_states(recurrent)} == written


def _check_keys(policy: nn.Module, recurrent: list[Recurrent], report: Report) -> None:
    owners: dict[Any, TensorDictModuleBase] = {}
    for one in recurrent:
        for key in map(next_key, _in_states(one)):
            owner = owners.setdefault(key, one.module)
            if owner is not one.module and _layers(owner) is not _layers(one.module):
                report.add(
                    "shared-key",
                    f"two recurrent modules, {type(owner).__name__} and {_name(one)}, write "
                    f"{key!r}: each overwrites the other's state",
                    "give one of them state keys of its own: in_keys=[..., 'other_h', ...], "
                    "out_keys=[..., ('next', 'other_h'), ...]",
                )
    for other in find_networks(policy):
        if not isinstance(other, TensorDictModuleBase) or _holds_others(other):
            continue
        for key in map(unravel_key, other.out_keys):
            if not hasattr(other, "recurrent_mode") and key in owners:
                report.add(
                    "shared-key",
                    f"{type(other).__name__} writes {key!r}, the state of a "
                    f"{type(owners[key]).__name__}",
                    f"give {type(other).__name__} another out key",
                )


def _layers(module: Any) -> Any:
    return getattr(module, "lstm", None) or getattr(module, "gru", None) or module


def _holds_others(module: nn.Module) -> bool:
    return isinstance(module, TensorDictSequential) or any(
        isinstance(child, TensorDictModuleBase) for child in module.children()
    )


def check_mode(recurrent: list[Recurrent], report: Report) -> None:
    """Check that the policy collects in single steps."""
    if recurrent_mode():
        report.add(
            "mode",
            "set_recurrent_mode(True) is in force here, so a policy that collects would take "
            "environments for time",
            "leave the context before collecting: with set_recurrent_mode(True): ... only around "
            "calls on sequences",
        )
        return
    for one in recurrent:
        module: Any = one.module
        if recurrent_mode() is None and module.recurrent_mode:
            report.add(
                "mode",
                f"{_name(one)} is frozen in recurrent mode (default_recurrent_mode=True), so a "
                "policy that collects would take environments for time",
                "make it with default_recurrent_mode=None; losses enter recurrent mode themselves",
            )
