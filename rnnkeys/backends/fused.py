"""What the hand-written loops of LSTM and GRU share: flat time-major rows, resets, chunks.

Data is laid out as ``[N, F]``: the rows of step 0, then those of step 1, and so on. ``sizes[t]``
counts the rows of step ``t`` and never grows; row ``j`` of a step goes on in row ``j`` of the next.
A dense ``[T, B]`` batch is the case of constant sizes. Optionally the state is replaced before a
step by a given one (a reset, dense batches only).

What does not depend on the state is done outside of the loops for many steps at once: the input
projection before, weight gradients after. The loops hold one product and a few in-place pointwise
operations. Activations take the place of the projected inputs; the backward passes go chunk by
chunk, so that what they compute besides stays in the cache and is never held for all steps. None of
these functions is seen by autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Rows x gates handled at once: large enough to amortise calls, small enough for the cache, and a
# part of the whole, so that small batches take no more memory than torch's layers.
_MOST_ELEMENTS, _FEWEST_ELEMENTS, _PARTS = 1 << 19, 1 << 17, 4


class Resets(NamedTuple):
    """Where a state is replaced before a step (bool ``[T, B]``), by what (each ``[T, B, H]``)."""

    where: Tensor
    state: tuple[Tensor, ...]


class Chunk(NamedTuple):
    """Consecutive steps ``first`` to ``last``, which fill rows ``begin`` to ``end``."""

    first: int
    last: int
    begin: int
    end: int

    @property
    def steps(self) -> slice:
        """Its steps."""
        return slice(self.first, self.last)

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.begin, self.end)


def chunks(sizes: Sequence[int], width: int) -> Iterator[Chunk]:
    """Cut time into chunks, from its end; ``width`` is the number of elements of a row.

    Examples:
        >>> [chunk.steps for chunk in chunks([2, 2, 1], 1 << 15)]
        [slice(1, 3, None), slice(0, 1, None)]
    """
    last, end = len(sizes), sum(sizes)
    elements = min(_MOST_ELEMENTS, max(_FEWEST_ELEMENTS, end * width // _PARTS))
    limit = max(1, elements // width)
    while last:
        first, begin = last, end
        while first and (first == last or end - begin + sizes[first - 1] <= limit):
            first -= 1
            begin -= sizes[first]
        yield Chunk(first, last, begin, end)
        last, end = first, begin


def forward_chunks(sizes: Sequence[int], width: int, keep: bool) -> list[Chunk]:
    """Cut time into chunks, from its start, or into one where activations are kept of all steps."""
    if keep:
        return [Chunk(0, len(sizes), 0, sum(sizes))]
    return list(chunks(sizes, width))[::-1]


def enter(
    state: tuple[Tensor, ...], t: int, rows: int, resets: Resets | None
) -> tuple[Tensor, ...]:
    """State entering step ``t``: the rows that go on, replaced where there is a reset."""
    if resets is not None and t:
        where = resets.where[t].unsqueeze(1)
        return tuple(torch.where(where, r[t], s) for r, s in zip(resets.state, state, strict=True))
    return state if state[0].shape[0] == rows else tuple(s[:rows] for s in state)


def entering(
    start: Tensor,
    after: Tensor,
    sizes: Sequence[int],
    chunk: Chunk,
    resets: Resets | None,
    entry: int,
) -> Tensor:
    """States that enter the steps of a chunk, from those after every step, ``[N, H]``."""
    before = _before(start, after, sizes, chunk)
    if resets is None:
        return before
    where = resets.where[chunk.steps]
    if chunk.first == 0:
        where = where.clone()
        where[0] = False
    steps_rows = before.view(*where.shape, -1)
    state = resets.state[entry][chunk.steps]
    return torch.where(where.unsqueeze(-1), state, steps_rows).flatten(0, 1)


def _before(start: Tensor, after: Tensor, sizes: Sequence[int], chunk: Chunk) -> Tensor:
    first, last, begin, end = chunk
    if sizes[0] == sizes[last - 1]:
        rows = sizes[0]
        if first:
            return after[begin - rows : end - rows]
        return torch.cat([start, after[: end - rows]]) if end > rows else start
    parts, row = ([], begin - sizes[first - 1]) if first else ([start], 0)
    for t in range(max(first, 1), last):
        parts.append(after[row : row + sizes[t]])
        row += sizes[t - 1]
    return torch.cat(parts)


def make_reset_grads(resets: Resets | None, wanted: bool) -> tuple[Tensor, ...] | None:
    """Make zeros for the gradients of reset states, if they are wanted."""
    if resets is None or not wanted:
        return None
    return tuple(torch.zeros(s.shape, dtype=s.dtype, device=s.device) for s in resets.state)


def leave(
    grads: tuple[Tensor, ...],
    t: int,
    resets: Resets | None,
    reset_grads: tuple[Tensor, ...] | None,
) -> None:
    """Stop the gradient towards the past at a reset before step ``t``; a NaN does not pass."""
    if resets is None or t == 0:
        return
    where = resets.where[t].unsqueeze(1)
    for i, grad in enumerate(grads):
        if reset_grads is not None:
            torch.where(where, grad, grad.new_zeros(()), out=reset_grads[i][t])
        grad.masked_fill_(where, 0)
