"""Layers of cells for which torch has no class: this package's cells and users' modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..cells import Cell, State
from ..checks.arguments import as_float, as_int
from .arguments import MAX_SIZES
from .parameters import Layers, TorchLayers

# Backends choose kernels by these names.
_RESERVED_NAMES = ("lstm", "gru", "step")


class CellStack(nn.Module):
    """The parameters of ``L`` layers of a cell, named as in ``nn.RNNBase``: ``weight_ih_l0``, ...

    Args:
        cell: the equation.
        input_size: ``I``.
        hidden_size: ``H``.
        num_layers: ``L``.
        bias: whether layers have biases.
        dropout: probability of dropout between layers, in training.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if a size is not a positive int, or the cell's name is reserved.

    Examples:
        >>> from rnnkeys.cells import LAYER_NORM_LSTM_CELL
        >>> sorted(CellStack(LAYER_NORM_LSTM_CELL, 3, 5).state_dict())[:3]
        ['bias_ih_l0', 'norm_h_bias_l0', 'norm_h_weight_l0']
    """

    proj_size = 0

    def __init__(
        self,
        cell: Cell,
        input_size: int | None,
        hidden_size: int | None,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if cell.name in _RESERVED_NAMES:
            raise ValueError(
                f"A cell cannot have name={cell.name!r}: backends run another equation under that "
                f"name. Give {type(cell).__name__} a name of its own; for torch's LSTM and GRU use "
                "LSTMModule and GRUModule."
            )
        self.cell = cell
        self.mode = cell.name.upper()
        self.input_size = _as_size("input_size", input_size)
        self.hidden_size = _as_size("hidden_size", hidden_size)
        self.num_layers = _as_size("num_layers", num_layers)
        self.bias = bias
        self.dropout = as_float("dropout", dropout)
        # One tuple per layer: parameters can depend on the input size, which differs in layer 0.
        self.parameter_names: list[tuple[str, ...]] = []
        for layer in range(num_layers):
            width = self.hidden_size if layer else self.input_size
            shapes = cell.parameter_shapes(width, self.hidden_size, bias)
            self.parameter_names.append(tuple(shapes))
            for name, shape in shapes.items():
                values = torch.empty(shape, device=device, dtype=dtype)
                self.register_parameter(f"{name}_l{layer}", nn.Parameter(values))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize every parameter again."""
        for layer, names in enumerate(self.parameter_names):
            parameters = {name: getattr(self, f"{name}_l{layer}") for name in names}
            self.cell.reset_parameters(parameters, self.hidden_size)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.cell.name}, {self.input_size}, {self.hidden_size}, layers={self.num_layers}"


class CellLayers(Layers):
    """Reads a :class:`CellStack`."""

    module: CellStack

    def __init__(self, stack: CellStack) -> None:
        sizes = stack.cell.state_sizes(stack.hidden_size)
        super().__init__(stack, stack.cell, stack.input_size, sizes, stack.num_layers)

    @property
    def sample(self) -> Tensor:
        """A parameter."""
        return getattr(self.module, f"{self.module.parameter_names[0][0]}_l0")

    def weights(self, layer: int, dtype: torch.dtype | None = None) -> Any:
        """Return the parameters of one layer, cast to ``dtype`` if it is given."""
        names = self.module.parameter_names[layer]
        found: dict[str, Tensor] = {
            name: getattr(self.module, f"{name}_l{layer}") for name in names
        }
        if dtype is not None:
            found = {name: p.to(dtype) for name, p in found.items()}
        return self.cell.bind(found)


class StepCell(Cell):
    """Runs a module that maps ``(input, *state)`` to ``(output, *state)``."""

    name = "step"
    # A loss may swap the module's parameters before the backward pass.
    is_pure = False

    def __init__(self, state_names: tuple[str, ...]) -> None:
        self.state_names = state_names

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return no shapes: the module has its own parameters."""
        return {}

    def step(self, weights: Any, input_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Call the module."""
        # Copies: the module may change its states in place, which must not reach the caller's.
        output, *next_state = weights(input_t, *(s.clone() for s in state))
        return output, tuple(next_state)


