"""Minimal gated cells, whose gates depend on the input alone: minGRU and minLSTM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .linear import ConvexCell, projection_shapes


class MinGRU(ConvexCell):
    r"""Minimal gated recurrent unit, gates in the order z, h.

    .. math:: z_t = \sigma(W_z x_t + b_z), \quad \tilde h_t = g(W_h x_t + b_h), \quad
        h_t = (1 - z_t) \odot h_{t-1} + z_t \odot \tilde h_t

    See "Were RNNs All We Needed?", Feng et al., 2024 (arXiv:2410.01201), in the linear domain, with
    its positive candidate :math:`g`. Parameters start as those of torch's layers.

    Examples:
        >>> weights = {"weight_ih": torch.zeros(2, 1)}
        >>> MIN_GRU_CELL(weights, torch.zeros(1, 1), (torch.ones(1, 1),))[0]
        tensor([[0.7500]])
    """

    name = "mingru"

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of ``weight_ih [2H, I]`` and ``bias_ih [2H]``."""
        return projection_shapes("ih", 2 * hidden_size, input_size, bias)

    def gates(self, input_t: Tensor) -> Tensor:
        """See the base."""
        return input_t


class MinLSTM(ConvexCell):
    r"""Minimal long short-term memory, gates in the order f, i, h.

    .. math:: f_t, i_t = \sigma(\cdot), \quad \tilde h_t = g(W_h x_t + b_h), \quad
        h_t = \frac{f_t}{f_t + i_t} \odot h_{t-1} + \frac{i_t}{f_t + i_t} \odot \tilde h_t

    See "Were RNNs All We Needed?", Feng et al., 2024 (arXiv:2410.01201), in the linear domain.

    Examples:
        >>> weights = {"weight_ih": torch.zeros(3, 1)}
        >>> MIN_LSTM_CELL(weights, torch.zeros(1, 1), (torch.ones(1, 1),))[0]
        tensor([[0.7500]])
    """

    name = "minlstm"

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of ``weight_ih [3H, I]`` and ``bias_ih [3H]``."""
        return projection_shapes("ih", 3 * hidden_size, input_size, bias)

    def gates(self, input_t: Tensor) -> Tensor:
        """Return ``u``, for which ``sigmoid(-u) = f / (f + i)``, and the candidate's argument."""
        f, i, v = input_t.chunk(3, -1)
        return torch.cat([F.softplus(-f) - F.softplus(-i), v], -1)


MIN_GRU_CELL = MinGRU()
MIN_LSTM_CELL = MinLSTM()
