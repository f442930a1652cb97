"""Readers of layers: their sizes and current parameters, whatever class holds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..cells import GRU_CELL, LSTM_CELL, Cell, Weights

_CELLS = {"LSTM": LSTM_CELL, "GRU": GRU_CELL}
_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


class Layers(ABC):
    """The interface through which a recurrent module reads its layers; abstract.

    Args:
        module: holds the parameters.
        cell: the equations.
        input_size: ``I``.
        state_sizes: size of the last dimension of each state.
        num_layers: ``L``.
    """

    def __init__(
        self,
        module: nn.Module,
        cell: Cell,
        input_size: int,
        state_sizes: tuple[int, ...],
        num_layers: int,
    ) -> None:
        self.module = module
        self.cell = cell
        self.input_size = input_size
        self.state_sizes = state_sizes
        self.num_layers = num_layers

    @property
    def dropout(self) -> float:
        """Probability of dropout between layers now: 0 where ``module`` is in eval mode."""
        module: Any = self.module
        return module.dropout if module.training else 0.0

    @property
    @abstractmethod
    def sample(self) -> Tensor:
        """A floating-point tensor with the dtype and the device of the parameters."""

    @abstractmethod
    def weights(self, layer: int, dtype: torch.dtype | None = None) -> Any:
        """Return the weights of one layer for its cell, cast to ``dtype`` if it is given."""

    @property
    def has_ignored_hooks(self) -> bool:
        """Whether ``module`` has hooks that do not run, since it is never called."""
        attributes = self.module.__dict__
        if any(attributes[name] for name in _HOOKS):
            return True
        before = attributes["_forward_pre_hooks"].values()
        return any(not isinstance(_name_of_weight(hook), str) for hook in before)


class TorchLayers(Layers):
    """Reads an ``nn.LSTM``, an ``nn.GRU`` or a pure-PyTorch one.

    Compiled code cannot use an ``nn.LSTM``, but it can read the dictionary that holds its
    attributes. Functional calls put tensors there in place of parameters, so both are looked up.

    Args:
        rnn: the module that owns the parameters.
    """

    def __init__(self, rnn: nn.RNNBase) -> None:
        cell = _CELLS[rnn.mode]
        others = (rnn.hidden_size,) * (len(cell.state_names) - 1)
        sizes = (rnn.proj_size or rnn.hidden_size, *others)
        super().__init__(rnn, cell, rnn.input_size, sizes, rnn.num_layers)
        self._attributes = rnn.__dict__
        self._has_field = (True, True, rnn.bias, rnn.bias, bool(rnn.proj_size))

    @property
    def dropout(self) -> float:
        """Probability of dropout between layers now, which a schedule may change."""
        return self._attributes["dropout"] if self._attributes["training"] else 0.0

    def parameter(self, name: str) -> Tensor:
        """Return a parameter, or the tensor in its place.

        A functional call, ``torch.nn.utils.parametrize``, ``weight_norm`` and ``prune`` put other
        tensors in the place of parameters.
        """
        attributes = self._attributes
        if name in attributes:
            if attributes["_forward_pre_hooks"]:
                self._recompute(name)
            return attributes[name]
        for tensors in ("_parameters", "_buffers"):
            if name in attributes[tensors]:
                return attributes[tensors][name]
        if is_compiling():
            return attributes["_modules"]["parametrizations"][name]()
        # The property obeys torch.nn.utils.parametrize.cached().
        return getattr(self.module, name)

    def _recompute(self, name: str) -> None:
        """Call the hook that computes a weight.

        Those of ``weight_norm``, ``spectral_norm`` and ``prune`` wait for a forward of the
        ``nn.RNNBase``, which is not called here.
        """
        for hook in self._attributes["_forward_pre_hooks"].values():
            if name == _name_of_weight(hook):
                hook(self.module, ())

    @property
    def sample(self) -> Tensor:
        """A parameter, or the tensor in its place; parametrizations and hooks are not called."""
        attributes = self._attributes
        for tensors in (attributes, attributes["_parameters"], attributes["_buffers"]):
            if "weight_hh_l0" in tensors:
                return tensors["weight_hh_l0"]
        return self.parameter("weight_hh_l0") if is_compiling() else next(self.module.parameters())

    def weights(self, layer: int, dtype: torch.dtype | None = None) -> Any:
        """Return the parameters of one layer, cast to ``dtype`` if it is given."""
        fields: list[Any] = [
            self.parameter(f"{name}_l{layer}") if there else None
            for name, there in zip(_NAMES, self._has_field, strict=True)
        ]
        if dtype is not None:
            fields = [None if p is None else p.to(dtype) for p in fields]
        return Weights(*fields)


def _name_of_weight(hook: Any) -> str | None:
    """Return the parameter that a hook computes, as those of ``weight_norm`` and ``prune`` do."""
    return getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
