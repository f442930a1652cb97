"""oneDNN's LSTM kernel, and the cell states in its workspace.

The kernel returns outputs and the last cell state. The cell states after the other steps are in the
workspace that it keeps for its backward pass, and are copied from there: that takes a third of the
time of a matmul over all steps. Their place is not part of oneDNN's interface. So it is probed once
for each size of layers, and once for each size of blocks the last step is computed again from the
values found there and compared with the returned state. Where that fails, nothing is returned.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._compat import onednn_lstm_layer, onednn_lstm_layer_backward
from ..cells import LSTM_CELL, Weights
from .packing import Plan

# Relative to the largest state: rounding differs a little, a wrong place differs a lot.
_END_TOLERANCE = 1e-4
# Elements of a memory page; oneDNN starts every part of its workspace on one.
_PAGE = 1024
# Elements of a workspace, 31.5 MiB. A larger piece goes back to the system when it is freed, and to
# get it again, page by page, takes as long as to compute.
_MOST_KEPT = 63 << 17
# Sizes of blocks whose states were found in their place, which depends on sizes alone.
_checked: set[tuple[int, ...]] = set()
_MOST_CHECKED = 4096


class Block(NamedTuple):
    """The result of one call: outputs ``[T, B, H]``, last state ``[B, H]``, and the workspace."""

    y: Tensor
    h: Tensor
    c: Tensor
    workspace: Tensor


def can_run(x: Tensor) -> bool:
    """Return whether oneDNN has the kernel for inputs like ``x``."""
    is_fit = x.dtype == torch.float32 and x.device.type == "cpu"
    return is_fit and torch.backends.mkldnn.is_available()


def run(
    weights: Weights, x: Tensor, h: Tensor, c: Tensor, plan: Plan
) -> tuple[list[Tensor], Tensor | None]:
    """Run one layer over packed rows, block by block.

    Args:
        weights: of the layer, without projection.
        x: ``[N, I]``, contiguous.
        h: before the first step, ``[S, H]``, contiguous.
        c: before the first step, ``[S, H]``, contiguous.
        plan: of the rows, in blocks.

    Returns:
        Outputs of blocks, which together are ``[N, H]``, and cell states ``[N, H]``, detached; None
        if they are not where they are expected.
    """
    parameters = list_parameters(weights)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters, h, c))):
        # The kernel has a workspace only where it records a backward pass.
        x, h, c, *parameters = (t.detach() for t in (x, h, c, *parameters))
    outputs: list[Tensor] = []
    cells: list[Tensor] | None = []
    for block in run_blocks(parameters, x, h, c, cut_blocks(plan.blocks, x.shape[1], h.shape[1])):
        outputs.append(block.y.flatten(0, 1))
        cells = add_cell_states(cells, block, x.shape[1])
    return outputs, None if cells is None else torch.cat(cells)


def list_parameters(weights: Weights) -> list[Tensor]:
    """Return ``w_ih``, ``w_hh``, ``b_ih`` and ``b_hh``; zeros for biases that are not there."""
    b_ih, b_hh = weights.b_ih, weights.b_hh
    if b_ih is None or b_hh is None:
        b_ih = b_hh = weights.w_hh.new_zeros(weights.w_hh.shape[0])
    return [weights.w_ih, weights.w_hh, b_ih, b_hh]


def run_blocks(
    parameters: list[Tensor], x: Tensor, h: Tensor, c: Tensor, blocks: list[tuple[int, int]]
) -> Iterator[Block]:
    """Run rows ``[N, I]`` block by block, each from the last state of the block before it."""
    for rows, (steps, size) in zip(x.split([t * n for t, n in blocks]), blocks, strict=True):
        block = run_block(parameters, rows.view(steps, size, -1), h[:size], c[:size])
        h, c = block.h, block.c
        yield block


def as_blocks(tensors: Sequence[Tensor]) -> list[Block]:
    """Return the blocks whose tensors are given one after the other."""
    return [Block(*tensors[k : k + 4]) for k in range(0, len(tensors), 4)]


def run_blocks_backward(
    parameters: list[Tensor], x: Tensor, h: Tensor, c: Tensor, blocks: list[Block], d_y: Tensor
) -> list[Tensor]:
    """Compute the gradients of :func:`run_blocks` over blocks of one number of rows.

    Args:
        parameters: as in the forward pass.
        x: as in the forward pass.
        h: as in the forward pass.
        c: as in the forward pass.
        blocks: the results.
        d_y: the gradient of the outputs, ``[N, H]``, contiguous.

    Returns:
        The gradients of ``x``, the four parameters, ``h`` and ``c``.
    """
    starts = [(h, c), *((block.h, block.c) for block in blocks[:-1])]
    rows = [block.y.shape[:2].numel() for block in blocks]
    parts = zip(x.split(rows), d_y.split(rows), starts, blocks, strict=True)
    d_x: list[Tensor] = []
    sums: list[Tensor] = []
    d_state: tuple[Any, Any] = (None, None)
    for x_k, d_y_k, start, block in reversed(list(parts)):
        x_k = x_k.view(*block.y.shape[:2], -1)
        grads = d_y_k.view_as(block.y), *d_state
        (d_x_k, *terms), d_state = onednn_lstm_layer_backward(x_k, parameters, start, block, grads)
        d_x.insert(0, d_x_k.flatten(0, 1))
        sums = [a.add_(b) for a, b in zip(sums, terms, strict=True)] if sums else terms
    # Both biases have one gradient: a change of one in place must not change the other.
    return [join_rows(d_x), *sums, sums[-1].clone(), *d_state]


def join_rows(blocks: list[Tensor]) -> Tensor:
    """Return the rows of all blocks; those of one block are not copied."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def add_cell_states(cells: list[Tensor] | None, block: Block, inputs: int) -> list[Tensor] | None:
    """Return ``cells`` and the block's cell states after every step, or None if any is missing."""
    found = None if cells is None else find_cell_states(block, inputs)
    if cells is None or found is None:
        return None
    return [*cells, found.flatten(0, 1), block.c.detach()]


