r"""Linear cells, whose time runs as a parallel scan.

.. math:: h_t = a_t \odot h_{t-1} + b_t, \quad y_t = g(h_t, x_t)

The coefficients depend on the input alone, never on the state. So all of them are computed at once,
and the recurrence itself is a scan (``rnnkeys.linear_scan``). A complex state of ``N`` numbers is
kept as ``2 N`` real ones, in pairs of real and imaginary part, so that it is an ordinary
floating-point entry.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Cell, State

Parameters = Mapping[str, Tensor]


class LinearCell(Cell):
    r"""A cell with :math:`h_t = a_t \odot h_{t-1} + b_t`, whose coefficients depend on the input.

    A linear cell of your own overrides ``parameter_shapes``, ``project_input``, ``coefficients``
    and, where the output is not the state, ``read_out``; see ``docs/which_cell.md``.

    A cell with a short convolution over time sees ``window_len`` steps. It then has a second state,
    ``"window"``, with the ``window_len - 1`` last inputs of the convolution, newest first, and
    overrides ``window_input``, ``convolve`` and ``state_sizes``; see :class:`S6`.

    Attributes:
        is_complex: whether the state is complex, kept in pairs of real and imaginary part.
        window_len: number of steps that a step's coefficients depend on: 1 without convolution.
    """

    state_names = ("h",)
    is_complex: bool = False
    window_len: int = 1

    def window_input(self, weights: Parameters, input_t: Tensor) -> Tensor:
        """Return the part ``[..., W]`` of projected inputs that the window keeps."""
        return input_t

    def convolve(self, weights: Parameters, input_t: Tensor, previous: Sequence[Tensor]) -> Tensor:
        """Return projected inputs after the short convolution; by default as they are.

        Args:
            weights: of one layer.
            input_t: ``[..., F]``, from ``project_input``; of one time step or of all.
            previous: ``window_input`` one step ago, two steps ago, ..., each ``[..., W]``.
        """
        return input_t

    def split_input(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, Any]:
        """Return the parts of projected inputs for ``coefficients`` and for ``read_out``.

        By default both read all of them. The gradient of a split costs less than that of slices.
        """
        return input_t, input_t

    @abstractmethod
    def coefficients(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``a``, ``[S]`` or ``[..., S]``, and ``b [..., S]`` of projected inputs.

        Args:
            weights: of one layer.
            input_t: ``[..., F]``, the first part of ``split_input``; of one time step or of all.
        """

    def convex_gates(self, weights: Parameters, input_t: Tensor) -> Tensor | None:
        """Return ``u`` and ``v`` if the fused scan of :class:`ConvexCell` can run, else None."""
        return None

    def read_out(self, weights: Parameters, input_t: Any, h: Tensor) -> Tensor:
        """Return the output ``[..., H]`` from states ``h [..., S]``; by default the states.

        Args:
            weights: of one layer.
            input_t: the second part of ``split_input``.
            h: the states.
        """
        return h

    def step(self, weights: Parameters, input_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Compute one time step."""
        window: State = ()
        if self.window_len > 1:
            previous = state[1].chunk(self.window_len - 1, -1)
            newest = self.window_input(weights, input_t)
            window = (torch.cat([newest, *previous[:-1]], -1),)
            input_t = self.convolve(weights, input_t, previous)
        drive, rest = self.split_input(weights, input_t)
        a, b = self.coefficients(weights, drive)
        decayed = multiply_complex(a, state[0]) if self.is_complex else a * state[0]
        h = decayed + b
        return self.read_out(weights, rest, h), (h, *window)


def multiply_complex(a: Tensor, b: Tensor) -> Tensor:
    """Multiply complex numbers that are kept in pairs of real and imaginary part.

    Examples:
        >>> multiply_complex(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))  # (1+2i)(3+4i)
        tensor([-5., 10.])
    """
    a_re, a_im = split_pairs(a)
    b_re, b_im = split_pairs(b)
    return join_pairs(a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re)


def split_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return real and imaginary parts, each ``[..., N]``, of pairs ``[..., 2 N]``."""
    re, im = x.unflatten(-1, (-1, 2)).unbind(-1)
    return re, im


def join_pairs(re: Tensor, im: Tensor) -> Tensor:
    """Return pairs ``[..., 2 N]`` of real and imaginary parts, each ``[..., N]``.

    Examples:
        >>> join_pairs(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]))
        tensor([1., 2., 3., 4.])
    """
    return torch.stack([re, im], -1).flatten(-2)


def candidate(v: Tensor) -> Tensor:
    r"""Return :math:`g(v) = v + 1/2` where :math:`v \ge 0`, else :math:`\sigma(v)`.

    It is positive and continuous, with slopes up to 1.

    Examples:
        >>> candidate(torch.tensor([0.0, 1.0]))
        tensor([0.5000, 1.5000])
    """
    return v.relu() + v.clamp(max=0).sigmoid()


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

    It runs as one fused scan. A subclass defines :math:`u` and :math:`v`.
    """

    @abstractmethod
    def gates(self, input_t: Tensor) -> Tensor:
        """Return ``[..., 2H]``: ``u`` and then ``v``, from projected inputs."""

    def coefficients(self, weights: Parameters, input_t: Tensor) -> tuple[Tensor, Tensor]:
        """See the base."""
        return mix_coefficients(*self.gates(input_t).chunk(2, -1))

    def convex_gates(self, weights: Parameters, input_t: Tensor) -> Tensor | None:
        """See the base."""
        return self.gates(input_t)

    def step(self, weights: Parameters, input_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Compute one time step, in fewer operations than from coefficients."""
        u, v = self.gates(input_t).chunk(2, -1)
        h = torch.lerp(state[0], candidate(v), u.sigmoid())
        return h, (h,)

    def project_input(self, weights: Parameters, x: Tensor) -> Tensor:
        """Project inputs ``x [..., I]`` to all gates."""
        return F.linear(x, weights["weight_ih"], weights.get("bias_ih"))


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless an argument is a number above 0."""
    if not isinstance(value, Real) or not value > 0:
        raise ValueError(f"{name} must be above 0. Got {name}={value!r}.")


def check_steps(min_step: float, max_step: float) -> None:
    """Raise ValueError unless ``0 < min_step <= max_step``."""
    check_positive("min_step", min_step)
    check_positive("max_step", max_step)
    if min_step > max_step:
        raise ValueError(f"min_step must be at most max_step. Got {min_step=}, {max_step=}.")


def check_norm_size(name: str, hidden_size: int) -> None:
    """Raise ValueError if a layer norm would run over one feature, which it makes zero.

    Args:
        name: of the cell.
        hidden_size: ``H``, the number of features that the norm runs over.
    """
    if hidden_size == 1:
        raise ValueError(
            f"hidden_size must be at least 2 for {name!r}: its layer norm makes a single feature "
            "zero, so that no state reaches the output. Got hidden_size=1. Take more features, or "
            "a cell without a norm, such as 'mingru' with block='plain'. [argument]"
        )


def projection_shapes(
    name: str, outputs: int, inputs: int, bias: bool
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a linear map: ``weight_<name>`` and, with ``bias``, ``bias_<name>``."""
    shapes: dict[str, tuple[int, ...]] = {f"weight_{name}": (outputs, inputs)}
    return {**shapes, f"bias_{name}": (outputs,)} if bias else shapes
