"""A recurrent module for any cell: of this package, or of the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..cells import Cell
from .arguments import drop_torch_arguments
from .recurrent import RecurrentModule
from .stacks import CellStack, StepStack, make_stack


class StackModule(RecurrentModule):
    """A recurrent module whose layers are cells or modules of one step; abstract."""

    layers_name = "rnn"

    def __init__(self, layers: nn.Module, **arguments: Any) -> None:
        super().__init__(layers, **drop_torch_arguments(type(self).__name__, arguments))

    def _check_layers(self, layers: Any) -> None:
        if not isinstance(layers, (CellStack, StepStack)):
            raise ValueError(
                f"{self.layers_name} must be layers as CellModule makes them. Got "
                f"{type(layers).__name__}; for other layers make another module."
            )

    def _is_python_based(self, layers: Any) -> bool:
        return False


class CellModule(StackModule):
    """A recurrent module that runs any cell; see ``docs/custom_cells.md``.

    Args:
        cell: a ``rnnkeys.cells.Cell``, or an ``nn.Module`` that maps ``(input, *state)`` of one
            time step to the tuple ``(output, *state)``, or a list of such modules, one for each
            layer.
        input_size: size ``I`` of the input; a module may have it as an attribute.
        hidden_size: size ``H`` of a cell's states.
        num_layers: number ``L`` of layers of a cell.
        bias: whether the layers of a cell have biases.
        dropout: probability of dropout between layers, in training.
        state_sizes: of a module: size of each state by name, in order; or its attribute.
        device: of a cell's parameters.
        dtype: of a cell's parameters.
        **arguments: keys, backend and modes, as for :class:`RecurrentModule`.

    Raises:
        TypeError: if ``cell`` is neither a cell nor a module of one time step.
        ValueError: if arguments do not fit each other; the message names them.
        RuntimeError: if the backend cannot run here, with the reason and the one that can.

    Examples:
        >>> from rnnkeys.cells import LAYER_NORM_LSTM_CELL
        >>> module = CellModule(LAYER_NORM_LSTM_CELL, 3, 5, in_key="observation", out_key="y")
        >>> module.in_keys
        ['observation', 'recurrent_state_h', 'recurrent_state_c', 'is_init']
    """

    def __init__(
        self,
        cell: Cell | nn.Module | Sequence[nn.Module],
        input_size: int | None = None,
        hidden_size: int | None = None,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        state_sizes: Mapping[str, int] | None = None,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> None:
        layers = make_stack(
            cell,
            input_size,
            hidden_size,
            state_sizes,
            num_layers=num_layers,
            bias=bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        super().__init__(layers, **arguments)
