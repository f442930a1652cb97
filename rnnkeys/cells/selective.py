"""A selective state space cell: S6, the recurrence of Mamba."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks.arguments import as_int
from .base import init_uniform
from .linear import LinearCell, Parameters, check_steps, projection_shapes


class S6(LinearCell):
    r"""Selective state space layer: decays and input maps depend on the input.

    .. math::
        u_t, z_t = W_{ih} x_t + b_{ih}, \quad
        v_t = \operatorname{silu}(\textstyle\sum_{k<K} w_k \odot u_{t-k} + b), \quad
        \Delta_t = \operatorname{softplus}(W_\Delta W_r v_t + b_\Delta), \\
        S_t = \exp(\Delta_t A) \odot S_{t-1} + \frac{\exp(\Delta_t A) - 1}{A} \odot
        (v_t\, (W_B v_t)^T), \\
        y_t = W_{out} \big((S_t\, W_C v_t + D \odot v_t) \odot \operatorname{silu}(z_t)\big) +
        b_{out}

    The state ``h`` is the matrix :math:`S`, ``[H, N]`` flattened; ``window`` holds :math:`u` of the
    last ``K - 1`` steps, newest first, so that the convolution sees no other episode. See "Mamba:
    Linear-Time Sequence Modeling with Selective State Spaces", Gu and Dao, 2023
    (arXiv:2312.00752): algorithm 2, discretized by a zero-order hold, inside the block of figure 3,
    here without expansion. :math:`A = -\exp(\cdot)` starts at :math:`-1, \dots, -N`,
    :math:`\Delta` log-uniformly from ``min_step`` to ``max_step``; :math:`W_r` has rank ``H / 16``,
    rounded up.

    Args:
        state_size: ``N``, numbers of state for each of the ``H`` channels.
        window_len: ``K``, steps that the convolution sees, at least 2.
        min_step: smallest :math:`\Delta` at the start, > 0.
        max_step: largest one.

    Raises:
        ValueError: if ``state_size`` is not a positive int, ``window_len`` is below 2, or the steps
            are not ordered.

    Examples:
        >>> S6_CELL.state_names, S6_CELL.state_sizes(8)
        (('h', 'window'), (128, 24))
    """

    name = "s6"
    state_names = ("h", "window")

    def __init__(
        self,
        state_size: int = 16,
        window_len: int = 4,
        min_step: float = 1e-3,
        max_step: float = 1e-1,
    ) -> None:
        check_steps(min_step, max_step)
        self.state_size = as_int("state_size", state_size)
        self.window_len = as_int("window_len", window_len, minimum=2)
        self.min_step = min_step
        self.max_step = max_step

    def state_sizes(self, hidden_size: int) -> tuple[int, ...]:
        """Return ``H N`` and ``H (K - 1)``."""
        return hidden_size * self.state_size, hidden_size * (self.window_len - 1)

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes; ``weight_select`` gives ``[low-rank step | B | C]``.

        ``bias`` does not concern ``bias_step``, which sets how long a state lasts.
        """
        rank = -(-hidden_size // 16)
        convolution: dict[str, tuple[int, ...]] = {"weight_conv": (hidden_size, self.window_len)}
        if bias:
            convolution["bias_conv"] = (hidden_size,)
        return {
            **projection_shapes("ih", 2 * hidden_size, input_size, bias),
            **convolution,
            "weight_select": (rank + 2 * self.state_size, hidden_size),
            **projection_shapes("step", hidden_size, rank, True),
            "rate_log": (hidden_size, self.state_size),
            "skip": (hidden_size,),
            **projection_shapes("out", hidden_size, hidden_size, bias),
        }

    def reset_parameters(self, parameters: dict[str, Tensor], hidden_size: int) -> None:
        """See the base; biases as their weights, those of the step from the range of steps."""
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name == "rate_log":
                    modes = torch.arange(1, self.state_size + 1, dtype=torch.float64)
                    parameter.copy_(modes.log())
                elif name == "skip":
                    parameter.fill_(1.0)
                elif name == "bias_step":
                    low, high = math.log(self.min_step), math.log(self.max_step)
                    step = parameter.uniform_(low, high).exp()
                    # The inverse of softplus.
                    parameter.copy_(step + torch.log(-torch.expm1(-step)))
                else:
                    weight = parameters[name.replace("bias", "weight")]
                    init_uniform(parameter, weight.shape[1])

    def project_input(self, weights: Parameters, x: Tensor) -> Tensor:
        """Return ``[z | u]``, the gate and the input of the convolution."""
        u, z = F.linear(x, weights["weight_ih"], weights.get("bias_ih")).chunk(2, -1)
        return torch.cat([z, u], -1)

    def window_input(self, weights: Parameters, input_t: Tensor) -> Tensor:
        """Return ``u``."""
        return input_t.chunk(2, -1)[1]

    def convolve(self, weights: Parameters, input_t: Tensor, previous: Sequence[Tensor]) -> Tensor:
        """Return ``[z | v | low-rank step | B | C]``."""
        z, u = input_t.chunk(2, -1)
        taps = weights["weight_conv"].unbind(-1)
        v = taps[0] * u
        for tap, past in zip(taps[1:], previous, strict=True):
            v = v + tap * past
        v = F.silu(v + weights["bias_conv"] if "bias_conv" in weights else v)
        return torch.cat([z, v, F.linear(v, weights["weight_select"])], -1)

    def coefficients(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, Tensor]:
        """See the base."""
        _, v, low_rank, b, _ = self._split(weights, input_t)
        step = F.softplus(F.linear(low_rank, weights["weight_step"], weights["bias_step"]))
        rate = -weights["rate_log"].exp()
        exponent = step.unsqueeze(-1) * rate
        drive = torch.expm1(exponent) / rate * (v.unsqueeze(-1) * b.unsqueeze(-2))
        return exponent.exp().flatten(-2), drive.flatten(-2)

    def read_out(self, weights: Parameters, input_t: Tensor, h: Tensor) -> Tensor:
        """Return the gated read-out of the state and of the skip connection."""
        z, v, _, _, c = self._split(weights, input_t)
        state = h.unflatten(-1, weights["rate_log"].shape)
        y = (state * c.unsqueeze(-2)).sum(-1) + weights["skip"] * v
        return F.linear(y * F.silu(z), weights["weight_out"], weights.get("bias_out"))

    def _split(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, ...]:
        """Return gate, convolved input, low-rank step, input map and read-out map."""
        hidden, rank = weights["weight_step"].shape
        sizes = [hidden, hidden, rank, self.state_size, self.state_size]
        return input_t.split(sizes, -1)


S6_CELL = S6()
