"""Fast and forgetful memory (FFM)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks.arguments import as_int
from .base import init_uniform
from .linear import LinearCell, Parameters, check_norm_size, join_pairs, projection_shapes


class FFM(LinearCell):
    r"""Fast and forgetful memory: traces that decay at several rates and turn at several speeds.

    .. math:: S_t = \gamma \odot S_{t-1} + (\tilde x_t \odot \sigma(i_t))\, 1_c^T, \quad
        \gamma_{mc} = \exp(-|\alpha_m|) \exp(-i \omega_c), \quad
        y_t = \operatorname{LN}(W [\operatorname{Re} S_t, \operatorname{Im} S_t] + b) \odot
        \sigma(o_t) + s_t \odot (1 - \sigma(o_t))

    where :math:`\tilde x, i, o, s` are projections of the input and LN has no parameters. The state
    has ``M = H / C`` traces, rounded up, times ``C`` contexts. See "Reinforcement Learning with
    Fast and Forgetful Memory", Morad et al., 2023 (arXiv:2310.04128). Rates :math:`\alpha` start
    evenly from 0.67 down to the one that leaves 1 % after ``max_period`` steps, periods evenly from
    1 to ``max_period``.

    Args:
        num_contexts: ``C``, the number of speeds.
        max_period: longest period at the start, in steps, and the time in which the slowest trace
            falls to 1 %.

    Raises:
        ValueError: if ``num_contexts`` is not a positive int, or ``max_period`` is not above 1; if
            a layer has one feature, which LN would make zero.

    Examples:
        >>> FFM_CELL.state_sizes(8)
        (16,)
    """

    name = "ffm"
    is_complex = True
    forgotten = 0.01
    max_rate = 0.67

    def __init__(self, num_contexts: int = 4, max_period: float = 1024.0) -> None:
        self.num_contexts = as_int("num_contexts", num_contexts)
        if not max_period > 1:
            raise ValueError(f"max_period must be above 1 step. Got max_period={max_period}.")
        self.max_period = max_period

    def num_traces(self, hidden_size: int) -> int:
        """Return ``M``."""
        return -(-hidden_size // self.num_contexts)

    def state_sizes(self, hidden_size: int) -> tuple[int, ...]:
        """Return ``2 M C``."""
        return (2 * self.num_traces(hidden_size) * self.num_contexts,)

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes: ``weight_ih`` gives trace, its gate, output gate and skip."""
        check_norm_size(self.name, hidden_size)
        traces = self.num_traces(hidden_size)
        (size,) = self.state_sizes(hidden_size)
        return {
            "rate": (traces,),
            "frequency": (self.num_contexts,),
            **projection_shapes("ih", 2 * traces + 2 * hidden_size, input_size, bias),
            **projection_shapes("out", hidden_size, size, bias),
        }

    def reset_parameter(self, name: str, parameter: Tensor, hidden_size: int) -> None:
        """See the base; maps as those of ``nn.Linear``."""
        with torch.no_grad():
            if name == "rate":
                slow = -math.log(self.forgotten) / self.max_period
                parameter.copy_(torch.linspace(self.max_rate, slow, len(parameter)))
            elif name == "frequency":
                periods = torch.linspace(1, self.max_period, len(parameter))
                parameter.copy_(2 * math.pi / periods)
            else:
                fan_in = self.state_sizes(hidden_size)[0] if "out" in name else parameter.shape[-1]
                if name == "bias_ih":
                    fan_in = hidden_size
                init_uniform(parameter, fan_in)

    def project_input(self, weights: Parameters, x: Tensor) -> Tensor:
        """Return ``[trace input (M) | its gate (M) | output gate (H) | skip (H)]``."""
        return F.linear(x, weights["weight_ih"], weights.get("bias_ih"))

    def split_input(
        self, weights: Parameters, input_t: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the gated trace input, and output gate and skip."""
        traces, hidden = weights["rate"].shape[0], weights["weight_out"].shape[0]
        trace, gate, output_gate, skip = input_t.split([traces, traces, hidden, hidden], -1)
        return trace * gate.sigmoid(), (output_gate, skip)

    def coefficients(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, Tensor]:
        """See the base; decays are the same at every step."""
        radius = torch.exp(-weights["rate"].abs())[:, None]
        phase = weights["frequency"]
        decay = join_pairs((radius * phase.cos()).flatten(), (-radius * phase.sin()).flatten())
        pairs = F.pad(input_t.unsqueeze(-1), (0, 1))
        contexts = pairs.unsqueeze(-2).expand(*pairs.shape[:-1], len(phase), 2)
        return decay, contexts.flatten(-3)

    def read_out(self, weights: Parameters, input_t: tuple[Tensor, Tensor], h: Tensor) -> Tensor:
        """Return normalized, gated traces and the gated skip connection."""
        z = F.linear(h, weights["weight_out"], weights.get("bias_out"))
        output_gate, skip = input_t
        return torch.lerp(skip, F.layer_norm(z, z.shape[-1:]), output_gate.sigmoid())


FFM_CELL = FFM()
