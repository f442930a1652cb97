"""A layer without state, the baseline for recurrent layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from .base import Cell, State


class FeedForward(Cell):
    r"""A cell without state: a linear map and a hyperbolic tangent.

    .. math:: y_t = \tanh(W x_t + b)

    The feed-forward baseline has the same inputs and the same output size as a recurrent layer, so
    a comparison of both shows the effect of recurrence.

    Examples:
        >>> import torch
        >>> weights = {"weight_ih": torch.ones(1, 2)}
        >>> FEED_FORWARD_CELL(weights, torch.tensor([[0.25, 0.25]]), ())
        (tensor([[0.4621]]), ())
    """

    name = "feed_forward"
    state_names = ()

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of ``weight_ih [H, I]`` and, with ``bias``, ``bias_ih [H]``."""
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (hidden_size, input_size)}
        return {**shapes, "bias_ih": (hidden_size,)} if bias else shapes

    def project_input(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Compute the whole layer, since all of it depends on the input alone."""
        return F.linear(x, weights["weight_ih"], weights.get("bias_ih")).tanh()

    def step(
        self, weights: Mapping[str, Tensor], input_t: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """Return the projected input and the empty state."""
        return input_t, state


FEED_FORWARD_CELL = FeedForward()
