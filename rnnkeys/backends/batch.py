"""The interface of a backend: a batch laid out in its own way, and run layer by layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cells import Cell, State


class Options(NamedTuple):
    """How to run time.

    Attributes:
        state_grad: whether gradients flow through the returned states (through the outputs they
            always do).
        native: whether torch's native kernels may run.
        dropout: probability of dropout between layers, 0 outside training.
        recompute: ``"none"``, or ``"full"`` to keep no activations and compute them again in the
            backward pass.
        compute_dtype: of the recurrent matmul in the ``"triton"`` backend.
        precision: recurrent matmul precision of the ``"triton"`` backend, as the user gave it.
    """

    state_grad: bool = True
    native: bool = True
    dropout: float = 0.0
    recompute: str = "none"
    compute_dtype: torch.dtype = torch.float32
    precision: str = "auto"


class LayerRun(NamedTuple):
    """The result of one layer, in the backend's layout.

    Attributes:
        output: of every time step.
        states: after every time step; the first is ``output`` itself where they are equal.
        saves_output: whether the backward pass reads ``output``.
    """

    output: Tensor
    states: State
    saves_output: bool = False


class Batch(ABC):
    """A batch of sequences in the layout of one backend.

    Attributes:
        unpack_copies: whether :meth:`unpack` returns memory of its own.
    """

    unpack_copies = False

    @abstractmethod
    def pack(self, x: Tensor) -> Tensor:
        """Lay out ``x [B, T, F]``."""

    @abstractmethod
    def run_layer(self, weights: Any, x: Tensor, layer: int) -> LayerRun:
        """Run layer number ``layer`` over inputs in the backend's layout."""

    @abstractmethod
    def unpack(self, rows: Tensor) -> Tensor:
        """Return an output or state in the backend's layout as ``[B, T, F]``."""

    def unpack_output(self, last: LayerRun) -> Tensor:
        """Return the output ``[B, T, O]`` of the last layer, which callers may change in place."""
        y = self.unpack(last.output)
        if last.saves_output and y.requires_grad and not self.unpack_copies:
            return y.clone(memory_format=torch.contiguous_format)
        return y

    def unpack_states(self, runs: list[LayerRun], y: Tensor) -> State:
        """Return the states ``[B, T, L, H]``, in memory of their own.

        Args:
            runs: of every layer.
            y: the unpacked output of the last one.
        """
        states = []
        for entry in zip(*(run.states for run in runs), strict=True):
            last = entry[-1]
            is_output = last is runs[-1].output
            needs_copy = is_output or len(entry) > 1
            if not needs_copy and (self.unpack_copies or not last.requires_grad):
                states.append(self.unpack(last).unsqueeze(2))
                continue
            unpacked = [self.unpack(rows) for rows in entry[:-1]]
            unpacked.append(y if is_output else self.unpack(last))
            states.append(torch.stack(unpacked, dim=2))
        return tuple(states)


class DenseBatch(Batch):
    """A batch run in place, time first, with resets.

    Args:
        cell: the equations.
        reset_state: each ``[B, T, L, H]``.
        is_init: bool ``[B, T]``.
    """

    def __init__(self, cell: Cell, reset_state: State, is_init: Tensor) -> None:
        self.cell = cell
        self.reset = is_init.transpose(0, 1)
        self.reset_state = tuple(s.transpose(0, 1) for s in reset_state)

    def pack(self, x: Tensor) -> Tensor:
        """Return ``[T, B, F]``."""
        return x.transpose(0, 1)

    def unpack(self, rows: Tensor) -> Tensor:
        """Return ``[B, T, F]``."""
        return rows.transpose(0, 1)

    def reset_state_of(self, layer: int) -> State:
        """Return the states of one layer, each ``[T, B, H]``."""
        return tuple(s[:, :, layer] for s in self.reset_state)
