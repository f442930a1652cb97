"""What a loss runs: the networks inside it, the recurrent modules among them, and their keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tensordict import unravel_key
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.objectives import LossModule
from torchrl.objectives.value import ValueEstimatorBase

from ..keys import next_key
from .lstm_gru import RecurrentModule


class Recurrent(NamedTuple):
    """A recurrent module and the keys it works with."""

    module: TensorDictModuleBase
    init_key: NestedKey
    state_keys: tuple[NestedKey, ...]

    @property
    def writes_states(self) -> bool:
        """Whether it writes the state after every step (TorchRL's modules write zeros)."""
        return isinstance(self.module, RecurrentModule)


def find_networks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield every module inside, once; losses and estimators keep networks outside ``modules()``.

    Examples:
        >>> from torchrl.objectives.value import TD0Estimator
        >>> net = nn.Linear(1, 1)
        >>> net in list(find_networks(TD0Estimator(gamma=0.9, value_network=net)))
        True
    """
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        for one in waiting.pop().modules():
            if id(one) in seen:
                continue
            seen.add(id(one))
            yield one
            if isinstance(one, (LossModule, ValueEstimatorBase)):
                waiting += [v for v in vars(one).values() if isinstance(v, nn.Module)]


def find_recurrent(module: nn.Module) -> list[Recurrent]:
    """Return the recurrent modules inside, of this package and of TorchRL.

    Examples:
        >>> from rnnkeys import GRUModule
        >>> [found] = find_recurrent(nn.Sequential(GRUModule(3, 5, in_key="o", out_key="e")))
        >>> found.init_key, found.state_keys
        ('is_init', ('recurrent_state',))
    """
    return [
        Recurrent(one, getattr(one, "init_key", "is_init"), _state_keys(one))
        for one in find_networks(module)
        if isinstance(one, TensorDictModuleBase) and hasattr(one, "recurrent_mode")
    ]


def _state_keys(module: TensorDictModuleBase) -> tuple[NestedKey, ...]:
    """Keys that are read and whose ``("next", key)`` is written."""
    if isinstance(module, RecurrentModule):
        return module.state_keys
    written = set(map(unravel_key, module.out_keys))
    return tuple(key for key in map(unravel_key, module.in_keys) if next_key(key) in written)


def find_outputs(module: nn.Module) -> set[Any]:
    """Return every key that a network inside writes."""
    return {
        unravel_key(key)
        for one in find_networks(module)
        if isinstance(one, TensorDictModuleBase)
        and not isinstance(one, (LossModule, ValueEstimatorBase))
        for key in one.out_keys
    }
