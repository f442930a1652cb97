"""The parameters with which a loss runs the recurrent modules of its networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tensordict.nn import TensorDictModuleBase
from torch import nn

from .._compat import has_data
from ..modules.network import RecurrentLayer, RecurrentNetwork


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
                yield layer, find_addresses(layer.module.parameters())
            else:
                found = held.get(path) if path else held
                yield layer, find_addresses(found.values(True, True))


def find_addresses(tensors: Iterable[Any]) -> frozenset[int]:
    """Return the addresses of tensors; without data all have one, as if they were shared."""
    return frozenset(tensor.data_ptr() if has_data(tensor) else 0 for tensor in tensors)