def run_block(parameters: list[Tensor], x: Tensor, h: Tensor, c: Tensor) -> Block:
    """Run ``x [T, B, I]`` from ``h [B, H]`` and ``c [B, H]``."""
    with torch.enable_grad():
        return Block(*onednn_lstm_layer(x, parameters, h, c))


def count_workspace(steps: int, rows: int, inputs: int, hidden: int) -> int:
    """Return the number of elements of the workspace of ``[steps, rows]``, up to a few pages.

    Examples:
        >>> count_workspace(64, 16, 64, 128) / (64 * 16)
        1956.0
    """
    wide = 6 * _padded(max(inputs, hidden)) + 4 * hidden
    return rows * (steps * (_padded(4 * hidden) + _padded(hidden)) + (steps + 1) * wide)


def cut_blocks(blocks: list[tuple[int, int]], inputs: int, hidden: int) -> list[tuple[int, int]]:
    """Cut blocks ``(steps, rows)`` along time so that no workspace is too large to be kept."""
    cut = []
    for steps, rows in blocks:
        size = count_workspace(steps, rows, inputs, hidden)
        pieces = min(-(-size // _MOST_KEPT), steps)
        ends = [steps * k // pieces for k in range(pieces + 1)]
        cut += [(end - start, rows) for start, end in zip(ends[:-1], ends[1:], strict=True)]
    return cut


def find_cell_states(block: Block, inputs: int) -> Tensor | None:
    """Return a view of the cell states after all steps but the last, ``[T - 1, B, H]``.

    None if they are not where they are expected.
    """
    if not is_place_known(inputs, block.y.shape[2]):
        return None
    cells = _view_cells(block, inputs)
    size = (*block.y.shape, inputs)
    if cells is None or not len(cells) or size in _checked:
        return cells
    gates = _view_last_gates(block).numpy()
    after = block.c.detach().numpy()
    before = cells[-1].numpy()
    # One row shows a wrong place. If it is not finite it shows nothing, and must not change how the
    # others are computed.
    row = np.abs(after[:, 0]).argmax()
    if not _agree(gates[row], before[row], after[row]):
        finite = np.isfinite(after).all(1)
        return cells if _agree(gates[finite], before[finite], after[finite]) else None
    if after[row].any():  # zeros show nothing
        if len(_checked) == _MOST_CHECKED:
            _checked.clear()
        _checked.add(size)
    return cells


def _agree(gates: np.ndarray, before: np.ndarray, after: np.ndarray) -> bool:
    """Return whether gates turn the cell state before a step into the one after it."""
    hidden = after.shape[-1]
    i, f, g = (gates[..., k : k + hidden] for k in range(0, 3 * hidden, hidden))
    with np.errstate(invalid="ignore"):
        error = np.abs(i * g + f * before - after)
    return bool(error.max(initial=0) <= _END_TOLERANCE * np.abs(after).max(initial=0))


def _view_cells(block: Block, inputs: int) -> Tensor | None:
    """View cell states ``[T - 1, B, H]``; None if the workspace ends before they do.

    oneDNN's layout: gates, two parts of outputs, and cell states, which start with two entries for
    every step that are not used here.
    """
    steps, rows, hidden = block.y.shape
    first = _first_cell(steps, rows, hidden, inputs)
    flat = block.workspace.view(torch.float32)
    if flat.numel() < first + (steps - 1) * rows * hidden:
        return None
    return flat.as_strided((steps - 1, rows, hidden), (rows * hidden, hidden, 1), first)


@functools.lru_cache(_MOST_CHECKED)
def _first_cell(steps: int, rows: int, hidden: int, inputs: int) -> int:
    """Return the element of the workspace at which the cell states start."""
    parts = (
        steps * rows * _padded(4 * hidden),
        steps * rows * _padded(hidden),
        2 * (steps + 1) * rows * _padded(max(inputs, hidden)),
    )
    return sum(-(-size // _PAGE) * _PAGE for size in parts) + (steps + 2) * rows * hidden


def _view_last_gates(block: Block) -> Tensor:
    """View the activated gates of the last step, ``[B, 4H]``."""
    steps, rows, hidden = block.y.shape
    width = _padded(4 * hidden)
    flat = block.workspace.view(torch.float32)
    return flat.as_strided((rows, 4 * hidden), (width, 1), (steps - 1) * rows * width)


def _padded(width: int) -> int:
    """Return the elements of a row: a multiple of 16, and 16 more for a multiple of 256."""
    width = -(-width // 16) * 16
    return width + 16 * (width % 256 == 0)


@functools.cache
def is_place_known(inputs: int, hidden: int) -> bool:
    """Return whether the cell states of a small example are where they are expected."""
    steps, rows = 4, 3
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float32, device="cpu") - 0.5

    sizes = ((4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
    parameters = [draw(*size) for size in sizes]
    x, h, c = draw(steps, rows, inputs), draw(rows, hidden), draw(rows, hidden)
    block = run_block(parameters, x, h, c)
    expected, state = [], (h, c)
    for x_t in x:
        _, state = LSTM_CELL(Weights(*parameters), x_t, state)
        expected.append(state[1])
    found = _view_cells(block, inputs)
    if found is None:
        return False
    return torch.allclose(found, torch.stack(expected[:-1]), rtol=0, atol=1e-5)
