"""Gated cells: LSTM, GRU and LayerNorm-LSTM, each equation written once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Cell, Weights


class LongShortTermMemory(Cell):
    r"""Long short-term memory, gates in the order i, f, g, o.

    .. math::
        i, f, o = \sigma(\cdot), \quad g = \tanh(\cdot), \quad
        c_t = f \odot c_{t-1} + i \odot g, \quad h_t = o \odot \tanh(c_t)

    where each gate's argument is the sum of its input and its recurrent projection. See "Long
    Short-Term Memory", Hochreiter and Schmidhuber, 1997
    (https://doi.org/10.1162/neco.1997.9.8.1735), with the forget gate of "Learning to Forget", Gers
    et al., 2000; gate order as in ``torch.nn.LSTM``.

    Examples:
        >>> zero = torch.zeros(1, 1)
        >>> h, c = LSTM_CELL.pointwise(torch.zeros(1, 4), torch.zeros(1, 4), (zero, zero + 1))
        >>> c
        tensor([[0.5000]])
    """

    name = "lstm"
    num_gates = 4
    state_names = ("h", "c")

    def pointwise(
        self, gates_x: Tensor, gates_h: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """See the class."""
        i, f, g, o = (gates_x + gates_h).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class GatedRecurrentUnit(Cell):
    r"""Gated recurrent unit, gates in the order r, z, n, the reset gate applied after the matmul.

    .. math::
        r, z = \sigma(\cdot), \quad n = \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h_{t-1} +
        b_{hn})), \quad h_t = (1 - z) \odot n + z \odot h_{t-1}

    See "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine
    Translation", Cho et al., 2014 (arXiv:1406.1078), in the form of ``torch.nn.GRU`` and cuDNN.

    Examples:
        >>> (h,) = GRU_CELL.pointwise(torch.zeros(1, 3), torch.zeros(1, 3), (torch.ones(1, 1),))
        >>> h
        tensor([[0.5000]])
    """

    name = "gru"
    num_gates = 3
    state_names = ("h",)

    def pointwise(
        self, gates_x: Tensor, gates_h: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """See the class."""
        x_r, x_z, x_n = gates_x.chunk(3, -1)
        h_r, h_z, h_n = gates_h.chunk(3, -1)
        z = (x_z + h_z).sigmoid()
        n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        return ((1 - z) * n + z * state[0],)


class LayerNormLongShortTermMemory(Cell):
    r"""Long short-term memory with normalised projections, gates in the order i, f, o, u.

    .. math::
        g = \mathrm{LN}_x(W_x x) + \mathrm{LN}_h(W_h h) + b, \quad i, f, o = \sigma(\cdot), \quad
        u = \tanh(\cdot), \quad c_t = f \odot c_{t-1} + i \odot u, \quad
        h_t = o \odot \tanh(c_t)

    Both norms run over all ``4 H`` gates, with weight and bias; ``c`` is not normalised. See
    "Layer Normalization", Ba et al., 2016 (arXiv:1607.06450); this is the form of DI-engine's
    ``normal`` LSTM.

    Examples:
        >>> LAYER_NORM_LSTM_CELL.parameter_shapes(3, 5)["norm_x_weight"]
        (20,)
    """

    name = "lstm_ln"
    num_gates = 4
    state_names = ("h", "c")
    eps = 1e-5

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """See the base; one bias, and a weight and a bias for each norm."""
        shapes = super().parameter_shapes(input_size, hidden_size, bias)
        shapes.pop("bias_hh", None)
        norms = ("norm_x_weight", "norm_x_bias", "norm_h_weight", "norm_h_bias")
        return {**shapes, **dict.fromkeys(norms, (4 * hidden_size,))}

    def reset_parameter(self, name: str, parameter: Tensor, hidden_size: int) -> None:
        """See the base; norms start as the identity."""
        if name.startswith("norm"):
            torch.nn.init.constant_(parameter, float(name.endswith("weight")))
        else:
            super().reset_parameter(name, parameter, hidden_size)

    def input_gates(self, weights: Weights, x: Tensor) -> Tensor:
        """See the base."""
        gates = self._norm("x", F.linear(x, weights.w_ih), weights)
        return gates if weights.b_ih is None else gates + weights.b_ih

    def state_gates(self, weights: Weights, h: Tensor) -> Tensor:
        """See the base."""
        return self._norm("h", F.linear(h, weights.w_hh), weights)

    def _norm(self, which: str, gates: Tensor, weights: Weights) -> Tensor:
        weight, bias = (weights.extra[f"norm_{which}_{name}"] for name in ("weight", "bias"))
        return F.layer_norm(gates, gates.shape[-1:], weight, bias, self.eps)

    def pointwise(
        self, gates_x: Tensor, gates_h: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """See the class."""
        i, f, o, u = (gates_x + gates_h).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * u.tanh()
        return o.sigmoid() * c.tanh(), c


LSTM_CELL = LongShortTermMemory()
GRU_CELL = GatedRecurrentUnit()
LAYER_NORM_LSTM_CELL = LayerNormLongShortTermMemory()
