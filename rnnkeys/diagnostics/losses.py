"""Checks of a loss or a value estimator: its ``next`` tensordict, and the states it starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensordict import TensorDictBase
from torch import nn
from torchrl.objectives import LossModule
from torchrl.objectives.value import ValueEstimatorBase

from ..checks import Problem, find_shared_key_problems
from ..checks.losses import (
    ON_POLICY,
    POLICY_GRADIENT,
    find_batch_problems,
    find_loss_problems,
    read_loss_name,
)
from ..keys import MULTI_STEP_KEY, next_key
from ..mode import recurrent_mode
from ..modules.network import RecurrentLayer, RecurrentNetwork
from ..objectives.loss_inputs import find_dropped_keys
from ..objectives.loss_parameters import find_parameters
from ..objectives.wiring import Wired
from .batches import is_next_flagged

WIRE = "loss = rnnkeys.objectives.recurrent_loss(loss)"
# Networks that act, or that value every action, and so collect; others are critics.
_ACTING = ("actor_network", "value_network", "local_value_network", "policy")


def find_collecting_layers(loss: nn.Module) -> list[RecurrentLayer]:
    """Return the recurrent modules of a loss whose states the data must hold.

    A loss on collected data needs those of all its networks. The critics of other losses (SAC, TD3,
    DDPG, ...) need not run while collecting: without stored states they start from zeros, and the
    first steps of a sequence only warm them up.
    """
    if isinstance(loss, ON_POLICY):
        return list(RecurrentNetwork(loss).layers)
    networks = [getattr(loss, name, None) for name in _ACTING]
    acting = next((one for one in networks if isinstance(one, nn.Module)), None)
    return [] if acting is None else list(RecurrentNetwork(acting).layers)


def find_wiring_problems(
    loss: nn.Module, layers: list[RecurrentLayer], batch: TensorDictBase | None
) -> Iterator[Problem]:
    """Yield problems of a loss, and of the batch that it gets.

    Args:
        loss: a loss or value estimator, wired or not.
        layers: the recurrent modules inside.
        batch: of the loss; None if there is none, or if sequences cannot be run on it.
    """
    is_ours = type(loss).__module__.startswith("rnnkeys.")
    if is_ours and not isinstance(loss, Wired):
        # The losses of this package find segment starts and states themselves.
        return
    problems = list(find_loss_problems(loss, layers))
    yield from problems
    if problems:
        return
    yield from find_shared_key_problems(read_loss_name(loss), find_parameters(loss))
    if batch is not None and batch.get(MULTI_STEP_KEY, None) is None:
        yield from find_batch_problems(loss, batch, layers)
    if not is_ours:
        yield from _find_unwired_problems(loss, layers, batch)


def _find_unwired_problems(
    loss: nn.Module, layers: list[RecurrentLayer], batch: TensorDictBase | None
) -> Iterator[Problem]:
    name = type(loss).__name__
    if isinstance(loss, ValueEstimatorBase):
        modules: list[Any] = [layer.module for layer in layers]
        if recurrent_mode() is None and not all(module.recurrent_mode for module in modules):
            yield Problem(
                "mode",
                f"{name} does not enter recurrent mode by itself: it would run every step of a "
                "batch alone, from its stored state.",
                WIRE + ", or call it inside set_recurrent_mode(True)",
            )
        return
    if not isinstance(loss, LossModule):
        return
    states = {key for layer in layers for key in layer.state_keys}
    dropped = [key for key in find_dropped_keys(loss) if key in states]
    if batch is not None:
        dropped = [key for key in dropped if batch.get(key, None) is not None]
    if dropped:
        yield Problem(
            "critic-state",
            f"{name} selects what its first network reads from the next tensordict, and so drops "
            f"the states {dropped} of the others: their next values start from zeros.",
            WIRE,
        )
    # Of policy gradients only the value estimator runs the next tensordict, and flags starts there.
    if not isinstance(loss, POLICY_GRADIENT):
        yield from _find_next_flag_problems(name, layers, batch)


def _find_next_flag_problems(
    name: str, layers: list[RecurrentLayer], batch: TensorDictBase | None
) -> Iterator[Problem]:
    for key in dict.fromkeys(layer.init_key for layer in layers):
        if batch is None or batch.get(key, None) is None:
            flagged, seen = False, " (if nothing else flags them: pass a batch to see)"
        else:
            flagged, seen = is_next_flagged(batch, key), ""
        if not flagged:
            yield Problem(
                "next-is-init",
                f"Segment starts are not flagged at {next_key(key)!r}{seen}, so {name} runs its "
                "next tensordict from one slice or episode into the following one, and bootstraps "
                "from wrong values.",
                WIRE,
            )
