"""Where oneDNN's LSTM kernel keeps the cell states that it does not return.

The kernel returns outputs and the last cell state. It keeps the others in the workspace for its
backward pass, from where they are copied. Where they lie is no part of its interface, so it is
probed once for every layer's size, and once for every block's size the last step is computed again
from what was found and compared with the returned state.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cells import LSTM_CELL, Weights

# Relative to the largest state: rounding differs a little, a wrong place differs a lot.
_END_TOLERANCE = 1e-4
_LSTM_MODE = 2
# Elements of a page, on which oneDNN begins every part of its workspace.
_PAGE = 1024
# Sizes of blocks whose states were found to be in their place, which is a matter of sizes alone.
_checked: set[tuple[int, ...]] = set()
_MOST_CHECKED = 4096


class Ran(NamedTuple):
    """What oneDNN made of a block: outputs ``[T, B, H]``, last state, and its workspace."""

    y: Tensor
    h: Tensor
    c: Tensor
    workspace: Tensor


def run_block(weights, x: Tensor, h: Tensor, c: Tensor, with_workspace: bool) -> Ran:
    """Run ``x [T, B, I]``; it leaves a workspace only where gradients are recorded."""
    with torch.set_grad_enabled(with_workspace):
        y, h, c, workspace = torch.mkldnn_rnn_layer(  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            *(x, *weights, h, c),
            *(False, [], _LSTM_MODE, h.shape[1], 1, True, False, False, with_workspace),
        )
    # Without gradients there is none: torch gives None.
    return Ran(y, h, c, y.new_empty(0) if workspace is None else workspace)


def run_block_back(weights, x: Tensor, start, ran: Ran, grads):
    """Gradients of ``x``, the weights, ``h`` and ``c``, from those of ``y``, last ``h`` and ``c``.

    Of the latter two, None are zeros.

    Returns:
        Those of ``x``, ``w_ih``, ``w_hh`` and of either bias; those of ``h`` and ``c``.
    """
    # Positions: see aten::mkldnn_rnn_layer_backward.
    d_x, d_w_ih, d_w_hh, d_b, _, dh, dc = torch.ops.aten.mkldnn_rnn_layer_backward(
        *(x, *weights, *start, ran.y, ran.h, ran.c, *grads),
        *(False, _LSTM_MODE, ran.y.shape[2], 1, True, True, False, [], False, ran.workspace),
    )
    return [d_x, d_w_ih, d_w_hh, d_b], (dh, dc)


def size_of(steps: int, rows: int, inputs: int, hidden: int) -> int:
    """Elements of the workspace of ``[steps, rows]``, up to a few pages.

    Examples:
        >>> size_of(64, 16, 64, 128) / (64 * 16)
        1956.0
    """
    wide = 6 * _padded(max(inputs, hidden)) + 4 * hidden
    return rows * (steps * (_padded(4 * hidden) + _padded(hidden)) + (steps + 1) * wide)


def hidden_cells(ran: Ran, inputs: int) -> Tensor | None:
    """View the cell states after all steps but the last, ``[T - 1, B, H]``, in the workspace.

    None if they are not where they are looked for.
    """
    if ran.workspace.numel() == 0 or not _is_known(inputs, ran.y.shape[2]):
        return None
    cells = _find_cells(ran, inputs)
    size = (*ran.y.shape, inputs)
    if cells is None or not len(cells) or size in _checked:
        return cells
    gates = _find_last_gates(ran).numpy()
    after, before = ran.c.numpy(), cells[-1].numpy()
    # One row tells a wrong place from the right one. If it is not finite it tells nothing, and must
    # not change how the others are computed.
    row = np.abs(after[:, 0]).argmax()
    if not _agree(gates[row], before[row], after[row]):
        finite = np.isfinite(after).all(1)
        return cells if _agree(gates[finite], before[finite], after[finite]) else None
    if after[row].any():  # zeros tell nothing
        if len(_checked) == _MOST_CHECKED:
            _checked.clear()
        _checked.add(size)
    return cells


def _agree(gates: np.ndarray, before: np.ndarray, after: np.ndarray) -> bool:
    """Whether ``c`` after a step is what its gates make of ``c`` before it."""
    hidden = after.shape[-1]
    i, f, g = (gates[..., k : k + hidden] for k in range(0, 3 * hidden, hidden))
    with np.errstate(invalid="ignore"):
        error = np.abs(i * g + f * before - after)
    return bool(error.max(initial=0) <= _END_TOLERANCE * np.abs(after).max(initial=0))


def _find_cells(ran: Ran, inputs: int) -> Tensor | None:
    """View cell states ``[T - 1, B, H]``; None if the workspace ends before they do.

    oneDNN lays out: gates, two parts of outputs, and cell states, which begin with two entries for
    every step that it does not use here.
    """
    steps, rows, hidden = ran.y.shape
    first = _first_cell(steps, rows, hidden, inputs)
    flat = ran.workspace.view(torch.float32)
    if flat.numel() < first + (steps - 1) * rows * hidden:
        return None
    return flat.as_strided((steps - 1, rows, hidden), (rows * hidden, hidden, 1), first)


@functools.lru_cache(_MOST_CHECKED)
def _first_cell(steps: int, rows: int, hidden: int, inputs: int) -> int:
    """Element of the workspace at which the cell states of hidden steps begin."""
    parts = (
        steps * rows * _padded(4 * hidden),
        steps * rows * _padded(hidden),
        2 * (steps + 1) * rows * _padded(max(inputs, hidden)),
    )
    return sum(-(-size // _PAGE) * _PAGE for size in parts) + (steps + 2) * rows * hidden


def _find_last_gates(ran: Ran) -> Tensor:
    """View the activated gates of the last step, ``[B, 4H]``."""
    steps, rows, hidden = ran.y.shape
    width = _padded(4 * hidden)
    flat = ran.workspace.view(torch.float32)
    return flat.as_strided((rows, 4 * hidden), (width, 1), (steps - 1) * rows * width)


def _padded(width: int) -> int:
    """Elements of a row: a multiple of 16, and 16 more where that is a multiple of 256."""
    width = -(-width // 16) * 16
    return width + 16 * (width % 256 == 0)


@functools.cache
def _is_known(inputs: int, hidden: int) -> bool:
    """Whether states lie where they are looked for, by a small example."""
    steps, rows = 4, 3
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float32, device="cpu") - 0.5

    sizes = ((4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
    weights = Weights(*(draw(*size) for size in sizes))
    x, h, c = draw(steps, rows, inputs), draw(rows, hidden), draw(rows, hidden)
    ran = run_block(weights[:4], x, h, c, with_workspace=True)
    with torch.no_grad():
        expected, state = [], (h, c)
        for x_t in x:
            _, state = LSTM_CELL(weights, x_t, state)
            expected.append(state[1])
        found = _find_cells(ran, inputs)
    if found is None:
        return False
    return torch.allclose(found, torch.stack(expected[:-1]), rtol=0, atol=1e-5)
