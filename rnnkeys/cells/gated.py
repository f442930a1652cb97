"""Gated cells: Elman network, LSTM, GRU and LayerNorm-LSTM, each equation written once."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks.arguments import check_choice
from .base import Cell, State

_FIELDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


class Weights(NamedTuple):
    """Parameters of one layer of a gated cell, in torch's layout and gate order.

    Attributes:
        w_ih: ``[G*H, I]``, of the input projection.
        w_hh: ``[G*H, H]``, of the recurrent projection (``[G*H, P]`` with ``w_hr``).
        b_ih: ``[G*H]`` or None.
        b_hh: ``[G*H]`` or None.
        w_hr: ``[P, H]`` or None, an LSTM's projection of ``h`` to ``P`` entries.
        extra: a mapping of the parameters that only this cell has, by name.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    # Typed so that the fields before can be unpacked from any sequence.
    extra: Any = {}


class GatedCell(Cell):
    r"""A cell whose gates are sums of an input projection and a recurrent projection.

    .. math:: s_t = g(W_{ih} x_t + b_{ih},\ W_{hh} h_{t-1} + b_{hh},\ s_{t-1})

    The first entry ``h`` of the state is the output. A subclass defines ``pointwise``, the function
    ``g`` above.

    Attributes:
        num_gates: ``G``, the number of gates.
    """

    num_gates: int

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes by name.

        ``weight_ih``, ``weight_hh``, ``bias_ih``, ``bias_hh`` and ``weight_hr`` become the fields
        of :class:`Weights`, others entries of its ``extra``. The first two are required.
        """
        gates = self.num_gates * hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (gates, input_size),
            "weight_hh": (gates, hidden_size),
        }
        return {**shapes, "bias_ih": (gates,), "bias_hh": (gates,)} if bias else shapes

    def bind(self, parameters: dict[str, Tensor]) -> Weights:
        """Return the parameters as :class:`Weights`."""
        extra = {name: p for name, p in parameters.items() if name not in _FIELDS}
        w_ih, w_hh, *rest = (parameters.get(name) for name in _FIELDS)
        if w_ih is None or w_hh is None:
            raise ValueError(
                f"A gated cell needs the parameters 'weight_ih' and 'weight_hh'. Got "
                f"{sorted(parameters)}: name both in parameter_shapes of {type(self).__name__}, or "
                "derive it from Cell."
            )
        return Weights(w_ih, w_hh, *rest, extra=extra)

    def project_input(self, weights: Weights, x: Tensor) -> Tensor:
        """Project inputs ``x [..., I]`` to gates ``[..., G*H]``."""
        return F.linear(x, weights.w_ih, weights.b_ih)

    def project_state(self, weights: Weights, h: Tensor) -> Tensor:
        """Project hidden states ``h [..., H]`` to gates ``[..., G*H]``."""
        return F.linear(h, weights.w_hh, weights.b_hh)

    @abstractmethod
    def pointwise(self, gates_x: Tensor, gates_h: Tensor, state: State) -> State:
        """Compute the next state.

        Args:
            gates_x: input projection ``[..., G*H]``.
            gates_h: recurrent projection ``[..., G*H]``.
            state: after the previous time step.

        Returns:
            The next state, whose first entry is the output.
        """

    def step(self, weights: Weights, input_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Compute one time step from the input projection ``input_t [..., G*H]``."""
        h, *rest = self.pointwise(input_t, self.project_state(weights, state[0]), state)
        if weights.w_hr is not None:
            h = F.linear(h, weights.w_hr)
        return h, (h, *rest)


