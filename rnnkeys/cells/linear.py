r"""Linear cells, whose time runs as a parallel scan.

.. math:: h_t = a_t \odot h_{t-1} + b_t, \quad y_t = g(h_t, x_t)

The coefficients depend on the input alone, never on the state. So all of them are computed at once,
and the recurrence itself is a scan (``rnnkeys.linear_scan``). A complex state of ``N`` numbers is
kept as ``2 N`` real ones, first all real and then all imaginary parts, so that it is an ordinary
floating-point entry.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Cell, State

Parameters = Mapping[str, Tensor]


class LinearCell(Cell):
    r"""A cell with :math:`h_t = a_t \odot h_{t-1} + b_t`, whose coefficients depend on the input.

    A linear cell of your own overrides ``parameter_shapes``, ``project_input``, ``coefficients``
    and, where the output is not the state, ``read_out``; see ``docs/custom_cells.md``.

    Attributes:
        is_complex: whether the state is complex, as ``[real parts | imaginary parts]``.
    """

    state_names = ("h",)
    is_complex: bool = False

    @abstractmethod
    def coefficients(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``a``, ``[S]`` or ``[..., S]``, and ``b [..., S]`` of projected inputs.

        Args:
            weights: of one layer.
            input_t: ``[..., F]``, from ``project_input``; of one time step or of all.
        """

    def read_out(self, weights: Parameters, input_t: Tensor, h: Tensor) -> Tensor:
        """Return the output ``[..., H]`` from states ``h [..., S]``; by default the states."""
        return h

    def step(self, weights: Parameters, input_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Compute one time step."""
        a, b = self.coefficients(weights, input_t)
        decayed = multiply_complex(a, state[0]) if self.is_complex else a * state[0]
        h = decayed + b
        return self.read_out(weights, input_t, h), (h,)


def multiply_complex(a: Tensor, b: Tensor) -> Tensor:
    """Multiply complex numbers that are kept as ``[real parts | imaginary parts]``.

    Examples:
        >>> multiply_complex(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))  # (1+2i)(3+4i)
        tensor([-5., 10.])
    """
    a_re, a_im = a.chunk(2, -1)
    b_re, b_im = b.chunk(2, -1)
    return torch.cat([a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re], -1)


def candidate(v: Tensor) -> Tensor:
    r"""Return :math:`g(v) = v + 1/2` where :math:`v \ge 0`, else :math:`\sigma(v)`.

    It is positive and continuous, with slopes up to 1.

    Examples:
        >>> candidate(torch.tensor([0.0, 1.0]))
        tensor([0.5000, 1.5000])
    """
    return v.clamp(min=0) + v.clamp(max=0).sigmoid()


def mix_coefficients(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``a`` and ``b = (1 - a) * g(v)``, in plain torch operations.

    Examples:
        >>> mix_coefficients(torch.zeros(1), torch.ones(1))
        (tensor([0.5000]), tensor([0.7500]))
    """
    return torch.sigmoid(-u), torch.sigmoid(u) * candidate(v)


class ConvexCell(LinearCell):
    r"""A linear cell that mixes its state and a candidate.

    .. math:: h_t = a_t h_{t-1} + (1 - a_t)\, g(v_t), \quad a_t = \sigma(-u_t)

    It runs as one fused scan. A subclass says what :math:`u` and :math:`v` are.
    """

    @abstractmethod
    def gates(self, input_t: Tensor) -> Tensor:
        """Return ``[..., 2H]``: ``u`` and then ``v``, from projected inputs."""

    def coefficients(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, Tensor]:
        """See the base."""
        return mix_coefficients(*self.gates(input_t).chunk(2, -1))

    def project_input(self, weights: Parameters, x: Tensor) -> Tensor:
        """Project inputs ``x [..., I]`` to all gates."""
        return F.linear(x, weights["weight_ih"], weights.get("bias_ih"))


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
        return _projection("ih", 2 * hidden_size, input_size, bias)

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
        return _projection("ih", 3 * hidden_size, input_size, bias)

    def gates(self, input_t: Tensor) -> Tensor:
        """Return ``u``, for which ``sigmoid(-u) = f / (f + i)``, and the candidate's argument."""
        f, i, v = input_t.chunk(3, -1)
        return torch.cat([F.softplus(-f) - F.softplus(-i), v], -1)


