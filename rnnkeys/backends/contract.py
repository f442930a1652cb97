"""Ways to run time: one contract, one table, one rule that chooses.

Every backend takes a dense ``[B, T]`` batch with resets and returns outputs and the states after
every step. Nothing here knows a key of a TensorDict; nothing here knows an equation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from .._compat import in_transform
from ..cells import Cell, LinearCell, State
from . import dense as scan
from . import loop, triton
from . import packed as pad
from .allocator import keep_freed_memory
from .packing import read_segments
from .step import run_step

BACKENDS = ("auto", "loop", "pad", "scan", "triton")


class Options(NamedTuple):
    """How to run time.

    Attributes:
        state_grad: whether gradients flow through the returned states (through the outputs they
            always do).
        only_starts: whether states after the first step of each segment suffice; the others are
            then NaN.
        vendor: whether the vendor's kernels may be used.
        dropout: probability of dropout between layers, 0 outside training.
        recompute: ``"none"``, or ``"full"`` to keep no activations and compute them again in the
            backward pass.
        compute_dtype: of the recurrent matmul in the ``"triton"`` backend.
        precision: recurrent matmul precision of the ``"triton"`` backend, as the user gave it.
    """

    state_grad: bool = True
    only_starts: bool = False
    vendor: bool = True
    dropout: float = 0.0
    recompute: str = "none"
    compute_dtype: torch.dtype = torch.float32
    precision: str = "auto"


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
        cell: the equation.
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
            "vendor kernel manages its own workspace. Use recurrent_backend='scan', or "
            "recurrent_recompute='none'."
        )
    if name == "triton":
        reason = triton.why_not(cell, weights, compute_dtype=compute_dtype)
        return None if reason is None else RuntimeError(reason)
    return None


def choose(name: str, options: Options, cell: Cell | None = None) -> str:
    """Return the backend that runs, by what was asked for and by where the call happens.

    Linear cells run as "scan" wherever "auto" is asked for. For other cells:

    =========  =======================  =========================  ==============
    asked for  eager                    in vmap, in torch.compile  without vendor
    =========  =======================  =========================  ==============
    auto       pad                      scan                       loop
    pad        pad                      scan                       pad
    scan       scan                     scan                       scan
    loop       loop                     loop                       loop
    =========  =======================  =========================  ==============

    "pad" needs the host to read the marks, which neither vmap nor compiled code allows, so "scan"
    steps in; forward-mode differentiation and all else of ``torch.func`` count as vmap. Where both
    run, "pad" is never slower to speak of, whatever the sizes and resets
    (``benchmarks/fit_auto.py``), so sizes do not matter to the choice; which kernel "pad" runs does
    depend on cell and dtype.
    """
    if name == "auto" and isinstance(cell, LinearCell):
        name = "scan"
    elif name == "auto" and not options.vendor:
        name = "scan" if is_compiling() else "loop"
    elif name == "auto":
        name = "pad"
    if name == "pad" and (is_compiling() or in_transform()):
        name = "scan"
    return name


def unroll(
    cell: Cell,
    weights: Any,
    x: Tensor,
    reset_state: State,
    is_init: Tensor,
    options: Options | None = None,
    backend: str = "loop",
) -> tuple[Tensor, State]:
    """Run one layer over a batch.

    Args:
        cell: the equation.
        weights: of the layer.
        x: ``[B, T, I]``.
        reset_state: per state name ``[B, T, H]``, read at t=0 and where ``is_init``.
        is_init: bool ``[B, T]``.
        options: how to run.
        backend: ``"loop"``, ``"pad"``, ``"scan"`` or ``"triton"``.

    Returns:
        Outputs ``[B, T, H]`` and, per state name, the states after every step, ``[B, T, H]``.

    Examples:
        >>> from rnnkeys.cells import GRU_CELL, Weights
        >>> weights = Weights(torch.zeros(3, 1), torch.zeros(3, 1))
        >>> ones = torch.ones(1, 2, 1)
        >>> y, (h,) = unroll(GRU_CELL, weights, ones, (ones,), torch.tensor([[True, False]]))
        >>> y.flatten()
        tensor([0.5000, 0.2500])
    """
    states = tuple(s.unsqueeze(2) for s in reset_state)
    y, out = unroll_layers(cell, [weights], x, states, is_init, options or Options(), backend)
    return y, tuple(s.squeeze(2) for s in out)


def unroll_layers(
    cell: Cell,
    layers: list[Any],
    x: Tensor,
    reset_state: State,
    is_init: Tensor,
    options: Options,
    backend: str,
) -> tuple[Tensor, State]:
    """Run a stack of layers: as :func:`unroll`, with states ``[B, T, L, H]``."""
    if not cell.state_names:
        return run_step(cell, layers, x, (), options.dropout, vendor=False)
    # "triton" recomputes by itself, without running time again. Transforms allow no checkpoint.
    recomputes = options.recompute == "full" and backend != "triton" and not in_transform()
    if recomputes and torch.is_grad_enabled():
        return _recomputed(cell, layers, x, reset_state, is_init, options, backend)
    if is_init.numel() == 0:
        return _empty(cell, layers, x, reset_state)
    name = choose(backend, options, cell)
    batch = _BATCHES[name](cell, layers[0], x, reset_state, is_init, options)
    rows = batch.pack(x)
    history: list[State] = []
    states: State = ()
    for layer, weights in enumerate(layers):
        if layer and options.dropout:
            rows = F.dropout(rows, options.dropout)
        rows, states = batch.run(weights, rows, layer)
        history.append(states)
    return _collect(batch, rows, history, options)


def _empty(cell: Cell, layers: list[Any], x: Tensor, reset_state: State) -> tuple[Tensor, State]:
    """Return empty outputs of the right shape, connected to inputs and parameters for autograd."""
    zeros = tuple(s.new_zeros(2, *s.shape[2:]) for s in reset_state)
    y, _ = run_step(cell, layers, x.new_zeros(2, x.shape[-1]) + x.sum(), zeros, 0.0, vendor=False)
    return y[:0].reshape(*x.shape[:2], y.shape[-1]), tuple(s.detach().clone() for s in reset_state)


def _recomputed(cell, layers, x, reset_state, is_init, options, backend):
    from torch.utils.checkpoint import checkpoint

    once = options._replace(recompute="none")

    def run(x: Tensor, layers: list[Any], reset_state: State):
        return unroll_layers(cell, layers, x, reset_state, is_init, once, backend)

    return checkpoint(run, x, layers, reset_state, use_reentrant=False)


def _collect(
    batch: Any, rows: Tensor, history: list[State], options: Options
) -> tuple[Tensor, State]:
    """Bring outputs and states back to ``[B, T, ...]``, states apart from outputs in memory."""
    y = batch.unpack(rows)
    if batch.keeps_output and y.requires_grad:
        # An activation in place must not spoil what the operator reads in its backward pass.
        y = y.clone(memory_format=torch.contiguous_format)
    with torch.set_grad_enabled(torch.is_grad_enabled() and options.state_grad):
        states = tuple(
            batch.store(entry, y if entry[-1] is rows else None)
            for entry in zip(*history, strict=True)
        )
    return y, states


def _stack(rows: State, unpack: Callable[[Tensor], Tensor], top: Tensor | None) -> Tensor:
    """Bring the layers' rows to ``[B, T, L, H]``, those of the last one by ``top`` if given."""
    unpacked = [unpack(r) for r in (rows if top is None else rows[:-1])]
    return torch.stack(unpacked if top is None else [*unpacked, top], dim=2)


