"""Long dense rows of short segments, packed inside the operators on the CPU.

An operator runs on real tensors even in ``torch.vmap`` and in compiled code, so it can read the
flags there. A row of 1280 time steps with episodes of 40 then takes 40 steps of 32 rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cells import State
from .fused import Resets
from .packing import Plan, read_segments

# Fewer steps save less time than the copies take, unless they are this many times fewer.
_LEAST_GAIN = 2


class DenseRows:
    """Rows as they come: time-major, those of a dense batch with resets.

    Args:
        sizes: number of rows of every step.
        resets: of a dense batch; None for rows that are packed already.
    """

    def __init__(self, sizes: list[int], resets: Resets | None) -> None:
        self.sizes = sizes
        self.resets = resets

    def pack(self, rows: Tensor) -> Tensor:
        """Return the rows that the loop reads."""
        return rows

    def unpack(self, rows: Tensor) -> Tensor:
        """Return rows that the loop wrote in the order of the caller's."""
        return rows

    def starts(self, first: State) -> State:
        """Return the states that the loop starts from, for states ``[B, H]`` before all steps."""
        return first

    def split_start_grad(self, grad: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of first states and of reset states.

        Args:
            grad: of the states that the loop starts from.
            reset: of the reset states, as the loop computed it.
        """
        return grad, reset


class CutRows(DenseRows):
    """Copies time-major dense rows ``[T * B, F]`` to packed rows ``[T * B, F]``, and back.

    Args:
        plan: of the segments, without padding.
        resets: of the dense batch; none remain between packed rows.
    """

    def __init__(self, plan: Plan, resets: Resets) -> None:
        super().__init__(plan.sizes, None)
        self._cut = resets
        batch, steps = plan.shape
        self._source = plan.source % steps * batch + plan.source // steps
        self._position = torch.empty_like(self._source)
        self._position[self._source] = torch.arange(len(self._source))
        # Segments that start at t=0 start from the batch's first states, others from a reset's.
        self._starts = self._source[: plan.sizes[0]]
        self._at_zero = (self._starts < batch).nonzero().squeeze(1)
        self._row_at_zero = self._starts[self._at_zero]

    def pack(self, rows: Tensor) -> Tensor:
        """Return packed rows."""
        return rows.index_select(0, self._source)

    def unpack(self, rows: Tensor) -> Tensor:
        """Return dense rows."""
        return rows.index_select(0, self._position)

    def starts(self, first: State) -> State:
        """Return the states that segments start from, ``[S, H]``."""
        found = []
        for state, reset in zip(first, self._cut.state, strict=True):
            start = reset.reshape(-1, reset.shape[-1]).index_select(0, self._starts)
            found.append(start.index_copy(0, self._at_zero, state[self._row_at_zero]))
        return tuple(found)

    def split_start_grad(self, grad: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Split the gradient of starts ``[S, H]`` into that of first states and of resets."""
        where = self._cut.where
        first = grad.new_zeros(where.shape[1], grad.shape[1])
        first.index_copy_(0, self._row_at_zero, grad.index_select(0, self._at_zero))
        reset = grad.new_zeros(len(self._source), grad.shape[1])
        reset.index_copy_(0, self._starts, grad)
        reset[: len(first)] = 0
        return first, reset.view(*where.shape, -1)


def lay_out(sizes: Sequence[int], where: Tensor | None, *state: Tensor | None) -> DenseRows:
    """Return the layout of rows in which the loop is fast.

    Args:
        sizes: number of rows of every step, of rows that are packed already.
        where: bool ``[T, B]``, the resets of a dense batch, or None.
        *state: reset states of a dense batch, each ``[T, B, H]``; None is left out.
    """
    if where is None:
        return DenseRows(list(sizes), None)
    resets = Resets(where, tuple(s for s in state if s is not None))
    if where.device.type == "cpu":
        plan = read_segments(where.t()).plan()
        if len(plan.sizes) * _LEAST_GAIN <= plan.shape[1]:
            return CutRows(plan, resets)
    return DenseRows([where.shape[1]] * where.shape[0], resets)
