"""Recurrent modules of single cells, with the arguments that only those cells have."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch

from ..cells import FFM, LRU, S5, S6, Cell, Elman, MinGRU, MinLSTM, ResidualBlock
from ..checks import check_choice
from .cell_module import StackModule
from .recurrent import RecurrentModule
from .stacks import CellStack

_BLOCKS = ("plain", "residual")


class _CellModule(StackModule):
    """A module of one cell, which gets the arguments of its class; abstract."""

    cell_class: ClassVar[type[Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "cell_class" in vars(cls):
            documented: Any = cls
            documented.__signature__ = _find_signature(cls)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> None:
        cell = self._make_cell(arguments)
        sizes = (input_size, hidden_size, num_layers, bias, dropout)
        super().__init__(CellStack(cell, *sizes, device=device, dtype=dtype), **arguments)

    def _make_cell(self, arguments: dict[str, Any]) -> Cell:
        """Make the cell from its own arguments, which are taken out of the others."""
        own = inspect.signature(self.cell_class).parameters.keys() & arguments.keys()
        return self.cell_class(**{name: arguments.pop(name) for name in own})


class _LinearModule(_CellModule):
    """A module of one linear cell, inside the residual block or alone; abstract."""

    def _make_cell(self, arguments: dict[str, Any]) -> Cell:
        block = arguments.pop("block", "residual")
        check_choice("block", block, _BLOCKS)
        cell: Any = super()._make_cell(arguments)
        return ResidualBlock(cell) if block == "residual" else cell


def _find_signature(kind: type[_CellModule]) -> inspect.Signature:
    """Return the signature of a module's constructor, with every argument by its name."""
    sizes = list(inspect.signature(_CellModule.__init__).parameters.values())[1:-1]
    block = inspect.Parameter("block", inspect.Parameter.KEYWORD_ONLY, default="residual")
    others = [
        *([block] if issubclass(kind, _LinearModule) else []),
        *inspect.signature(kind.cell_class).parameters.values(),
        *list(inspect.signature(RecurrentModule.__init__).parameters.values())[2:],
    ]
    by_name = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in others]
    return inspect.Signature([*sizes, *by_name])


class RNNModule(_CellModule):
    """A simple recurrent network (Elman) whose state lives in the TensorDict.

    Equation and source are in :class:`rnnkeys.cells.Elman`. The ``state_dict`` of an ``nn.RNN`` of
    the same sizes loads into ``module.rnn``.

    Args:
        input_size: size ``I`` of the input's last dimension.
        hidden_size: size ``H`` of the hidden state.
        num_layers: number ``L`` of layers.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether layers have biases.
        dropout: probability of dropout between layers, in training.
        device: of the parameters.
        dtype: of the parameters.
        **arguments: keys, backend and modes, as for :class:`RecurrentModule`.

    Raises:
        ValueError: if arguments do not fit each other; the message names them.
        RuntimeError: if the backend cannot run here, with the reason and the one that can.

    Examples:
        >>> module = RNNModule(3, 5, in_key="observation", out_key="embed")
        >>> module.rnn.load_state_dict(torch.nn.RNN(3, 5).state_dict())
        <All keys matched successfully>
    """

    cell_class = Elman


class MinGRUModule(_LinearModule):
    """A minimal gated recurrent unit (minGRU) whose state lives in the TensorDict.

    Time runs as a parallel scan. Equation and source are in :class:`rnnkeys.cells.MinGRU`.

    Args:
        input_size: size ``I`` of the input's last dimension.
        hidden_size: size ``H`` of the hidden state.
        num_layers: number ``L`` of layers.
        bias: whether layers have biases.
        dropout: probability of dropout between layers, in training.
        block: ``"residual"`` puts every layer inside :class:`rnnkeys.cells.ResidualBlock`, without
            which a linear layer has no nonlinearity; ``"plain"`` is the cell alone.
        device: of the parameters.
        dtype: of the parameters.
        **arguments: keys, backend and modes, as for :class:`RecurrentModule`.

    Raises:
        ValueError: if arguments do not fit each other; the message names them.
        RuntimeError: if the backend cannot run here, with the reason and the one that can.

    Examples:
        >>> module = MinGRUModule(3, 5, in_key="observation", out_key="embed")
        >>> module.make_tensordict_primer().primers["recurrent_state"].shape
        torch.Size([1, 5])
    """

    cell_class = MinGRU


class MinLSTMModule(_LinearModule):
    """A minimal long short-term memory (minLSTM) whose state lives in the TensorDict.

    Time runs as a parallel scan. Equation and source are in :class:`rnnkeys.cells.MinLSTM`.

    Args:
        input_size: size ``I`` of the input's last dimension.
        hidden_size: size ``H`` of the hidden state.
        num_layers: number ``L`` of layers.
        bias: whether layers have biases.
        dropout: probability of dropout between layers, in training.
        block: ``"residual"`` puts every layer inside :class:`rnnkeys.cells.ResidualBlock`, without
            which a linear layer has no nonlinearity; ``"plain"`` is the cell alone.
        device: of the parameters.
        dtype: of the parameters.
        **arguments: keys, backend and modes, as for :class:`RecurrentModule`.

    Raises:
        ValueError: if arguments do not fit each other; the message names them.
        RuntimeError: if the backend cannot run here, with the reason and the one that can.

    Examples:
        >>> module = MinLSTMModule(3, 5, in_key="observation", out_key="embed")
        >>> module.state_sizes
        (5,)
    """

    cell_class = MinLSTM


