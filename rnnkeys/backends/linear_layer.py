"""One layer of a linear cell over time: projections, scan, read-out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cells import LinearCell, State
from . import scan_ops


def run(
    cell: LinearCell, weights: Any, x: Tensor, reset: Tensor, start: State
) -> tuple[Tensor, State]:
    """Run one layer over a time-major batch.

    Args:
        cell: the equations.
        weights: of the layer.
        x: ``[T, B, I]``.
        reset: bool ``[T, B]``, True where a segment starts; the first step always is one.
        start: the stored states, each ``[T, B, S]``, read where segments start.

    Returns:
        Outputs ``[T, B, H]`` and the states after every step.
    """
    p = cell.project_input(weights, x)
    window: State = ()
    if cell.window_len > 1:
        newest = cell.window_input(weights, p)
        previous = look_back(newest, start[1].chunk(cell.window_len - 1, -1), reset)
        window = (torch.cat([newest, *previous[:-1]], -1),)
        p = cell.convolve(weights, p, previous)
    drive, rest = cell.split_input(weights, p)
    gates = cell.convex_gates(weights, drive)
    if gates is not None:
        h = scan_ops.run_gated(gates, start[0], reset)
    else:
        h = _run_scan(cell, *cell.coefficients(weights, drive), start[0], reset)
    return cell.read_out(weights, rest, h), (h, *window)


def look_back(x: Tensor, stored: Sequence[Tensor], reset: Tensor) -> list[Tensor]:
    """Return the values of one step ago, of two steps ago, ..., never from another segment.

    Args:
        x: values ``[T, B, W]``.
        stored: those of one step ago, two steps ago, ... where segments start, each ``[T, B, W]``.
        reset: bool ``[T, B]``, True where a segment starts; the first step always is one.

    Examples:
        >>> x = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
        >>> [before] = look_back(x, [10 * x], torch.tensor([[True], [False], [True]]))
        >>> before.flatten()
        tensor([10.,  1., 30.])
    """
    values = [x]
    for first in stored:
        moved = torch.cat([first[:1], values[-1][:-1]])
        values.append(torch.where(reset.unsqueeze(-1), first, moved))
    return values[1:]


def _run_scan(cell: LinearCell, a: Tensor, b: Tensor, start: Tensor, reset: Tensor) -> Tensor:
    dtype = b.dtype
    if a.ndim > 1:
        a = a.expand_as(b)
    if cell.is_complex and dtype not in (torch.float32, torch.float64):
        # There is no complex counterpart.
        a, b, start = a.float(), b.float(), start.float()
    return scan_ops.run(a, b, start, reset, paired=cell.is_complex).to(dtype)