class _Modes(NamedTuple):
    """Complex decays ``[N]`` and the factors that their inputs are multiplied by, ``[N]``."""

    decay_re: Tensor
    decay_im: Tensor
    scale_re: Tensor
    scale_im: Tensor


class _DiagonalCell(LinearCell):
    """A linear cell with constant complex decays, a complex input map and a linear read-out.

    ``project_input`` gives ``[scaled input of the state (2N) | skip connection (H)]``.
    """

    is_complex = True

    @abstractmethod
    def num_modes(self, hidden_size: int) -> int:
        """Return the number ``N`` of complex numbers in the state."""

    @abstractmethod
    def modes(self, weights: Parameters) -> _Modes:
        """Return decays and input factors."""

    def state_sizes(self, hidden_size: int) -> tuple[int, ...]:
        """Return ``2 N``: real and imaginary parts."""
        return (2 * self.num_modes(hidden_size),)

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of input map, read-out and skip connection."""
        size = 2 * self.num_modes(hidden_size)
        return {
            "weight_ih": (size, input_size),
            "weight_out": (hidden_size, size),
            **_projection("skip", hidden_size, input_size, bias),
        }

    def reset_parameter(self, name: str, parameter: Tensor, hidden_size: int) -> None:
        """Initialize maps as the papers do: normal, variance ``1 / (2 I)`` and ``1 / N``."""
        if name == "weight_ih":
            torch.nn.init.normal_(parameter, std=(2 * parameter.shape[1]) ** -0.5)
        elif name == "weight_out":
            torch.nn.init.normal_(parameter, std=(parameter.shape[1] / 2) ** -0.5)
        elif name == "weight_skip":
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            torch.nn.init.zeros_(parameter)

    def project_input(self, weights: Parameters, x: Tensor) -> Tensor:
        """Project inputs to the state, each mode scaled, and to the output."""
        modes = self.modes(weights)
        re, im = weights["weight_ih"].chunk(2)
        scale_re, scale_im = modes.scale_re[:, None], modes.scale_im[:, None]
        scaled = [re * scale_re - im * scale_im, re * scale_im + im * scale_re]
        bias = weights.get("bias_skip")
        if bias is not None:
            bias = torch.cat([bias.new_zeros(2 * len(re)), bias])
        return F.linear(x, torch.cat([*scaled, weights["weight_skip"]]), bias)

    def coefficients(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, Tensor]:
        """See the base; decays are the same at every step."""
        modes = self.modes(weights)
        decay = torch.cat([modes.decay_re, modes.decay_im])
        return decay, input_t[..., : decay.shape[0]]

    def read_out(self, weights: Parameters, input_t: Tensor, h: Tensor) -> Tensor:
        """Return the real part of a linear map of the state, plus the skip connection."""
        return F.linear(h, weights["weight_out"]) + input_t[..., h.shape[-1] :]


class LRU(_DiagonalCell):
    r"""Linear recurrent unit: ``N = H`` complex modes on a ring inside the unit circle.

    .. math:: \lambda = \exp(-\exp \nu + i \exp \theta), \quad
        h_t = \lambda \odot h_{t-1} + \gamma \odot (B x_t), \quad
        y_t = \operatorname{Re}(C h_t) + D x_t + b

    with :math:`\gamma = \exp(\log \gamma)` learned from :math:`\sqrt{1 - |\lambda|^2}` on. See
    "Resurrecting Recurrent Neural Networks for Long Sequences", Orvieto et al., 2023
    (arXiv:2303.06349); decays start uniformly on the ring of radii 0.9 and 0.999, phases up to
    :math:`\pi / 10`, the paper's choice for long sequences. ``weight_out`` is ``[Re C | -Im C]``.

    Examples:
        >>> LRU_CELL.state_sizes(5)
        (10,)
    """

    name = "lru"
    min_radius, max_radius, max_phase = 0.9, 0.999, math.pi / 10

    def num_modes(self, hidden_size: int) -> int:
        """See the base."""
        return hidden_size

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """See the base; ``nu_log``, ``theta_log`` and ``gamma_log`` of every mode."""
        modes = dict.fromkeys(("nu_log", "theta_log", "gamma_log"), (hidden_size,))
        return {**modes, **super().parameter_shapes(input_size, hidden_size, bias)}

    def reset_parameters(self, parameters: dict[str, Tensor], hidden_size: int) -> None:
        """See the base; ``gamma_log`` follows from the decays."""
        super().reset_parameters(parameters, hidden_size)
        with torch.no_grad():
            radius = torch.exp(-parameters["nu_log"].exp())
            parameters["gamma_log"].copy_(0.5 * torch.log1p(-radius.square()))

    def reset_parameter(self, name: str, parameter: Tensor, hidden_size: int) -> None:
        """See the base."""
        with torch.no_grad():
            if name == "nu_log":
                low, high = self.min_radius**2, self.max_radius**2
                squared = torch.rand_like(parameter) * (high - low) + low
                parameter.copy_(torch.log(-0.5 * squared.log()))
            elif name == "theta_log":
                # Of (0, 1], since the logarithm of 0 is none.
                parameter.copy_(torch.log(self.max_phase * (1 - torch.rand_like(parameter))))
            elif name != "gamma_log":
                super().reset_parameter(name, parameter, hidden_size)

    def modes(self, weights: Parameters) -> _Modes:
        """See the base."""
        radius, phase = torch.exp(-weights["nu_log"].exp()), weights["theta_log"].exp()
        gamma = weights["gamma_log"].exp()
        return _Modes(radius * phase.cos(), radius * phase.sin(), gamma, torch.zeros_like(gamma))


class S5(_DiagonalCell):
    r"""Simplified state space layer, diagonal, discretized by a zero-order hold.

    .. math:: \bar\lambda = \exp(\lambda \Delta), \quad
        h_t = \bar\lambda \odot h_{t-1} + \frac{\bar\lambda - 1}{\lambda} \odot (B x_t), \quad
        y_t = 2 \operatorname{Re}(C h_t) + D x_t + b

    The state has ``N = H / 2`` complex modes, one of each conjugate pair; :math:`\lambda` starts at
    the eigenvalues of the normal part of the HiPPO-LegS matrix, :math:`\Delta` log-uniformly from
    .001 to .1, one for each mode. See "Simplified State Space Layers for Sequence Modeling", Smith
    et al., 2023 (arXiv:2208.04933), and, for resets in reinforcement learning, "Structured State
    Space Models for In-Context Reinforcement Learning", Lu et al., 2023 (arXiv:2303.03982).
    ``weight_out`` holds ``[2 Re C | -2 Im C]``.

    Examples:
        >>> S5_CELL.state_sizes(6)
        (6,)
    """

    name = "s5"
    min_step, max_step = 1e-3, 1e-1

    def num_modes(self, hidden_size: int) -> int:
        """See the base.

        Raises:
            ValueError: if ``hidden_size`` is odd.
        """
        if hidden_size % 2:
            raise ValueError(
                f"hidden_size of an S5 layer must be even, since its state is made of conjugate "
                f"pairs. Got hidden_size={hidden_size}: use {hidden_size + 1}."
            )
        return hidden_size // 2

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """See the base; ``rate_log``, ``frequency`` and ``step_log`` of every mode."""
        shapes = super().parameter_shapes(input_size, hidden_size, bias)
        names = ("rate_log", "frequency", "step_log")
        return {**dict.fromkeys(names, (self.num_modes(hidden_size),)), **shapes}

    def reset_parameter(self, name: str, parameter: Tensor, hidden_size: int) -> None:
        """See the base."""
        with torch.no_grad():
            if name == "rate_log":
                parameter.fill_(math.log(0.5))
            elif name == "frequency":
                parameter.copy_(_hippo_frequencies(len(parameter)))
            elif name == "step_log":
                parameter.uniform_(math.log(self.min_step), math.log(self.max_step))
            else:
                super().reset_parameter(name, parameter, hidden_size)

    def modes(self, weights: Parameters) -> _Modes:
        """See the base."""
        rate, frequency, step = (
            -weights["rate_log"].exp(),
            weights["frequency"],
            weights["step_log"].exp(),
        )
        radius, phase = torch.exp(rate * step), frequency * step
        decay_re, decay_im = radius * phase.cos(), radius * phase.sin()
        # (decay - 1) / rate, both complex.
        norm = rate.square() + frequency.square()
        scale_re = ((decay_re - 1) * rate + decay_im * frequency) / norm
        scale_im = (decay_im * rate - (decay_re - 1) * frequency) / norm
        return _Modes(decay_re, decay_im, scale_re, scale_im)


def _hippo_frequencies(count: int) -> Tensor:
    """Return the positive imaginary parts of the normal HiPPO-LegS matrix of size ``2 count``.

    The matrix is ``-1/2`` on its diagonal plus a skew-symmetric part, whose entries below the
    diagonal are ``-sqrt((2 n + 1) (2 k + 1)) / 2``.
    """
    root = (2 * torch.arange(2 * count, dtype=torch.float64) + 1).sqrt()
    lower = torch.outer(root, root).tril(-1) / 2
    skew = lower.T - lower
    return torch.linalg.eigvalsh(torch.complex(torch.zeros_like(skew), -skew))[count:]


class FFM(LinearCell):
    r"""Fast and forgetful memory: traces that decay at several rates and turn at several speeds.

    .. math:: S_t = \gamma \odot S_{t-1} + (\tilde x_t \odot \sigma(i_t))\, 1_c^T, \quad
        \gamma_{mc} = \exp(-|\alpha_m|) \exp(-i \omega_c), \quad
        y_t = \operatorname{LN}(W [\operatorname{Re} S_t, \operatorname{Im} S_t] + b) \odot
        \sigma(o_t) + s_t \odot (1 - \sigma(o_t))

    where :math:`\tilde x, i, o, s` are projections of the input and LN has no parameters. The state
    has ``M = H / 4`` traces times ``C = 4`` contexts, rounded up. See "Reinforcement Learning with
    Fast and Forgetful Memory", Morad et al., 2023 (arXiv:2310.04128). Rates :math:`\alpha` start
    evenly from 0.67 down to the one that leaves 1 % after 1024 steps, periods evenly from 1 to
    1024.

    Examples:
        >>> FFM_CELL.state_sizes(8)
        (16,)
    """

    name = "ffm"
    is_complex = True
    num_contexts = 4
    max_period, forgotten, max_rate = 1024.0, 0.01, 0.67

    def num_traces(self, hidden_size: int) -> int:
        """Return ``M``."""
        return -(-hidden_size // 4)

    def state_sizes(self, hidden_size: int) -> tuple[int, ...]:
        """Return ``2 M C``."""
        return (2 * self.num_traces(hidden_size) * self.num_contexts,)

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes: ``weight_ih`` gives trace, its gate, output gate and skip."""
        traces, (size,) = self.num_traces(hidden_size), self.state_sizes(hidden_size)
        return {
            "rate": (traces,),
            "frequency": (self.num_contexts,),
            **_projection("ih", 2 * traces + 2 * hidden_size, input_size, bias),
            **_projection("out", hidden_size, size, bias),
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
                torch.nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def project_input(self, weights: Parameters, x: Tensor) -> Tensor:
        """Return ``[gated trace input (M) | output gate (H) | skip (H)]``."""
        traces = weights["rate"].shape[0]
        p = F.linear(x, weights["weight_ih"], weights.get("bias_ih"))
        trace, gate, rest = p[..., :traces], p[..., traces : 2 * traces], p[..., 2 * traces :]
        return torch.cat([trace * gate.sigmoid(), rest], -1)

    def coefficients(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, Tensor]:
        """See the base; decays are the same at every step."""
        radius = torch.exp(-weights["rate"].abs())[:, None]
        phase = weights["frequency"]
        decay = torch.cat([(radius * phase.cos()).flatten(), (-radius * phase.sin()).flatten()])
        trace = input_t[..., : len(radius)]
        b_re = trace.repeat_interleave(len(phase), -1)
        return decay, torch.cat([b_re, torch.zeros_like(b_re)], -1)

    def read_out(self, weights: Parameters, input_t: Tensor, h: Tensor) -> Tensor:
        """Return normalized, gated traces and the gated skip connection."""
        z = F.linear(h, weights["weight_out"], weights.get("bias_out"))
        _, gate, skip = input_t.split([input_t.shape[-1] - 2 * z.shape[-1], *z.shape[-1:] * 2], -1)
        gate = gate.sigmoid()
        return F.layer_norm(z, z.shape[-1:]) * gate + skip * (1 - gate)


class ResidualBlock(LinearCell):
    r"""A linear cell inside the block that deep stacks of linear layers need.

    .. math:: z_t = \operatorname{GELU}(\mathrm{cell}(\operatorname{LN}(x_t))), \quad
        y_t = W_r x_t + (W_1 z_t + b_1) \odot \sigma(W_2 z_t + b_2)

    :math:`W_r` is the identity where the input has the size of the output. Normalization,
    recurrence, gated linear unit and skip connection are the block of "Resurrecting Recurrent
    Neural Networks for Long Sequences", Orvieto et al., 2023 (arXiv:2303.06349), and of S5.

    Args:
        cell: the linear cell inside.

    Examples:
        >>> sorted(ResidualBlock(MIN_GRU_CELL).parameter_shapes(3, 5))[:3]
        ['bias_glu', 'bias_ih', 'bias_norm']
    """

    def __init__(self, cell: LinearCell) -> None:
        self.cell = cell
        self.name = f"{cell.name}_residual"
        self.state_names = cell.state_names
        self.is_complex = cell.is_complex

    def state_sizes(self, hidden_size: int) -> tuple[int, ...]:
        """Return those of the cell inside."""
        return self.cell.state_sizes(hidden_size)

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the cell's parameters, the norm, the gated linear unit, the skip."""
        shapes = self.cell.parameter_shapes(input_size, hidden_size, bias)
        shapes |= {"weight_norm": (input_size,), "bias_norm": (input_size,)}
        shapes |= _projection("glu", 2 * hidden_size, hidden_size, bias)
        if input_size != hidden_size:
            shapes["weight_residual"] = (hidden_size, input_size)
        return shapes

    def reset_parameters(self, parameters: dict[str, Tensor], hidden_size: int) -> None:
        """Initialize the norm as the identity and maps as those of ``nn.Linear``."""
        own = ("weight_norm", "bias_norm", "weight_glu", "bias_glu", "weight_residual")
        inner = {name: value for name, value in parameters.items() if name not in own}
        self.cell.reset_parameters(inner, hidden_size)
        with torch.no_grad():
            parameters["weight_norm"].fill_(1.0)
            parameters["bias_norm"].zero_()
            for name in own[2:]:
                if name in parameters:
                    weight = parameters[name.replace("bias", "weight")]
                    torch.nn.init.uniform_(
                        parameters[name], -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5
                    )

    def project_input(self, weights: Parameters, x: Tensor) -> Tensor:
        """Return ``[skip (H) | projected input of the cell]``."""
        norm = F.layer_norm(x, x.shape[-1:], weights["weight_norm"], weights["bias_norm"])
        skip = F.linear(x, weights["weight_residual"]) if "weight_residual" in weights else x
        return torch.cat([skip, self.cell.project_input(weights, norm)], -1)

    def coefficients(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, Tensor]:
        """See the base."""
        return self.cell.coefficients(weights, input_t[..., self._width(weights) :])

    def read_out(self, weights: Parameters, input_t: Tensor, h: Tensor) -> Tensor:
        """See the base."""
        width = self._width(weights)
        y = F.gelu(self.cell.read_out(weights, input_t[..., width:], h))
        gated = F.glu(F.linear(y, weights["weight_glu"], weights.get("bias_glu")), -1)
        return input_t[..., :width] + gated

    def _width(self, weights: Parameters) -> int:
        return weights["weight_glu"].shape[1]


def _projection(name: str, outputs: int, inputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"weight_{name}": (outputs, inputs)}
    return {**shapes, f"bias_{name}": (outputs,)} if bias else shapes


MIN_GRU_CELL = MinGRU()
MIN_LSTM_CELL = MinLSTM()
LRU_CELL = LRU()
S5_CELL = S5()
FFM_CELL = FFM()