class StepStack(nn.ModuleList):
    """Layers made of users' modules, each of which runs one time step.

    Args:
        modules: one for each layer, ``(input [N, I], *state [N, H]) -> (output [N, O], *state)``.
        input_size: ``I`` of the first; by default its attribute ``input_size``.
        state_sizes: size of each state by name, in order; by default the attribute ``state_sizes``.
        dropout: probability of dropout between layers, in training.

    Raises:
        ValueError: if sizes are missing, or if a trial step does not return a tuple of tensors of
            the expected shapes.
    """

    proj_size = 0

    def __init__(
        self,
        modules: Sequence[nn.Module],
        input_size: int | None = None,
        state_sizes: Mapping[str, int] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(modules)
        first = modules[0]
        name = type(first).__name__
        given = input_size if input_size is not None else getattr(first, "input_size", None)
        self.input_size = _as_size("input_size", given)
        sizes = state_sizes if state_sizes is not None else getattr(first, "state_sizes", None)
        if not isinstance(sizes, Mapping) or not sizes:
            raise ValueError(
                f"state_sizes of {name} must name at least one state with its size, such as "
                f"{{'h': 64}}. Got {sizes!r}: pass state_sizes=, or make it an attribute of the "
                "module."
            )
        for state, size in sizes.items():
            _as_size(f"state_sizes[{state!r}]", size, "hidden_size")
        self.state_sizes = {state: int(size) for state, size in sizes.items()}
        self.cell = StepCell(tuple(sizes))
        self.num_layers = len(modules)
        self.dropout = as_float("dropout", dropout)
        self.hidden_size = next(iter(self.state_sizes.values()))
        self.output_size = 0
        width = self.input_size
        for layer in range(self.num_layers):
            width = self._try_layer(layer, width)

    def _try_layer(self, layer: int, width: int) -> int:
        """Run one step of a copy, and return the size of its output."""
        # The trial must not change running statistics or the random state.
        module = copy.deepcopy(self[layer]).eval()
        sample = _sample(module)
        rows = 2
        x = sample.new_zeros(rows, width)
        states = [sample.new_zeros(rows, size) for size in self.state_sizes.values()]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = module(x, *states)
        expected = ["output [2, O]", *(f"{n} [2, {s}]" for n, s in self.state_sizes.items())]
        fits = (
            isinstance(result, tuple)
            and len(result) == len(expected)
            and all(isinstance(r, Tensor) for r in result)
            and result[0].shape[:-1] == (rows,)
            and all(r.shape == s.shape for r, s in zip(result[1:], states, strict=True))
        )
        if not fits:
            parts = result if isinstance(result, tuple) else [result]
            got = [tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__ for r in parts]
            raise ValueError(
                f"{type(module).__name__} (layer {layer}) must map (input, "
                f"{', '.join(self.state_sizes)}) to the tuple ({', '.join(expected)}). For an "
                f"input [2, {width}] it returned {got}."
            )
        if layer and result[0].shape[-1] != self.output_size:
            raise ValueError(
                f"Outputs of all layers must have one size: layer {layer} has "
                f"{result[0].shape[-1]}, those before {self.output_size}."
            )
        self.output_size = result[0].shape[-1]
        return self.output_size


class StepLayers(Layers):
    """Reads a :class:`StepStack`."""

    module: StepStack

    def __init__(self, stack: StepStack) -> None:
        sizes = tuple(stack.state_sizes.values())
        super().__init__(stack, stack.cell, stack.input_size, sizes, stack.num_layers)

    @property
    def sample(self) -> Tensor:
        """A parameter; a tensor in torch's default dtype if there is none."""
        return _sample(self.module)

    def weights(self, layer: int, dtype: torch.dtype | None = None) -> Callable[..., State]:
        """Return the module of one layer, with its parameters cast to ``dtype`` if it is given."""
        module = self.module[layer]
        if dtype is None:
            return module
        cast = {name: p.to(dtype) for name, p in module.named_parameters()}
        return lambda *inputs: functional_call(module, cast, inputs)


def read_layers(module: nn.Module) -> Layers:
    """Return the reader of layers.

    Raises:
        TypeError: if ``module`` does not hold layers.
    """
    if isinstance(module, CellStack):
        return CellLayers(module)
    if isinstance(module, StepStack):
        return StepLayers(module)
    if isinstance(module, nn.RNNBase):
        return TorchLayers(module)
    raise TypeError(f"Expected layers of a recurrent module. Got {type(module).__name__}.")


def _sample(module: nn.Module) -> Tensor:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter
    return torch.empty(0)


def _as_size(name: str, size: Any, limit: str | None = None) -> int:
    if size is None:
        raise ValueError(f"{name} must be passed, an int of at least 1. Got {name}=None.")
    return as_int(name, size, maximum=MAX_SIZES[limit or name])


def make_stack(
    cell: Any,
    input_size: int | None,
    hidden_size: int | None,
    state_sizes: Mapping[str, int] | None,
    **arguments: Any,
) -> nn.Module:
    """Make layers from a cell, a module of one step, or a list of such modules.

    Raises:
        TypeError: if ``cell`` is none of these.
        ValueError: if an argument does not apply to the kind of ``cell``.
    """
    if isinstance(cell, Cell):
        if state_sizes is not None:
            raise ValueError(
                f"state_sizes is for step modules. Got state_sizes={state_sizes!r} with the cell "
                f"{cell.name!r}, whose states have hidden_size."
            )
        return CellStack(cell, input_size, hidden_size, **arguments)
    modules = [cell] if isinstance(cell, nn.Module) else cell
    if (
        not isinstance(modules, (list, tuple))
        or not modules
        or not all(isinstance(m, nn.Module) for m in modules)
        or any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) for m in modules)
    ):
        raise TypeError(
            "CellModule runs a rnnkeys.cells.Cell, or an nn.Module (or a list of them, one "
            "for each layer) that maps (input, *state) of one step to (output, *state). Got "
            f"{cell!r}; torch's LSTM and GRU are LSTMModule and GRUModule."
        )
    dropout = arguments.pop("dropout", 0.0)
    given = {"hidden_size": hidden_size, **arguments}
    defaults = {"num_layers": 1, "bias": True}
    for name, value in given.items():
        if value != defaults.get(name):
            raise ValueError(
                f"{name}={value!r} is for cells: a step module has its own sizes, biases, device "
                "and dtype, and several layers are a list of modules."
            )
    return StepStack(modules, input_size, state_sizes, dropout)
