"""The contestants: ways to run recurrent layers over a batch in which episodes start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchrl.modules
from tensordict import TensorDict
from torch import Tensor, nn

import rnnkeys

from .cases import GATES, STATES, Batch, Case, Shape, make_batch

AUTO, PAD, SCAN, LOOP, TRITON = "auto", "pad", "scan", "loop", "triton"
PAD_OWN, NO_RESETS, STORED = "pad, own kernel", "auto, no resets", "auto, stored states"
TORCHRL_PAD, TORCHRL_SCAN = "TorchRL pad", "TorchRL scan"
TORCHRL_TRITON = "TorchRL triton"
NATIVE, CUT = "nn", "nn in a loop"
GEMM = "sgemm"

OURS = (AUTO, PAD, SCAN)
TORCHRL = (TORCHRL_PAD, TORCHRL_SCAN)
ALL = (*OURS, *TORCHRL, NATIVE, CUT)

Forward = Callable[[], Tensor]

# Library and backend of the contestants that are a recurrent module.
_MODULES: dict[str, tuple[Any, str]] = {
    **{name: (rnnkeys, "auto") for name in (AUTO, NO_RESETS, STORED)},
    **{name: (rnnkeys, name) for name in (PAD, SCAN, LOOP, TRITON)},
    PAD_OWN: (rnnkeys, "pad"),
    TORCHRL_PAD: (torchrl.modules, "pad"),
    TORCHRL_SCAN: (torchrl.modules, "scan"),
    TORCHRL_TRITON: (torchrl.modules, "triton"),
}


class Contestant:
    """One way to run one case.

    Args:
        name: one of the constants of this module.
        case: to run.
        batch: its data, on the device where the case is to run.
        **arguments: of the recurrent module, where the contestant is one.

    Attributes:
        leaves: tensors that the backward pass computes gradients of: input and parameters.
    """

    def __init__(self, name: str, case: Case, batch: Batch, **arguments: Any) -> None:
        layers = make_layers(case).to(batch.x.device)
        self.leaves = [batch.x, *layers.parameters()]
        self._run = _make_run(name, case, layers, batch, arguments)
        self._grad = batch.grad

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Return the outputs ``[B, T, H]``, prepared for no backward pass."""
        return self._run()

    def both(self) -> tuple[Tensor, ...]:
        """Run forward and backward; return the outputs and the gradients of the leaves."""
        y = self._run()
        return (y, *torch.autograd.grad(y, self.leaves, self._grad))


def make_layers(case: Case) -> nn.RNNBase:
    """Make the ``nn.LSTM`` or ``nn.GRU`` of a case; the same parameters every time."""
    _, _, I, H, L = case.shape
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(nn, case.cell)(I, H, num_layers=L, batch_first=True)


def make_module(library: Any, cell: str, layers: nn.RNNBase, **arguments: Any) -> nn.Module:
    """Make a library's recurrent module around layers.

    Args:
        library: ``rnnkeys`` or ``torchrl.modules``.
        cell: ``"LSTM"`` or ``"GRU"``.
        layers: of that kind.
        **arguments: of the module.
    """
    states = STATES[cell]
    return getattr(library, f"{cell}Module")(
        in_keys=["x", *states],
        out_keys=["y", *(("next", name) for name in states)],
        **{cell.lower(): layers},
        **arguments,
    )


def _make_run(
    name: str, case: Case, layers: nn.RNNBase, batch: Batch, arguments: dict[str, Any]
) -> Forward:
    if name == NATIVE:
        return lambda: layers(batch.x, _first_states(batch))[0]
    if name == CUT:
        return lambda: _run_in_loop(layers, batch)
    library, backend = _MODULES[name]
    arguments = {"recurrent_backend": backend, "default_recurrent_mode": True, **arguments}
    module = make_module(library, case.cell, layers, **arguments)
    if name == PAD_OWN:
        # Without the native layers the packed rows run the hand-written operator.
        module = module.make_python_based()  # pyright: ignore[reportCallIssue]
    is_init = torch.zeros_like(batch.is_init) if name == NO_RESETS else batch.is_init
    states = batch.states
    if name == STORED:
        # Each segment starts from a nonzero state, as where slices of episodes lie end to end.
        states = {key: torch.full_like(state, 0.1) for key, state in states.items()}
    entries = {"x": batch.x, "is_init": is_init.unsqueeze(-1), **states}
    data = TensorDict(entries, batch.is_init.shape)
    return lambda: module(data.copy())["y"]


def _first_states(batch: Batch) -> Any:
    first = [state[:, 0].transpose(0, 1).contiguous() for state in batch.states.values()]
    return tuple(first) if len(first) == 2 else first[0]


def _run_in_loop(layers: nn.RNNBase, batch: Batch) -> Tensor:
    """Cut time wherever an episode starts in any row, and call the layers once per stretch.

    The way of libraries that carry one state per environment through a rollout. Where those call
    once per step as soon as there is one reset, this calls once per stretch, which takes no longer.
    A row whose episode starts continues from zeros.
    """
    inner = batch.is_init[:, 1:].any(0).nonzero().flatten() + 1
    cuts = [0, *inner.tolist(), batch.x.shape[1]]
    state, outputs = _first_states(batch), []
    for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
        if begin:
            keep = ~batch.is_init[None, :, begin, None]
            state = tuple(s * keep for s in state) if isinstance(state, tuple) else state * keep
        y, state = layers(batch.x[:, begin:end], state)
        outputs.append(y)
    return torch.cat(outputs, 1)


def make_gemm(size: int = 2048) -> tuple[Callable[[], Tensor], int]:
    """Return one large float32 matmul and its floating point operations: the machine's bound."""
    a, b = torch.randn(2, size, size)
    out = torch.empty(size, size)
    return lambda: torch.mm(a, b, out=out), 2 * size**3


def check_agreement(names: tuple[str, ...] = ALL, tolerance: float = 1e-4) -> None:
    """Check that all contestants compute the same outputs and gradients.

    Args:
        names: of contestants.
        tolerance: of the difference, relative to the whole tensor.

    Raises:
        AssertionError: naming who differs, and by how much.
    """
    for cell in GATES:
        shape = Shape(3, 12, 5, 7)
        for resets, exempt in ((0.0, ()), (0.2, (NATIVE,))):
            case = Case(cell, shape, resets)
            batch = make_batch(case)
            # All states are zero: contestants that read no stored state start episodes from zeros.
            for state in batch.states.values():
                state.zero_()
            results = {
                name: (c.forward(), *c.both())
                for name in names
                if name not in exempt and (c := Contestant(name, case, batch))
            }
            compare(results, case, tolerance)


def compare(results: dict[str, tuple[Tensor, ...]], case: Case, tolerance: float) -> None:
    first, *others = results
    for name in others:
        for got, expected in zip(results[name], results[first], strict=True):
            error = ((got - expected).norm() / expected.norm()).item()
            if not error <= tolerance:
                raise AssertionError(
                    f"{name!r} differs from {first!r} by {error:.1e} in {case}: nothing is timed."
                )
