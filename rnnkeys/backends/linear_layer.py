"""One layer of a linear cell over time: projections, scan, read-out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cells import ConvexCell, LinearCell, State
from . import scan_ops


def run(
    cell: LinearCell, weights: Any, x: Tensor, reset: Tensor, start: Tensor
) -> tuple[Tensor, State]:
    """Run one layer over a time-major batch.

    Args:
        cell: the equations.
        weights: of the layer.
        x: ``[T, B, I]``.
        reset: bool ``[T, B]``, True where a segment starts; the first step always is one.
        start: ``[T, B, S]``, the stored states, read where segments start.

    Returns:
        Outputs ``[T, B, H]`` and the states after every step.
    """
    p = cell.project_input(weights, x)
    if isinstance(cell, ConvexCell):
        h = scan_ops.run_gated(cell.gates(p), start, reset)
    elif cell.is_complex:
        h = _run_complex(*cell.coefficients(weights, p), start, reset)
    else:
        a, b = cell.coefficients(weights, p)
        h = scan_ops.run(_per_step(a, b), b, start, reset)
    return cell.read_out(weights, p, h), (h,)


def _run_complex(a: Tensor, b: Tensor, start: Tensor, reset: Tensor) -> Tensor:
    """Scan states that are kept as ``[real parts | imaginary parts]``."""
    a, drive, initial = (torch.complex(*_wide(x).chunk(2, -1)) for x in (_per_step(a, b), b, start))
    h = scan_ops.run(a, drive, initial, reset)
    return torch.cat([h.real, h.imag], -1).to(b.dtype)


def _per_step(a: Tensor, b: Tensor) -> Tensor:
    return a if a.ndim == 1 else a.expand_as(b)


def _wide(x: Tensor) -> Tensor:
    """Cast to a dtype that has a complex counterpart."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
