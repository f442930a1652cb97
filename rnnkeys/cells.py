"""Equations of one recurrent step, each written once.

A cell knows gates and state. It knows nothing of time, resets, depth, keys or devices: backends run
time, modules know keys. Letters: ``B`` batch, ``I`` input size, ``H`` hidden size, ``G`` gates,
``P`` projection size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.rnn import RNNCellBase


class Weights(NamedTuple):
    """Parameters of one recurrent layer, in torch's layout and gate order.

    ``w_ih [G*H, I]``, ``w_hh [G*H, H]`` (``[G*H, P]`` with a projection), ``b_ih`` and ``b_hh``
    ``[G*H]`` or None, ``w_hr [P, H]`` or None (LSTM's projection of ``h``), ``extra`` the
    parameters that only this cell has, by name.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    # A mapping of tensors; typed so that the others can be unpacked from any sequence.
    extra: Any = {}

    def to(self, dtype: torch.dtype) -> Weights:
        """Cast every parameter."""
        b_ih, b_hh, w_hr = (None if w is None else w.to(dtype) for w in self[2:5])
        extra = {name: w.to(dtype) for name, w in self.extra.items()}
        return Weights(self.w_ih.to(dtype), self.w_hh.to(dtype), b_ih, b_hh, w_hr, extra)

    @property
    def tensors(self) -> list[Tensor]:
        """Every parameter."""
        return [*(w for w in self[:5] if w is not None), *self.extra.values()]


class Cell(ABC):
    """One step: ``state = pointwise(input_gates(x), state_gates(h), state)``.

    The input projection does not depend on the state, so a backend computes it for all time at
    once; the recurrent projection is computed once per step; ``pointwise`` is what is left.
    ``state`` is a tuple in the order of ``state_names`` and its first element is the output ``h``.

    A cell of your own overrides ``pointwise``, or ``step`` where that form does not fit; see
    ``docs/custom_cells.md``.

    Attributes:
        name: lower-case name, such as ``"lstm"`` or ``"gru"``.
        num_gates: ``G``.
        state_names: names of the state's entries.
    """

    name: str
    num_gates: int
    state_names: tuple[str, ...]

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return the parameters of a layer: names, without ``_l0``, and shapes.

        ``weight_ih``, ``weight_hh``, ``bias_ih`` and ``bias_hh`` become the fields of
        :class:`Weights`; others are in its ``extra``. The first two must be there.
        """
        gates = self.num_gates * hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (gates, input_size),
            "weight_hh": (gates, hidden_size),
        }
        return {**shapes, "bias_ih": (gates,), "bias_hh": (gates,)} if bias else shapes

    def reset_parameter(self, name: str, parameter: Tensor, hidden_size: int) -> None:
        """Initialise a parameter in place: uniform within ``1 / sqrt(H)``, as torch's layers."""
        bound = hidden_size**-0.5
        torch.nn.init.uniform_(parameter, -bound, bound)

    def input_gates(self, weights: Weights, x: Tensor) -> Tensor:
        """Project inputs ``x [..., I]`` to gates ``[..., G*H]``."""
        return F.linear(x, weights.w_ih, weights.b_ih)

    def state_gates(self, weights: Weights, h: Tensor) -> Tensor:
        """Project the output state ``h [..., H]`` to gates ``[..., G*H]``."""
        return F.linear(h, weights.w_hh, weights.b_hh)

    @abstractmethod
    def pointwise(
        self, gates_x: Tensor, gates_h: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Return the next state from both projections ``[..., G*H]`` and the state before."""

    def step(
        self, weights: Weights, gates_x: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Run one step from projected inputs ``gates_x [..., G*H]``; returns the next state."""
        h, *rest = self.pointwise(gates_x, self.state_gates(weights, state[0]), state)
        if weights.w_hr is not None:
            h = F.linear(h, weights.w_hr)
        return (h, *rest)


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


class _StepModule(RNNCellBase):
    """Parameters and shape checks shared by the step modules; a subclass names its cell."""

    cell: Cell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, bias, self.cell.num_gates, device=device, dtype=dtype
        )

    def _advance(self, input: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        name = type(self).__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if input.shape[-1] != self.input_size:
            raise ValueError(
                f"{name}: input has shape {tuple(input.shape)}; expected input_size="
                f"{self.input_size} last."
            )
        if state is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            state = (zeros,) * len(self.cell.state_names)
        expected = (*input.shape[:-1], self.hidden_size)
        for i, value in enumerate(state):
            if value.dim() not in (1, 2):
                raise ValueError(
                    f"{name}: Expected hx[{i}] to be 1D or 2D, got {value.dim()}D instead"
                )
            if value.shape != expected:
                raise ValueError(
                    f"{name}: hx[{i}] has shape {tuple(value.shape)}; expected {expected}, as many "
                    "rows as the input has, and hidden_size."
                )
        # nn.RNNCellBase types these as Tensor although they are None without bias.
        weights = Weights(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return self.cell.step(weights, self.cell.input_gates(weights, input), state)


class LSTMCell(_StepModule):
    """``nn.LSTMCell`` in plain torch operations, so that vmap and compile see through it.

    Parameters, initialisation and ``state_dict`` are those of ``nn.LSTMCell``.

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        bias: whether the layer has biases.
        device: of the parameters.
        dtype: of the parameters.

    Examples:
        >>> cell = LSTMCell(3, 5)
        >>> h, c = torch.vmap(cell)(torch.zeros(7, 2, 3))
        >>> h.shape
        torch.Size([7, 2, 5])
    """

    cell = LSTM_CELL

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Advance one step.

        Args:
            input: ``[B, I]`` or ``[I]``.
            hx: ``(h, c)``, each ``[B, H]`` or ``[H]``; zeros by default.

        Returns:
            The next ``(h, c)``.

        Raises:
            ValueError: if a rank is neither 1 nor 2, or a shape does not fit.
        """
        h, c = self._advance(input, hx)
        return h, c


class GRUCell(_StepModule):
    """``nn.GRUCell`` in plain torch operations, so that vmap and compile see through it.

    Parameters, initialisation and ``state_dict`` are those of ``nn.GRUCell``.

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        bias: whether the layer has biases.
        device: of the parameters.
        dtype: of the parameters.

    Examples:
        >>> cell = GRUCell(3, 5)
        >>> torch.vmap(cell)(torch.zeros(7, 2, 3)).shape
        torch.Size([7, 2, 5])
    """

    cell = GRU_CELL

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Advance one step.

        Args:
            input: ``[B, I]`` or ``[I]``.
            hx: ``h``, ``[B, H]`` or ``[H]``; zeros by default.

        Returns:
            The next ``h``.

        Raises:
            ValueError: if a rank is neither 1 nor 2, or a shape does not fit.
        """
        return self._advance(input, None if hx is None else (hx,))[0]