class LRUModule(_LinearModule):
    """A linear recurrent unit (LRU) whose state lives in the TensorDict.

    Time runs as a parallel scan. Equation and source are in :class:`rnnkeys.cells.LRU`. The
    state is in pairs of real and imaginary part, ``2 H`` numbers.

    Args:
        input_size: size ``I`` of the input's last dimension.
        hidden_size: size ``H`` of the output, number of complex modes.
        num_layers: number ``L`` of layers.
        bias: whether layers have biases.
        dropout: probability of dropout between layers, in training.
        block: ``"residual"`` puts every layer inside :class:`rnnkeys.cells.ResidualBlock`, without
            which a linear layer has no nonlinearity; ``"plain"`` is the cell alone.
        min_radius: as for :class:`rnnkeys.cells.LRU`.
        max_radius: as for :class:`rnnkeys.cells.LRU`.
        max_phase: as for :class:`rnnkeys.cells.LRU`.
        device: of the parameters.
        dtype: of the parameters.
        **arguments: keys, backend and modes, as for :class:`RecurrentModule`.

    Raises:
        ValueError: if arguments do not fit each other; the message names them.
        RuntimeError: if the backend cannot run here, with the reason and the one that can.

    Examples:
        >>> slow = LRUModule(3, 5, min_radius=0.99, in_key="observation", out_key="embed")
        >>> slow.state_sizes
        (10,)
    """

    cell_class = LRU


class S5Module(_LinearModule):
    """A simplified state space layer (S5) whose state lives in the TensorDict.

    Time runs as a parallel scan. Equation and source are in :class:`rnnkeys.cells.S5`. The
    state is in pairs of real and imaginary part, ``H`` numbers.

    Args:
        input_size: size ``I`` of the input's last dimension.
        hidden_size: size ``H`` of the output and of the state; even.
        num_layers: number ``L`` of layers.
        bias: whether layers have biases.
        dropout: probability of dropout between layers, in training.
        block: ``"residual"`` puts every layer inside :class:`rnnkeys.cells.ResidualBlock`, without
            which a linear layer has no nonlinearity; ``"plain"`` is the cell alone.
        min_step: as for :class:`rnnkeys.cells.S5`.
        max_step: as for :class:`rnnkeys.cells.S5`.
        device: of the parameters.
        dtype: of the parameters.
        **arguments: keys, backend and modes, as for :class:`RecurrentModule`.

    Raises:
        ValueError: if arguments do not fit each other; the message names them.
        RuntimeError: if the backend cannot run here, with the reason and the one that can.

    Examples:
        >>> module = S5Module(3, 6, 2, in_key="observation", out_key="embed")
        >>> module.state_sizes
        (6,)
    """

    cell_class = S5


class FFMModule(_LinearModule):
    """Fast and forgetful memory (FFM) whose state lives in the TensorDict.

    Time runs as a parallel scan. Equation and source are in :class:`rnnkeys.cells.FFM`. The
    state is in pairs of real and imaginary part, ``2 H`` numbers if ``num_contexts`` divides ``H``.

    Args:
        input_size: size ``I`` of the input's last dimension.
        hidden_size: size ``H`` of the output.
        num_layers: number ``L`` of layers.
        bias: whether layers have biases.
        dropout: probability of dropout between layers, in training.
        block: ``"residual"`` puts every layer inside :class:`rnnkeys.cells.ResidualBlock`, without
            which a linear layer has no nonlinearity; ``"plain"`` is the cell alone.
        num_contexts: as for :class:`rnnkeys.cells.FFM`.
        max_period: as for :class:`rnnkeys.cells.FFM`.
        device: of the parameters.
        dtype: of the parameters.
        **arguments: keys, backend and modes, as for :class:`RecurrentModule`.

    Raises:
        ValueError: if arguments do not fit each other; the message names them.
        RuntimeError: if the backend cannot run here, with the reason and the one that can.

    Examples:
        >>> module = FFMModule(3, 8, max_period=100.0, in_key="observation", out_key="embed")
        >>> module.state_sizes
        (16,)
    """

    cell_class = FFM


class S6Module(_LinearModule):
    """A selective state space layer (S6, of Mamba) whose two states live in the TensorDict.

    Time runs as a parallel scan. Equation and source are in :class:`rnnkeys.cells.S6`. The
    states are ``h``, ``H state_size`` numbers, and ``window``, the last inputs of the convolution.

    Args:
        input_size: size ``I`` of the input's last dimension.
        hidden_size: size ``H`` of the output.
        num_layers: number ``L`` of layers.
        bias: whether layers have biases.
        dropout: probability of dropout between layers, in training.
        block: ``"residual"`` puts every layer inside :class:`rnnkeys.cells.ResidualBlock`, without
            which a linear layer has no nonlinearity; ``"plain"`` is the cell alone.
        state_size: as for :class:`rnnkeys.cells.S6`.
        window_len: as for :class:`rnnkeys.cells.S6`.
        min_step: as for :class:`rnnkeys.cells.S6`.
        max_step: as for :class:`rnnkeys.cells.S6`.
        device: of the parameters.
        dtype: of the parameters.
        **arguments: keys, backend and modes, as for :class:`RecurrentModule`.

    Raises:
        ValueError: if arguments do not fit each other; the message names them.
        RuntimeError: if the backend cannot run here, with the reason and the one that can.

    Examples:
        >>> module = S6Module(3, 8, state_size=4, in_key="observation", out_key="embed")
        >>> module.state_keys, module.state_sizes
        (('recurrent_state_h', 'recurrent_state_window'), (32, 24))
    """

    cell_class = S6
