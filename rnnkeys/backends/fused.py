"""Shared parts of the hand-written LSTM and GRU loops: flat time-major rows, resets, chunks.

Data is laid out as ``[N, F]``: the rows of step 0, then those of step 1, and so on. ``sizes[t]``
counts the rows of step ``t`` and never grows; row ``j`` of a step continues in row ``j`` of the
next step. A dense ``[T, B]`` batch has constant sizes. In a dense batch, resets can replace the
state before a step by a given state.

Operations that do not depend on the state run outside the loops, for many steps at once: the input
projection before, weight gradients after. The loops contain one product and a few in-place
pointwise operations. Activations overwrite the projected inputs. The backward passes run chunk by
chunk, so that their intermediate results fit the cache and never exist for all steps. Autograd does
not track these functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Elements (rows x gates) of a chunk: enough to amortize calls, few enough for the cache, and
# at most a fraction of the batch, so that small batches need no more memory than torch's layers.
_MOST_ELEMENTS = 1 << 19
_FEWEST_ELEMENTS = 1 << 17
_PARTS = 4


class Resets(NamedTuple):
    """Flags where a state is replaced (bool ``[T, B]``) and its new values (each ``[T, B, H]``)."""

    where: Tensor
    state: tuple[Tensor, ...]


class Grads(NamedTuple):
    """The gradients of a layer.

    Attributes:
        x: ``[N, I]``, or None if it is not wanted.
        w_ih: ``[G*H, I]``.
        w_hh: ``[G*H, H]``.
        b_ih: ``[G*H]``.
        b_hh: ``[G*H]``.
        starts: of the states before the first step.
        resets: of the states that resets write, or None if they are not wanted.
    """

    x: Tensor | None
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor
    b_hh: Tensor
    starts: tuple[Tensor, ...]
    resets: tuple[Tensor, ...] | None


class Chunk(NamedTuple):
    """Consecutive steps ``[first, last)``, stored in rows ``[begin, end)``."""

    first: int
    last: int
    begin: int
    end: int

    @property
    def steps(self) -> slice:
        """The steps as a slice."""
        return slice(self.first, self.last)

    @property
    def rows(self) -> slice:
        """The rows as a slice."""
        return slice(self.begin, self.end)


def split_time(sizes: Sequence[int], width: int) -> Iterator[Chunk]:
    """Split time into chunks, last chunk first; ``width`` is the number of elements of a row.

    Examples:
        >>> [chunk.steps for chunk in split_time([2, 2, 1], 1 << 15)]
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


def split_time_forward(sizes: Sequence[int], width: int, keep: bool) -> list[Chunk]:
    """Split time into chunks, first chunk first; into one if ``keep``, which keeps activations."""
    if keep:
        return [Chunk(0, len(sizes), 0, sum(sizes))]
    return list(split_time(sizes, width))[::-1]


def select_entering_state(
    state: tuple[Tensor, ...], t: int, rows: int, resets: Resets | None
) -> tuple[Tensor, ...]:
    """Return the state entering step ``t``: the rows that continue, replaced at resets."""
    if resets is not None and t:
        where = resets.where[t].unsqueeze(1)
        return tuple(torch.where(where, r[t], s) for r, s in zip(resets.state, state, strict=True))
    return state if state[0].shape[0] == rows else tuple(s[:rows] for s in state)


def gather_entering_states(
    initial: Tensor,
    after: Tensor,
    sizes: Sequence[int],
    chunk: Chunk,
    resets: Resets | None,
    entry: int,
) -> Tensor:
    """Return the states entering the steps of a chunk, from those after every step, ``[N, H]``."""
    before = _shift(initial, after, sizes, chunk)
    if resets is None:
        return before
    where = resets.where[chunk.steps]
    if chunk.first == 0:
        where = where.clone()
        where[0] = False
    steps_rows = before.view(*where.shape, -1)
    state = resets.state[entry][chunk.steps]
    return torch.where(where.unsqueeze(-1), state, steps_rows).flatten(0, 1)


def _shift(initial: Tensor, after: Tensor, sizes: Sequence[int], chunk: Chunk) -> Tensor:
    """Return the states before the steps of a chunk, without resets."""
    first, last, begin, end = chunk
    if sizes[0] == sizes[last - 1]:
        rows = sizes[0]
        if first:
            return after[begin - rows : end - rows]
        return torch.cat([initial, after[: end - rows]]) if end > rows else initial
    parts, row = ([], begin - sizes[first - 1]) if first else ([initial], 0)
    for t in range(max(first, 1), last):
        parts.append(after[row : row + sizes[t]])
        row += sizes[t - 1]
    return torch.cat(parts)


def make_reset_grads(resets: Resets | None, wanted: bool) -> tuple[Tensor, ...] | None:
    """Allocate zeros for the gradients of reset states, or return None if not ``wanted``."""
    if resets is None or not wanted:
        return None
    return tuple(torch.zeros(s.shape, dtype=s.dtype, device=s.device) for s in resets.state)


def cut_gradient(
    grads: tuple[Tensor, ...],
    t: int,
    resets: Resets | None,
    reset_grads: tuple[Tensor, ...] | None,
) -> None:
    """Zero ``grads`` (also NaN) at resets before step ``t``; store them in ``reset_grads``."""
    if resets is None or t == 0:
        return
    where = resets.where[t].unsqueeze(1)
    for i, grad in enumerate(grads):
        if reset_grads is not None:
            torch.where(where, grad, grad.new_zeros(()), out=reset_grads[i][t])
        grad.masked_fill_(where, 0)
