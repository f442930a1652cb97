"""The recurrent module: reads its state from a TensorDict, writes the next one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.compiler import is_compiling
from torchrl.envs.transforms import TensorDictPrimer

from .._compat import in_transform
from ..backends import BACKENDS, Options, unroll_layers, why_not
from ..backends.step import run_step
from ..cells import Cell
from ..mode import as_mode, recurrent_mode
from ..precision import validate_recurrent_matmul_precision
from . import entries
from .arguments import check_choice, check_floating_dtype, check_kind
from .canonical import CanonicalKeys
from .primers import make_primer
from .stacks import CellStack, StepStack, make_stack, read_layers

_STORES = ("all", "starts")
_RECOMPUTES = ("none", "full")


class RecurrentModule(CanonicalKeys, TensorDictModuleBase):
    """A recurrent layer stack that reads its state from a TensorDict and writes the next one.

    In single-step mode a call is one step: the state stored at the root is read (zeros where
    ``init_key``), and the output and ``("next", state)`` are written. In recurrent mode (see
    ``set_recurrent_mode``) time is the last batch dimension and a call runs whole sequences: each
    segment starts from the state stored at its first step, and ``("next", state)`` holds the state
    after *every* step. Dimensions between the batch and the features (agents) are batch too.

    It runs a cell of your own; see ``docs/custom_cells.md``. ``LSTMModule`` and ``GRUModule`` are
    this with torch's cells, and say what the other arguments are.

    Args:
        cell: a ``rnnkeys.cells.Cell``, or an ``nn.Module`` that maps ``(input, *state)`` of one
            step to the tuple ``(output, *state)``, or a list of such modules, one for each layer.
        input_size: size ``I`` of the input; a module may have it as an attribute.
        hidden_size: size ``H`` of a cell's states.
        num_layers: number ``L`` of layers of a cell.
        bias: whether the layers of a cell have biases.
        dropout: probability of dropout between layers, in training.
        state_sizes: of a module: size of each state by name, in order; or its attribute.
        recurrent_backend: ``"auto"``, ``"pad"``, ``"scan"`` or ``"loop"``.
        recurrent_compute_dtype: as for ``LSTMModule``.
        recurrent_recompute: as for ``LSTMModule``; of cells only.
        recurrent_matmul_precision: as for ``LSTMModule``.
        in_key: key of the input. States are then read at ``"recurrent_state"`` if there is one, or
            else ``"recurrent_state_<name>"``.
        in_keys: keys of the input and the states; optionally the init key last.
        out_key: key of the output; states are then written at ``("next", <in key>)``.
        out_keys: keys of the output and the states.
        device: of a cell's parameters.
        dtype: of a cell's parameters.
        default_recurrent_mode: as for ``LSTMModule``.
        init_key: as for ``LSTMModule``.
        state_grad: as for ``LSTMModule``.
        store_states: as for ``LSTMModule``.

    Raises:
        TypeError: if ``cell`` is nothing that can run.
        ValueError: if arguments do not fit each other; the message names them.
        RuntimeError: if the backend cannot run here, with the reason and the one that can.

    Examples:
        >>> from rnnkeys.cells import LAYER_NORM_LSTM_CELL
        >>> module = RecurrentModule(LAYER_NORM_LSTM_CELL, 3, 5, in_key="observation", out_key="y")
        >>> module.in_keys
        ['observation', 'recurrent_state_h', 'recurrent_state_c', 'is_init']
    """

    cell: Cell
    rnn_attribute: ClassVar[str] = "rnn"
    plain_class: ClassVar[type[nn.RNNBase]] = nn.RNNBase
    vendor_class: ClassVar[type[nn.RNNBase]] = nn.RNNBase
    DEFAULT_IN_KEYS: list[NestedKey]
    DEFAULT_OUT_KEYS: list[NestedKey]

    def __init__(
        self,
        cell: Cell | nn.Module | Sequence[nn.Module],
        input_size: int | None = None,
        hidden_size: int | None = None,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        state_sizes: Mapping[str, int] | None = None,
        recurrent_backend: str = "auto",
        recurrent_compute_dtype: torch.dtype = torch.float32,
        recurrent_recompute: str = "none",
        recurrent_matmul_precision: str = "auto",
        *,
        in_key: NestedKey | None = None,
        in_keys: Sequence[NestedKey] | None = None,
        out_key: NestedKey | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        default_recurrent_mode: bool | None = None,
        init_key: NestedKey | None = None,
        state_grad: bool = False,
        store_states: str = "all",
    ) -> None:
        super().__init__()
        layers: nn.Module
        if isinstance(cell, nn.RNNBase) and self.rnn_attribute != "rnn":
            layers = cell
        else:
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
            self._name_states(layers)
        check_choice("recurrent_recompute", recurrent_recompute, _RECOMPUTES)
        check_choice("store_states", store_states, _STORES)
        check_floating_dtype("recurrent_compute_dtype", recurrent_compute_dtype)
        validate_recurrent_matmul_precision(recurrent_matmul_precision)
        name = str(type(self).__name__)
        ins = entries.join_keys("in", in_key, in_keys, self.DEFAULT_IN_KEYS)
        outs = entries.join_keys("out", out_key, out_keys, self.DEFAULT_OUT_KEYS)
        ins, self._init_key = entries.split_init_key(name, ins, init_key, self.cell)
        entries.check_out_keys(name, outs, self.cell)
        setattr(self, self.rnn_attribute, layers)
        # tensordict's own annotations of keys know no nesting.
        self.in_keys = [  # pyright: ignore[reportAttributeAccessIssue]
            *ins,
            # A cell without state starts no episode.
            *[self._init_key][: len(self.cell.state_names)],
        ]
        self.out_keys = outs  # pyright: ignore[reportAttributeAccessIssue]
        self._recurrent_mode = as_mode(default_recurrent_mode, "default_recurrent_mode")
        self.recurrent_backend = recurrent_backend
        self.recurrent_compute_dtype = recurrent_compute_dtype
        self.recurrent_recompute = recurrent_recompute
        self.recurrent_matmul_precision = recurrent_matmul_precision
        self.state_grad = state_grad
        self.store_states = store_states
        self._warned_of_missing_state = self._warned_of_hooks = False
        obstacle = why_not(
            recurrent_backend,
            self.cell,
            self._layers.weights(0),
            recurrent_recompute,
            recurrent_compute_dtype,
        )
        if obstacle:
            raise obstacle

    def _name_states(self, layers: Any) -> None:
        self.cell = layers.cell
        names = self.cell.state_names
        keys = [f"recurrent_state_{name}" for name in names]
        keys = ["recurrent_state"] if len(names) == 1 else keys
        self.DEFAULT_IN_KEYS, self.DEFAULT_OUT_KEYS = [*keys], [("next", key) for key in keys]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "in_keys":
            self._check_in_keys(value)
        elif name == "out_keys":
            keys = entries.join_keys("out", None, value, [])
            entries.check_out_keys(str(type(self).__name__), keys, self.cell)
        elif name == "recurrent_backend":
            check_choice(name, value, BACKENDS)
        elif name == self.rnn_attribute:
            self._look_at(value)
        super().__setattr__(name, value)

    def _check_in_keys(self, keys: Sequence[NestedKey]) -> None:
        # Keys behind the init key are not read here; a loss may be told of them by in_keys.
        keys, number = entries.join_keys("in", None, keys, []), 1 + len(self.cell.state_names)
        entries.check_in_keys(str(type(self).__name__), keys[:number], self.cell)
        if len(keys) > number:
            self._init_key = keys[number]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._look_at(self.layers)

    def _look_at(self, layers: Any) -> None:
        if self.rnn_attribute != "rnn":
            check_kind(self.rnn_attribute, layers, self.cell.name.upper())
        elif not isinstance(layers, (CellStack, StepStack)):
            raise ValueError(
                f"rnn must be layers as {type(self).__name__} makes them. Got "
                f"{type(layers).__name__}; for other layers make another module."
            )
        self._layers = read_layers(layers)
        self._has_vendor_layers = isinstance(layers, self.vendor_class)

    def _look_again(self) -> None:
        """Notice layers that came another way than by assignment, and hooks on them."""
        layers: Any = self._modules[self.rnn_attribute]
        if layers is not self._layers.module:
            self._look_at(layers)
        if (layers._forward_hooks or layers._backward_hooks) and not self._warned_of_hooks:
            self._warned_of_hooks = True
            warnings.warn(
                f"Hooks on {self.rnn_attribute} of {type(self).__name__} do not run: its "
                "parameters are read, and it is never called. Register them on the "
                f"{type(self).__name__}.",
                stacklevel=4,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_layers"}

    @property
    def layers(self) -> Any:
        """The ``nn.RNNBase``, or stack of cells, that holds the parameters."""
        return getattr(self, self.rnn_attribute)

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Size of the last dimension of each state entry."""
        return self._layers.state_sizes

    @property
    def state_keys(self) -> tuple[NestedKey, ...]:
        """Keys the states are read from, in the order of the cell's ``state_names``."""
        return tuple(self.in_keys[1 : 1 + len(self.cell.state_names)])

    @property
    def init_key(self) -> NestedKey:
        """Key of the marks of first steps: the one of ``in_keys`` behind those of the states."""
        keys, number = self.in_keys, 1 + len(self.cell.state_names)
        return keys[number] if len(keys) > number else self._init_key

    @property
    def recurrent_mode(self) -> bool:
        """Whether a call now runs whole sequences."""
        mode = recurrent_mode()
        return bool(self._recurrent_mode) if mode is None else mode

    @recurrent_mode.setter
    def recurrent_mode(self, value: bool) -> None:
        raise RuntimeError(
            "recurrent_mode cannot be changed in-place. Please use the set_recurrent_mode context "
            "manager."
        )

    @property
    def temporal_mode(self) -> bool:
        """Removed: use ``recurrent_mode``."""
        raise RuntimeError("temporal_mode is deprecated, use recurrent_mode instead.")

    def set_recurrent_mode(self, mode: bool = True) -> None:
        """Raise: use the context manager ``rnnkeys.set_recurrent_mode``."""
        raise RuntimeError(
            f"The {self.rnn_attribute}.set_recurrent_mode() API was removed. Use the context "
            "manager rnnkeys.set_recurrent_mode(...), or the default_recurrent_mode argument of "
            "the constructor."
        )

    def make_python_based(self) -> RecurrentModule:
        """Hold the same parameters in the plain twin of the layers; returns self."""
        return self._convert(self.plain_class)

    def make_cudnn_based(self) -> RecurrentModule:
        """Hold the same parameters in torch's own class; returns self."""
        return self._convert(self.vendor_class)

    def _convert(self, to: type[nn.RNNBase]) -> RecurrentModule:
        old = self.layers
        # A stack of cells is plain already.
        if isinstance(old, to) or not isinstance(old, nn.RNNBase):
            return self
        sizes: dict[str, Any] = {"proj_size": old.proj_size} if old.proj_size else {}
        new = to(
            input_size=old.input_size,
            hidden_size=old.hidden_size,
            num_layers=old.num_layers,
            bias=old.bias,
            batch_first=True,
            dropout=old.dropout,
            device="meta",
            **sizes,
        )
        for name, parameter in old.named_parameters():
            setattr(new, name, parameter)
        new.train(old.training)
        setattr(self, self.rnn_attribute, new)
        return self

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Make the transform that creates this module's state at every reset of an environment.

        States are zeros of shape ``[L, H]``, in the dtype and on the device of the parameters.
        Dimensions of agents come from the environment's own nested spec. It may be appended to
        single environments or to a batch of them.

        Returns:
            A ``TensorDictPrimer``.

        Raises:
            RuntimeError: if an out key is not ``("next", <in key>)``, so that no environment would
                carry the state.

        Examples:
            >>> from rnnkeys import GRUModule
            >>> gru = GRUModule(3, 5, in_key="observation", out_key="embed")
            >>> gru.make_tensordict_primer().primers["recurrent_state"].shape
            torch.Size([1, 5])
        """
        entries.check_carried(self.state_keys, self.out_keys_source[1:])
        weight = self._layers.sample
        shapes = {
            key: (self._layers.num_layers, size)
            for key, size in zip(self.state_keys, self.state_sizes, strict=True)
        }
        return make_primer(
            shapes, dtype=weight.dtype, device=None if weight.is_meta else weight.device
        )

    # tensordict types dispatch as a class, which it is not once it has decorated.
    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, tensordict: TensorDictBase
    ) -> TensorDictBase:
        """Run one step, or whole sequences in recurrent mode.

        Args:
            tensordict: with the entries ``in_keys``. State entries may be missing and then count as
                zeros.

        Returns:
            The same TensorDict with the entries ``out_keys`` written. If an error is raised,
            nothing was written.

        Raises:
            KeyError: if the input or the init key is missing.
            RuntimeError: if a state is given and another is not, or if a shape or dtype does not
                fit.
            ValueError: in recurrent mode, if there is no time dimension.
        """
        if not is_compiling():
            self._look_again()
        if self.recurrent_mode and self.cell.state_names:
            y, states = self._run_sequences(tensordict)
        else:
            y, states = self._run_step(tensordict)
        # select_out_keys() shortens out_keys; what is written stays.
        for key, entry in zip(self.out_keys_source, (y, *states), strict=True):
            tensordict.set(key, entry)
        return tensordict

    def _run_sequences(self, tensordict: TensorDictBase) -> tuple[Tensor, tuple[Tensor, ...]]:
        lead = tensordict.batch_size
        if not lead:
            raise ValueError(
                f"{type(self).__name__} in recurrent mode needs a time dimension: the last batch "
                "dimension of its TensorDict. Got a TensorDict of batch size []. For one step use "
                "set_recurrent_mode(False)."
            )
        entries.check_time_is_last(tensordict)
        data = entries.read(self, tensordict)
        entries.check_trajectories(tensordict, data.is_init, self.init_key)
        dtype = entries.compute_dtype(data.x, self._layers.sample)
        x, states, is_init = entries.time_second(data, lead, self, dtype)
        with entries.no_autocast(x):
            y, after = unroll_layers(
                self.cell,
                self._weights(dtype),
                x,
                states,
                is_init,
                self._options(),
                # Without data there are no marks to plan by.
                self.recurrent_backend if entries.has_data(x) else "scan",
            )
        shape = data.shape
        restored = tuple(entries.time_last(s, lead, shape) for s in after)
        return entries.time_last(y, lead, shape), self._stored(restored)

    def _run_step(self, tensordict: TensorDictBase) -> tuple[Tensor, tuple[Tensor, ...]]:
        data = entries.read(self, tensordict)
        if data.states is None and self.cell.state_names:
            self._warn_of_missing_state(data.is_init)
        dtype = entries.compute_dtype(data.x, self._layers.sample)
        x, states = entries.flat_step(data, self, dtype)
        layers = self._weights(dtype)
        vendor = self._has_vendor_layers and not (is_compiling() or in_transform())
        with entries.no_autocast(x):
            y, after = run_step(self.cell, layers, x, states, self._layers.dropout, vendor)
        shape = data.shape
        y = y.view(*shape, y.shape[-1])
        return y, self._stored(tuple(s.view(*shape, *s.shape[1:]) for s in after))

    def _stored(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """States as they are written: in the parameters' dtype, which is the primer's."""
        dtype = self._layers.sample.dtype
        return tuple(entries.as_dtype(s, dtype) for s in states)

    def _weights(self, dtype: torch.dtype) -> list[Any]:
        return [self._layers.weights(i, dtype) for i in range(self._layers.num_layers)]

    def _options(self) -> Options:
        return Options(
            state_grad=self.state_grad,
            only_starts=self.store_states == "starts",
            # Of a stack of cells "auto" packs the steps; no kernel knows its equation.
            vendor=self._has_vendor_layers or not isinstance(self.layers, nn.RNNBase),
            dropout=self._layers.dropout,
            recompute=self.recurrent_recompute,
            compute_dtype=self.recurrent_compute_dtype,
            precision=self.recurrent_matmul_precision,
        )

    def _warn_of_missing_state(self, is_init: Tensor) -> None:
        if self._warned_of_missing_state or is_compiling() or in_transform():
            return
        if not entries.has_data(is_init) or _is_capturing(is_init):
            return
        if not bool(is_init.all()):
            self._warned_of_missing_state = True
            warnings.warn(
                f"{type(self).__name__} finds no state {list(self.state_keys)} in a step that "
                "does not start an episode, and starts from zeros: memory is lost at every step. "
                "Append the primer to the environment: "
                "env = env.append_transform(get_primers_from_module(policy)).",
                stacklevel=4,
            )


def _is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is captured, in which no value may be looked at."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
