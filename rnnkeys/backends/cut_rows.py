"""Long dense rows of short segments, packed inside the operators on the CPU.

An operator runs on real tensors even in ``torch.vmap`` and in compiled code, so it can read the
flags there. A row of 1280 time steps with episodes of 40 then takes 40 steps of 32 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import State
from .fused import Resets
from .packing import Plan, read_segments

# Fewer steps save less time than the copies take, unless they are this many times fewer.
_LEAST_GAIN = 2


class CutRows:
    """Copies time-major dense rows ``[T * B, F]`` to packed rows ``[T * B, F]``, and back.

    Args:
        plan: of the segments, without padding.

    Attributes:
        sizes: number of rows of every packed step.
    """

    def __init__(self, plan: Plan) -> None:
        batch, steps = plan.shape
        self.sizes = plan.sizes
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

    def pack_if(self, rows: Tensor | None) -> Tensor | None:
        """Return packed rows, or None for None."""
        return None if rows is None else self.pack(rows)

    def unpack_if(self, rows: Tensor | None) -> Tensor | None:
        """Return dense rows, or None for None."""
        return None if rows is None else self.unpack(rows)

    def starts(self, first: State, resets: Resets) -> State:
        """Return the states that segments start from, ``[S, H]``.

        Args:
            first: states before the first step, each ``[B, H]``.
            resets: of the batch.
        """
        found = []
        for state, reset in zip(first, resets.state, strict=True):
            start = reset.reshape(-1, reset.shape[-1]).index_select(0, self._starts)
            found.append(start.index_copy(0, self._at_zero, state[self._row_at_zero]))
        return tuple(found)

    def split_start_grad(self, grad: Tensor, resets: Resets) -> tuple[Tensor, Tensor]:
        """Split the gradient of starts ``[S, H]`` into that of first states and of resets."""
        first = grad.new_zeros(resets.where.shape[1], grad.shape[1])
        first.index_copy_(0, self._row_at_zero, grad.index_select(0, self._at_zero))
        reset = grad.new_zeros(len(self._source), grad.shape[1])
        reset.index_copy_(0, self._starts, grad)
        reset[: len(first)] = 0
        return first, reset.view(*resets.where.shape, -1)


def cut_rows(resets: Resets | None) -> CutRows | None:
    """Return how to pack dense rows, or None if that would not save time.

    Args:
        resets: of the batch, where ``where [T, B]`` is on the CPU.
    """
    if resets is None or resets.where.device.type != "cpu":
        return None
    plan = read_segments(resets.where.t()).plan()
    if len(plan.sizes) * _LEAST_GAIN > plan.shape[1]:
        return None
    return CutRows(plan)