def _nan_after_starts(state: Tensor, is_init: Tensor) -> Tensor:
    starts = is_init.clone()
    starts[:, 0] = True
    return state.masked_fill(~starts[:, :, None, None], float("nan"))


class _Dense:
    """A batch run in place, time first."""

    keeps_output = False

    def __init__(
        self,
        cell: Cell,
        first: Any,
        x: Tensor,
        reset_state: State,
        is_init: Tensor,
        options: Options,
    ):
        self.cell, self.is_init, self.only_starts = cell, is_init, options.only_starts
        self.reset = is_init.transpose(0, 1)
        self.reset_state = tuple(s.transpose(0, 1) for s in reset_state)

    def pack(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)

    def unpack(self, rows: Tensor) -> Tensor:
        return rows.transpose(0, 1)

    def store(self, rows: State, top: Tensor | None) -> Tensor:
        states = _stack(rows, self.unpack, top)
        return _nan_after_starts(states, self.is_init) if self.only_starts else states

    def of_layer(self, layer: int) -> State:
        return tuple(s[:, :, layer] for s in self.reset_state)


class _Loop(_Dense):
    def run(self, weights: Any, rows: Tensor, layer: int) -> tuple[Tensor, State]:
        return loop.run_dense(self.cell, weights, rows, self.reset, self.of_layer(layer))


