"""``"scan"``: time in place on the dense batch, resets by select.

Shapes are static and nothing synchronises with the host.
LSTM, GRU and the scans of linear cells run as one custom operator each, with a hand-written
backward pass; other cells, and derivatives taken by ``torch.func``, run the plain loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._compat import in_derivative, in_transform
from ..cells import Cell, LinearCell, State
from . import linear_layer, ops
from .loop import run_dense


def has_kernel(cell: Cell, weights: Any) -> bool:
    """Whether the fused loops know this cell with these parameters."""
    return cell.name in ("lstm", "gru") and weights.w_hr is None


def run(
    cell: Cell, weights: Any, x: Tensor, reset: Tensor, reset_state: State
) -> tuple[Tensor, State]:
    """Run one layer over ``x [T, B, I]``; see ``loop.run_dense``."""
    if isinstance(cell, LinearCell):
        return linear_layer.run(cell, weights, x, reset, reset_state[0])
    if not has_kernel(cell, weights) or in_derivative():
        return run_dense(cell, weights, x, reset, reset_state)
    steps, batch = x.shape[:2]
    start = tuple(s[0] for s in reset_state)
    states = run_rows(cell, weights, x.reshape(steps * batch, -1), start, (), reset, reset_state)
    states = tuple(s.view(steps, batch, -1) for s in states)
    return states[0], states


def run_rows(
    cell: Cell,
    weights: Any,
    x: Tensor,
    start: State,
    sizes: tuple[int, ...] | list[int],
    reset: Tensor | None = None,
    reset_state: State = (),
) -> State:
    """Run one layer of a cell that has a kernel over flat time-major rows ``x [N, I]``.

    Args:
        cell: LSTM or GRU.
        weights: of the layer.
        x: inputs.
        start: state before the first step.
        sizes: rows of every step, for packed rows.
        reset: bool ``[T, B]``, for dense rows, with ``reset_state``, each ``[T, B, H]``.
        reset_state: replaces the state where ``reset``.

    Returns:
        The states after every step, each ``[N, H]``.
    """
    given = (x, *weights[:4], *start)
    keep = _records(tuple(t for t in (*given, *reset_state) if t is not None))
    resets = reset_state if reset is not None else (None,) * len(start)
    if cell.name == "lstm":
        return ops.lstm(*given, sizes, reset, *resets, keep)[:2]
    return ops.gru(*given, sizes, reset, *resets, keep)[:1]


def _records(inputs: State) -> bool:
    """Whether a backward pass may follow; inside a transform tensors do not tell."""
    return torch.is_grad_enabled() and (in_transform() or any(t.requires_grad for t in inputs))
