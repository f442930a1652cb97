"""Reads sizes and parameters of an ``nn.RNNBase``, also where compiled code may not look at it."""

from __future__ import annotations

from torch import Tensor, nn

from .cells import Weights


class Layers:
    """Sizes of an ``nn.LSTM``, ``nn.GRU`` or twin, and its parameters as they are now.

    Compiled code may not touch an ``nn.LSTM``, but it may read the dictionary that holds its
    attributes. Functional calls put tensors there in place of parameters, so both are looked up.

    Args:
        rnn: the module that owns the parameters.
    """

    def __init__(self, rnn: nn.RNNBase) -> None:
        self.input_size: int = rnn.input_size
        self.hidden_size: int = rnn.hidden_size
        self.num_layers: int = rnn.num_layers
        self.proj_size: int = rnn.proj_size
        self.bias: bool = rnn.bias
        self.dropout = float(rnn.dropout)
        self._attributes = rnn.__dict__

    def parameter(self, name: str) -> Tensor:
        """Return a parameter, or the tensor that stands for it in a functional call."""
        attributes = self._attributes
        if name in attributes:
            return attributes[name]
        parameters = attributes["_parameters"]
        return parameters[name] if name in parameters else attributes["_buffers"][name]

    def weights(self, layer: int) -> Weights:
        """Return the parameters of one layer."""
        get = self.parameter
        return Weights(
            get(f"weight_ih_l{layer}"),
            get(f"weight_hh_l{layer}"),
            get(f"bias_ih_l{layer}") if self.bias else None,
            get(f"bias_hh_l{layer}") if self.bias else None,
            get(f"weight_hr_l{layer}") if self.proj_size else None,
        )
