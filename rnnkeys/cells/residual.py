"""The block that deep stacks of linear cells need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import init_uniform
from .linear import LinearCell, Parameters, check_norm_size, projection_shapes


class ResidualBlock(LinearCell):
    r"""A linear cell inside the block that deep stacks of linear layers need.

    .. math:: e_t = W_e x_t + b_e, \quad
        z_t = \operatorname{GELU}(\mathrm{cell}(\operatorname{LN}(e_t))), \quad
        y_t = e_t + (W_1 z_t + b_1) \odot \sigma(W_2 z_t + b_2)

    Encoder, normalization, recurrence, gated linear unit and skip connection are those of
    "Resurrecting Recurrent Neural Networks for Long Sequences", Orvieto et al., 2023
    (arXiv:2303.06349), and of S5. Where the input has the size of the output already, as between
    layers, :math:`e_t = x_t`.

    Args:
        cell: the linear cell inside.

    Raises:
        ValueError: if a layer of it has one feature, which LN would make zero.

    Examples:
        >>> from rnnkeys.cells import MinGRU
        >>> sorted(ResidualBlock(MinGRU()).parameter_shapes(3, 5))[:3]
        ['bias_encoder', 'bias_glu', 'bias_ih']
    """

    def __init__(self, cell: LinearCell) -> None:
        self.cell = cell
        self.name = f"{cell.name}_residual"
        self.state_names = cell.state_names
        self.is_complex = cell.is_complex
        self.window_len = cell.window_len

    def state_sizes(self, hidden_size: int) -> tuple[int, ...]:
        """Return those of the cell inside."""
        return self.cell.state_sizes(hidden_size)

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the cell, the norm, the gated linear unit and the encoder."""
        check_norm_size(self.name, hidden_size)
        shapes = self.cell.parameter_shapes(hidden_size, hidden_size, bias)
        shapes |= {"weight_norm": (hidden_size,), "bias_norm": (hidden_size,)}
        shapes |= projection_shapes("glu", 2 * hidden_size, hidden_size, bias)
        if input_size != hidden_size:
            shapes |= projection_shapes("encoder", hidden_size, input_size, bias)
        return shapes

    def reset_parameters(self, parameters: dict[str, Tensor], hidden_size: int) -> None:
        """Initialize the norm as the identity and maps as those of ``nn.Linear``."""
        norm = ("weight_norm", "bias_norm")
        maps = ("weight_glu", "bias_glu", "weight_encoder", "bias_encoder")
        inner = {name: p for name, p in parameters.items() if name not in (*norm, *maps)}
        self.cell.reset_parameters(inner, hidden_size)
        with torch.no_grad():
            parameters["weight_norm"].fill_(1.0)
            parameters["bias_norm"].zero_()
        for name in maps:
            if name in parameters:
                weight = parameters[name.replace("bias", "weight")]
                init_uniform(parameters[name], weight.shape[1])

    def project_input(self, weights: Parameters, x: Tensor) -> Tensor:
        """Return ``[skip (H) | projected input of the cell]``."""
        if "weight_encoder" in weights:
            x = F.linear(x, weights["weight_encoder"], weights.get("bias_encoder"))
        norm = F.layer_norm(x, x.shape[-1:], weights["weight_norm"], weights["bias_norm"])
        return torch.cat([x, self.cell.project_input(weights, norm)], -1)

    def window_input(self, weights: Parameters, input_t: Tensor) -> Tensor:
        """See the base."""
        return self.cell.window_input(weights, input_t[..., self._width(weights) :])

    def convolve(self, weights: Parameters, input_t: Tensor, previous: Sequence[Tensor]) -> Tensor:
        """See the base."""
        skip, inner = input_t.tensor_split([self._width(weights)], -1)
        return torch.cat([skip, self.cell.convolve(weights, inner, previous)], -1)

    def split_input(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, Any]:
        """Return the first part of the cell's, and the skip with the second."""
        skip, inner = input_t.tensor_split([self._width(weights)], -1)
        drive, rest = self.cell.split_input(weights, inner)
        return drive, (skip, rest)

    def coefficients(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, Tensor]:
        """See the base."""
        return self.cell.coefficients(weights, input_t)

    def convex_gates(self, weights: Parameters, input_t: Tensor) -> Tensor | None:
        """See the base."""
        return self.cell.convex_gates(weights, input_t)

    def read_out(self, weights: Parameters, input_t: Any, h: Tensor) -> Tensor:
        """See the base."""
        skip, rest = input_t
        y = F.gelu(self.cell.read_out(weights, rest, h))
        return skip + F.glu(F.linear(y, weights["weight_glu"], weights.get("bias_glu")), -1)

    def _width(self, weights: Parameters) -> int:
        return weights["weight_glu"].shape[1]
