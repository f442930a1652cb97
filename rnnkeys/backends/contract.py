"""Backends, ways to run time: their contract, and the rule that chooses one.

Every backend takes a dense ``[B, T]`` batch with resets and returns outputs and the states after
every time step. Backends work on tensors: they contain neither keys nor equations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .._compat import in_transform
from ..cells import Cell, LinearCell, State
from . import triton
from .batch import Batch, Options
from .loop import LoopBatch
from .pad import PackedBatch, runs_native
from .scan import ScanBatch
from .step import run_step
from .triton.batch import TritonBatch

BACKENDS = ("auto", "loop", "pad", "scan", "triton")


def why_not(
    name: str,
    cell: Cell,
    weights: Any,
    recompute: str = "none",
    compute_dtype: torch.dtype = torch.float32,
) -> Exception | None:
    """Return the error to raise if a backend cannot run a cell with these parameters, or None.

    It names the reason and what to use instead. Constructors raise it, tests skip by it.

    Args:
        name: of the backend.
        cell: the equations.
        weights: of a layer, for sizes, dtype and device.
        recompute: ``recurrent_recompute``.
        compute_dtype: ``recurrent_compute_dtype``.

    Examples:
        >>> from rnnkeys.cells import GRU_CELL, Weights
        >>> why_not("loop", GRU_CELL, Weights(torch.zeros(3, 1), torch.zeros(3, 1))) is None
        True
    """
    if recompute != "none" and not cell.is_pure:
        return ValueError(
            f"recurrent_recompute={recompute!r} is not for a step module, whose parameters a loss "
            "may swap before the backward pass. Leave it 'none', or write a rnnkeys.cells.Cell."
        )
    if name == "pad" and isinstance(cell, LinearCell):
        return RuntimeError(
            f"recurrent_backend='pad' packs segments for native kernels, and the linear cell "
            f"{cell.name!r} has none: resets cost nothing in its scan. Use 'scan' or 'auto'."
        )
    if recompute != "none" and isinstance(cell, LinearCell) and name in ("auto", "scan"):
        return ValueError(
            f"recurrent_recompute={recompute!r} is not for the linear cell {cell.name!r}, whose "
            "scan keeps its projection and its states alone. Leave it 'none'."
        )
    if recompute != "none" and name in ("pad", "auto"):
        return ValueError(
            f"recurrent_recompute={recompute!r} is not for recurrent_backend={name!r}, whose "
            "native kernel has a workspace of its own. Use recurrent_backend='scan', or "
            "recurrent_recompute='none'."
        )
    if name == "triton" and isinstance(cell, LinearCell):
        return RuntimeError(
            f"recurrent_backend='triton' runs LSTM and GRU, got the linear cell {cell.name!r}, "
            "whose scan has Triton kernels of its own on a GPU. Use 'scan' or 'auto'."
        )
    if name == "triton":
        reason = triton.why_not(cell, weights, compute_dtype=compute_dtype)
        return None if reason is None else RuntimeError(reason)
    return None


def choose(name: str, options: Options, cell: Cell | None = None) -> str:
    """Return the backend that runs when ``name`` is asked for, in the context of the call.

    For linear cells, "auto" is "scan". For other cells:

    =========  =======================  =========================  ==============
    asked for  eager                    in vmap, in torch.compile  without native
    =========  =======================  =========================  ==============
    auto       pad                      scan                       loop
    pad        pad                      scan                       pad
    scan       scan                     scan                       scan
    loop       loop                     loop                       loop
    =========  =======================  =========================  ==============

    "pad" reads the ``is_init`` flags on the host, which neither vmap nor compiled code allows, so
    "scan" runs there; forward-mode differentiation and the rest of ``torch.func`` count as vmap.
    Where both run, "pad" is the faster one or nearly so for all sizes and resets
    (``benchmarks/fit_auto.py``), so sizes do not matter to the choice.
    """
    if name == "auto" and isinstance(cell, LinearCell):
        name = "scan"
    elif name == "auto" and not options.native:
        name = "scan" if is_compiling() else "loop"
    elif name == "auto":
        name = "pad"
    if name == "pad" and (is_compiling() or in_transform()):
        name = "scan"
    return name


def unroll_layers(
    cell: Cell,
    layers: list[Any],
    x: Tensor,
    reset_state: State,
    is_init: Tensor,
    options: Options,
    backend: str,
) -> tuple[Tensor, State]:
    """Run a stack of layers over a batch.

    Args:
        cell: the equations.
        layers: weights of each layer.
        x: ``[B, T, I]``.
        reset_state: per state name ``[B, T, L, H]``, read at t=0 and where ``is_init``.
        is_init: bool ``[B, T]``.
        options: how to run.
        backend: one of ``BACKENDS``.

    Returns:
        Outputs ``[B, T, H]`` and, per state name, the states after every step, ``[B, T, L, H]``.

    Examples:
        >>> from rnnkeys.cells import GRU_CELL, Weights
        >>> layers = [Weights(torch.zeros(3, 1), torch.zeros(3, 1))]
        >>> x, stored = torch.ones(1, 2, 1), torch.ones(1, 2, 1, 1)
        >>> starts = torch.tensor([[True, False]])
        >>> y, (h,) = unroll_layers(GRU_CELL, layers, x, (stored,), starts, Options(), "loop")
        >>> y.flatten()
        tensor([0.5000, 0.2500])
    """
    if not cell.state_names:
        return run_step(cell, layers, x, (), options.dropout, native=False)
    # "triton" recomputes by itself, without running time again. Transforms allow no checkpoint.
    recomputes = options.recompute == "full" and backend != "triton" and not in_transform()
    if recomputes and torch.is_grad_enabled():
        once = options._replace(recompute="none")

        def run(x: Tensor, layers: list[Any], reset_state: State) -> tuple[Tensor, State]:
            return unroll_layers(cell, layers, x, reset_state, is_init, once, backend)

        return checkpoint(run, x, layers, reset_state, use_reentrant=False)
    if is_init.numel() == 0:
        return _unroll_nothing(cell, layers, x, reset_state)
    name = choose(backend, options, cell)
    batch = _make_batch(cell, layers[0], x, reset_state, is_init, options, name)
    rows = batch.pack(x)
    runs = []
    for layer, weights in enumerate(layers):
        if layer and options.dropout:
            rows = F.dropout(rows, options.dropout)
        runs.append(batch.run_layer(weights, rows, layer))
        rows = runs[-1].output
    y = batch.unpack_output(runs[-1])
    with torch.set_grad_enabled(torch.is_grad_enabled() and options.state_grad):
        return y, batch.unpack_states(runs, y)


def _make_batch(
    cell: Cell,
    weights: Any,
    x: Tensor,
    reset_state: State,
    is_init: Tensor,
    options: Options,
    backend: str,
) -> Batch:
    if backend == "triton":
        return TritonBatch(cell, reset_state, is_init, options)
    if backend == "scan":
        return ScanBatch(cell, reset_state, is_init)
    if backend == "loop":
        return LoopBatch(cell, reset_state, is_init)
    # The native kernel has no gradient through the cell states of each step.
    is_native = options.native and not options.state_grad and runs_native(cell, weights, x.dtype)
    return PackedBatch(cell, x, reset_state, is_init, is_native)


def _unroll_nothing(
    cell: Cell, layers: list[Any], x: Tensor, reset_state: State
) -> tuple[Tensor, State]:
    """Return empty outputs of the right shape, connected to inputs and parameters for autograd."""
    zeros = tuple(s.new_zeros(2, *s.shape[2:]) for s in reset_state)
    y, _ = run_step(cell, layers, x.new_zeros(2, x.shape[-1]) + x.sum(), zeros, 0.0, native=False)
    return y[:0].reshape(*x.shape[:2], y.shape[-1]), tuple(s.detach().clone() for s in reset_state)