class _Scan(_Dense):
    keeps_output = True

    def run(self, weights: Any, rows: Tensor, layer: int) -> tuple[Tensor, State]:
        return scan.run(self.cell, weights, rows, self.reset, self.of_layer(layer))


class _Pad:
    """A batch packed segment by segment."""

    def __init__(
        self,
        cell: Cell,
        first: Any,
        x: Tensor,
        reset_state: State,
        is_init: Tensor,
        options: Options,
    ):
        keep_freed_memory()
        self.cell, self.only_starts = cell, options.only_starts
        self.vendor = pad.wants_vendor(cell, first, x.dtype, options.vendor, options.state_grad)
        rows = pad.block_rows(x.shape[-1], reset_state[0].shape[-1]) if self.vendor else 0
        # Its kernel packs and unpacks by itself, and can clear the state between segments.
        self.whole = self.vendor and pad.shares_rows(x)
        # Cell states at starts alone need no workspace where no gradient and no shared row does.
        shares = self.whole and (torch.is_grad_enabled() or not options.only_starts)
        segments = read_segments(is_init)
        self.plan = segments.plan(rows, segments.find_carried(reset_state) if shares else None)
        self.start = tuple(self.plan.at_starts(s) for s in reset_state)
        # Rows that are those of the batch are not copied on their way out.
        self.keeps_output = self.plan.is_dense and not self.whole

    def pack(self, x: Tensor) -> Tensor:
        return x if self.whole else self.plan.pack(x)

    def unpack(self, rows: Tensor) -> Tensor:
        return rows if rows.ndim == 3 else self.plan.unpack(rows)

    def run(self, weights: Any, rows: Tensor, layer: int) -> tuple[Tensor, State]:
        start = tuple(s[:, layer] for s in self.start)
        return pad.run(
            self.cell,
            weights,
            rows,
            start,
            self.plan,
            vendor=self.vendor,
            only_starts=self.only_starts,
            unpacks=layer == self.start[0].shape[1] - 1,
        )

    def store(self, rows: State, top: Tensor | None) -> Tensor:
        if self.only_starts:
            firsts = [self.plan.at_first_steps(r) for r in rows]
            entries = torch.stack(firsts, 1) if len(firsts) > 1 else firsts[0].unsqueeze(1)
            return self.plan.put_at_starts(entries)
        is_own = top is None and (self.vendor or not self.plan.is_dense)
        if is_own and len(rows) == 1:
            return self.unpack(rows[0]).unsqueeze(2)
        return _stack(rows, self.unpack, top)


class _Triton:
    """A batch as it is, for kernels that know resets."""

    keeps_output = True

    def __init__(
        self,
        cell: Cell,
        first: Any,
        x: Tensor,
        reset_state: State,
        is_init: Tensor,
        options: Options,
    ):
        self.cell, self.options = cell, options
        self.reset_state, self.is_init = reset_state, is_init
        self.only_starts = options.only_starts
        self.order = triton.order_segments(is_init)

    def pack(self, x: Tensor) -> Tensor:
        return x

    def unpack(self, rows: Tensor) -> Tensor:
        return rows

    def run(self, weights: Any, rows: Tensor, layer: int) -> tuple[Tensor, State]:
        start = tuple(s[:, :, layer] for s in self.reset_state)
        return triton.unroll(
            self.cell, weights, rows, start, self.is_init, self.options, self.order
        )

    def store(self, rows: State, top: Tensor | None) -> Tensor:
        states = _stack(rows, self.unpack, top)
        return _nan_after_starts(states, self.is_init) if self.only_starts else states


_BATCHES: dict[str, Any] = {"loop": _Loop, "pad": _Pad, "scan": _Scan, "triton": _Triton}