class Elman(GatedCell):
    r"""Simple recurrent network of Elman, one gate.

    .. math:: h_t = \phi(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    See "Finding Structure in Time", Elman, 1990 (https://doi.org/10.1207/s15516709cog1402_1).
    Names, shapes and initialization of the parameters are those of ``torch.nn.RNN``.

    Args:
        nonlinearity: :math:`\phi`, ``"tanh"`` or ``"relu"``.

    Raises:
        ValueError: if ``nonlinearity`` is another word.

    Examples:
        >>> (h,) = ELMAN_CELL.pointwise(torch.ones(1, 1), torch.zeros(1, 1), (torch.zeros(1, 1),))
        >>> h
        tensor([[0.7616]])
    """

    name = "rnn"
    num_gates = 1
    state_names = ("h",)

    def __init__(self, nonlinearity: str = "tanh") -> None:
        check_choice("nonlinearity", nonlinearity, ("tanh", "relu"))
        self.nonlinearity = nonlinearity

    def pointwise(self, gates_x: Tensor, gates_h: Tensor, state: State) -> State:
        """Compute the equation in the class's docstring."""
        total = gates_x + gates_h
        return (total.tanh() if self.nonlinearity == "tanh" else total.relu(),)


class LongShortTermMemory(GatedCell):
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

    def pointwise(self, gates_x: Tensor, gates_h: Tensor, state: State) -> State:
        """Compute the equations in the class's docstring."""
        i, f, g, o = (gates_x + gates_h).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class GatedRecurrentUnit(GatedCell):
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

    def pointwise(self, gates_x: Tensor, gates_h: Tensor, state: State) -> State:
        """Compute the equations in the class's docstring."""
        x_r, x_z, x_n = gates_x.chunk(3, -1)
        h_r, h_z, h_n = gates_h.chunk(3, -1)
        z = (x_z + h_z).sigmoid()
        n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        return ((1 - z) * n + z * state[0],)


class LayerNormLongShortTermMemory(GatedCell):
    r"""Long short-term memory with normalized projections, gates in the order i, f, o, u.

    .. math::
        g = \mathrm{LN}_x(W_x x) + \mathrm{LN}_h(W_h h) + b, \quad i, f, o = \sigma(\cdot), \quad
        u = \tanh(\cdot), \quad c_t = f \odot c_{t-1} + i \odot u, \quad
        h_t = o \odot \tanh(c_t)

    Both norms run over all ``4 H`` gates, with weight and bias; ``c`` is not normalized. See
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
        """Return the shapes of two weights, one bias, and a weight and a bias of each norm."""
        shapes = super().parameter_shapes(input_size, hidden_size, bias)
        shapes.pop("bias_hh", None)
        norms = ("norm_x_weight", "norm_x_bias", "norm_h_weight", "norm_h_bias")
        return {**shapes, **dict.fromkeys(norms, (4 * hidden_size,))}

    def reset_parameter(self, name: str, parameter: Tensor, hidden_size: int) -> None:
        """Initialize norms as the identity, other parameters as the base class."""
        if name.startswith("norm"):
            torch.nn.init.constant_(parameter, float(name.endswith("weight")))
        else:
            super().reset_parameter(name, parameter, hidden_size)

    def project_input(self, weights: Weights, x: Tensor) -> Tensor:
        """Project inputs and normalize the projection."""
        gates = self._norm("x", F.linear(x, weights.w_ih), weights)
        return gates if weights.b_ih is None else gates + weights.b_ih

    def project_state(self, weights: Weights, h: Tensor) -> Tensor:
        """Project hidden states and normalize the projection."""
        return self._norm("h", F.linear(h, weights.w_hh), weights)

    def _norm(self, which: str, gates: Tensor, weights: Weights) -> Tensor:
        weight, bias = (weights.extra[f"norm_{which}_{name}"] for name in ("weight", "bias"))
        return F.layer_norm(gates, gates.shape[-1:], weight, bias, self.eps)

    def pointwise(self, gates_x: Tensor, gates_h: Tensor, state: State) -> State:
        """Compute the equations in the class's docstring."""
        i, f, o, u = (gates_x + gates_h).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * u.tanh()
        return o.sigmoid() * c.tanh(), c


ELMAN_CELL = Elman()
LSTM_CELL = LongShortTermMemory()
GRU_CELL = GatedRecurrentUnit()
LAYER_NORM_LSTM_CELL = LayerNormLongShortTermMemory()
