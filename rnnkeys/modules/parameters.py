"""Reads sizes and parameters of an ``nn.RNNBase``, also where compiled code may not look at it."""

from __future__ import annotations

from torch import Tensor, nn

from ..cells import Weights


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
        self._num_states = 2 if rnn.mode == "LSTM" else 1
        self.module = rnn
        self._attributes = rnn.__dict__

    @property
    def dropout(self) -> float:
        """Probability of dropout between layers now: 0 where the ``nn.RNNBase`` is in eval mode.

        A schedule may change it there.
        """
        return self._attributes["dropout"] if self._attributes["training"] else 0.0

    def parameter(self, name: str) -> Tensor:
        """Return a parameter, or the tensor that stands for it.

        That is: in a functional call, or after ``torch.nn.utils.parametrize``, ``weight_norm`` or
        ``prune``.
        """
        attributes = self._attributes
        if name in attributes:
            if attributes["_forward_pre_hooks"]:
                self._recompute(name)
            return attributes[name]
        for tensors in ("_parameters", "_buffers"):
            if name in attributes[tensors]:
                return attributes[tensors][name]
        return attributes["_modules"]["parametrizations"][name]()

    def _recompute(self, name: str) -> None:
        """Call the hook that computes a weight.

        Those of ``weight_norm``, ``spectral_norm`` and ``prune`` wait for a forward of the
        ``nn.RNNBase``, which is not called here.
        """
        for hook in self._attributes["_forward_pre_hooks"].values():
            if name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
                hook(self.module, ())

    @property
    def sample(self) -> Tensor:
        """A parameter, which tells dtype and device of all."""
        return self.parameter("weight_hh_l0")

    def enter(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Turn stored states into those that backends carry: the same."""
        return states

    def leave(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Turn states that backends carry into those that are stored: the same."""
        return states

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Size of the last dimension of each state."""
        sizes = [self.hidden_size] * self._num_states
        sizes[0] = self.proj_size or self.hidden_size
        return tuple(sizes)

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
