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
