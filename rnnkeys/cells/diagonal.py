"""State space cells with a constant, diagonal, complex recurrence: LRU and S5."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks.arguments import as_float
from .linear import (
    LinearCell,
    Parameters,
    check_positive,
    check_steps,
    join_pairs,
    projection_shapes,
    split_pairs,
)


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
        """Return ``2 N``: pairs of real and imaginary part."""
        return (2 * self.num_modes(hidden_size),)

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of input map, read-out and skip connection."""
        size = 2 * self.num_modes(hidden_size)
        return {
            "weight_ih": (size, input_size),
            "weight_out": (hidden_size, size),
            **projection_shapes("skip", hidden_size, input_size, bias),
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
        re, im = split_pairs(weights["weight_ih"].T)
        scaled = join_pairs(
            re * modes.scale_re - im * modes.scale_im, re * modes.scale_im + im * modes.scale_re
        ).T
        bias = weights.get("bias_skip")
        if bias is not None:
            bias = torch.cat([bias.new_zeros(len(scaled)), bias])
        return F.linear(x, torch.cat([scaled, weights["weight_skip"]]), bias)

    def split_input(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of the state and the skip connection."""
        hidden, size = weights["weight_out"].shape
        drive, skip = input_t.split([size, hidden], -1)
        return drive, skip

    def coefficients(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, Tensor]:
        """See the base; decays are the same at every step."""
        modes = self.modes(weights)
        return join_pairs(modes.decay_re, modes.decay_im), input_t

    def read_out(self, weights: Parameters, input_t: Tensor, h: Tensor) -> Tensor:
        """Return the real part of a linear map of the state, plus the skip connection."""
        return F.linear(h, weights["weight_out"]) + input_t


class LRU(_DiagonalCell):
    r"""Linear recurrent unit: ``N = H`` complex modes on a ring inside the unit circle.

    .. math:: \lambda = \exp(-\exp \nu + i \exp \theta), \quad
        h_t = \lambda \odot h_{t-1} + \gamma \odot (B x_t), \quad
        y_t = \operatorname{Re}(C h_t) + D x_t + b

    with :math:`\gamma = \exp(\log \gamma)` learned from :math:`\sqrt{1 - |\lambda|^2}` on. See
    "Resurrecting Recurrent Neural Networks for Long Sequences", Orvieto et al., 2023
    (arXiv:2303.06349); decays start uniformly on the ring of radii 0.9 and 0.999, phases up to
    :math:`\pi / 10`, the paper's choice for long sequences. ``weight_ih`` holds pairs
    of rows (Re B, Im B), and ``weight_out`` of columns (Re C, -Im C).

    Args:
        min_radius: smallest absolute value of a decay at the start, in [0, 1).
        max_radius: largest one, in (min_radius, 1).
        max_phase: largest angle that a mode turns by in one step at the start, in radians.

    Raises:
        ValueError: if the radii are not ordered within [0, 1), or ``max_phase`` is not positive.

    Examples:
        >>> LRU_CELL.state_sizes(5)
        (10,)
    """

    name = "lru"

    def __init__(
        self, min_radius: float = 0.9, max_radius: float = 0.999, max_phase: float = math.pi / 10
    ) -> None:
        as_float("min_radius", min_radius)
        as_float("max_radius", max_radius)
        if not min_radius < max_radius < 1:
            raise ValueError(
                f"min_radius and max_radius must be ordered, 0 <= min_radius < max_radius < 1, so "
                f"that states decay. Got min_radius={min_radius}, max_radius={max_radius}."
            )
        check_positive("max_phase", max_phase)
        self.min_radius = min_radius
        self.max_radius = max_radius
        self.max_phase = max_phase

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
                # From (0, 1], since 0 has no logarithm.
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
    ``weight_ih`` holds pairs of rows (Re B, Im B), and ``weight_out`` of columns (2 Re C, -2 Im C).

    Args:
        min_step: smallest :math:`\Delta` at the start, > 0. A state lasts about
            :math:`2 / \Delta` steps.
        max_step: largest one.

    Raises:
        ValueError: unless ``0 < min_step <= max_step``.

    Examples:
        >>> S5_CELL.state_sizes(6)
        (6,)
    """

    name = "s5"

    def __init__(self, min_step: float = 1e-3, max_step: float = 1e-1) -> None:
        check_steps(min_step, max_step)
        self.min_step = min_step
        self.max_step = max_step

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


LRU_CELL = LRU()
S5_CELL = S5()
