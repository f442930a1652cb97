"""The abstract recurrent module: reads its state from a TensorDict, writes the next one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.compiler import is_compiling
from torchrl.envs.transforms import TensorDictPrimer
from torchrl.modules import canonicalize_rnn_subset

from .._compat import has_data, in_backward, in_transform
from ..backends import BACKENDS, Options, unroll_layers, why_not
from ..backends.step import run_step
from ..cells import Cell
from ..checks import check_choice, warn_caller
from ..mode import as_mode, recurrent_mode
from ..precision import validate_recurrent_matmul_precision
from . import entries, key_arguments
from .arguments import check_floating_dtype
from .dispatch import dispatch_tensors
from .dtypes import as_dtype, choose_dtype, is_autocast, no_autocast
from .primers import make_primer
from .stacks import read_layers

_RECOMPUTES = ("none", "full")


class RecurrentModule(TensorDictModuleBase, ABC):
    """A recurrent layer stack that reads its state from a TensorDict and writes the next one.

    In single-step mode a call is one time step: the state at the root is read (zeros where
    ``is_init``), and the output and ``("next", state)`` are written. In recurrent mode (see
    :class:`rnnkeys.set_recurrent_mode`) time is the last batch dimension and a call runs whole
    sequences: each segment starts from the state stored at its first step, and ``("next", state)``
    holds the state after *every* step. Dimensions between the batch and the features, such as
    agents, are treated as batch.

    This class is abstract: use :class:`rnnkeys.LSTMModule`, :class:`rnnkeys.GRUModule`, or
    :class:`rnnkeys.CellModule` for any other cell. All of them take the arguments below as
    keywords.

    Args:
        layers: the module that holds the parameters: an ``nn.LSTM``, an ``nn.GRU``, or a stack of
            cells.
        in_key: key of the input. The states are then read at the keys that ``state_key`` gives.
        in_keys: keys of the input and of every state; optionally the init key last.
        out_key: key of the output. The next states are then written at ``("next", <in key>)``.
        out_keys: keys of the output and of every next state. Environments carry a state to the next
            step only if it is written at ``("next", <in key>)``.
        init_key: key of the ``is_init`` flags, of any name and depth; ``"is_init"`` by default.
            Flags are bool ``[*batch, 1]``, or per agent ``[*batch, *agents, 1]``.
        default_recurrent_mode: mode where ``set_recurrent_mode`` is not in force; False by default.
        recurrent_backend: ``"auto"``, ``"pad"``, ``"scan"``, ``"loop"`` or ``"triton"``; see
            ``rnnkeys.backends``.
        recurrent_compute_dtype: dtype of the recurrent matmul in the ``"triton"`` backend.
        recurrent_recompute: ``"full"`` keeps no activations for the backward pass and computes them
            again (``"scan"``, ``"loop"`` and ``"triton"``).
        recurrent_matmul_precision: of the ``"triton"`` backend; see ``rnnkeys.precision``.
        state_grad: whether states written in recurrent mode keep their gradient. False by default,
            so that no gradient reaches a target through a stored state.
        state_key: key of the state, ``"recurrent_state"`` by default. A cell with several states
            has one entry for each: ``"<state_key>_<name>"``, such as ``"recurrent_state_h"``. Two
            networks in one TensorDict need different keys.

    Raises:
        ValueError: if arguments do not fit each other; the message names them.
        RuntimeError: if the backend cannot run here, with the reason and the one that can.
    """

    layers_name: ClassVar[str]

    def __init__(
        self,
        layers: nn.Module,
        *,
        in_key: NestedKey | None = None,
        in_keys: Sequence[NestedKey] | None = None,
        out_key: NestedKey | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        init_key: NestedKey | None = None,
        default_recurrent_mode: bool | None = None,
        recurrent_backend: str = "auto",
        recurrent_compute_dtype: torch.dtype = torch.float32,
        recurrent_recompute: str = "none",
        recurrent_matmul_precision: str = "auto",
        state_grad: bool = False,
        state_key: NestedKey | None = None,
    ) -> None:
        super().__init__()
        check_choice("recurrent_recompute", recurrent_recompute, _RECOMPUTES)
        check_floating_dtype("recurrent_compute_dtype", recurrent_compute_dtype)
        validate_recurrent_matmul_precision(recurrent_matmul_precision)
        self._use_layers(layers)
        self._set_keys(in_key, in_keys, out_key, out_keys, init_key, state_key)
        self._recurrent_mode = as_mode(default_recurrent_mode, "default_recurrent_mode")
        self.recurrent_backend = recurrent_backend
        self.recurrent_compute_dtype = recurrent_compute_dtype
        self.recurrent_recompute = recurrent_recompute
        self.recurrent_matmul_precision = recurrent_matmul_precision
        self.state_grad = state_grad
        self._warned_of_missing_state = False
        self._warned_of_hooks = False
        obstacle = why_not(
            recurrent_backend,
            self.cell,
            self._layers.weights(0),
            recurrent_recompute,
            recurrent_compute_dtype,
        )
        if obstacle:
            raise obstacle

    @abstractmethod
    def _check_layers(self, layers: Any) -> None:
        """Raise ValueError unless this class can run the layers."""

    @abstractmethod
    def _is_python_based(self, layers: Any) -> bool:
        """Return whether the layers ask for plain PyTorch operations and no native kernel."""

    def _use_layers(self, layers: Any) -> None:
        """Check layers and hold them."""
        self._check_layers(layers)
        self._layers = read_layers(layers)
        self._python_based = self._is_python_based(layers)
        super().__setattr__(self.layers_name, layers)

    def _set_keys(
        self,
        in_key: NestedKey | None,
        in_keys: Sequence[NestedKey] | None,
        out_key: NestedKey | None,
        out_keys: Sequence[NestedKey] | None,
        init_key: NestedKey | None,
        state_key: NestedKey | None,
    ) -> None:
        owner = type(self).__name__
        names = self.cell.state_names
        key_arguments.check_state_key(state_key, in_keys, out_keys)
        states = key_arguments.make_state_keys(
            key_arguments.DEFAULT_STATE_KEY if state_key is None else state_key, names
        )
        ins = key_arguments.join_keys("in", in_key, in_keys, states)
        outs: Any = key_arguments.join_keys(
            "out", out_key, out_keys, [("next", key) for key in states]
        )
        read: Any
        read, self._init_key = key_arguments.split_init_key(owner, ins, init_key, names)
        self.in_keys = read
        self.out_keys = outs

    def __setattr__(self, name: str, value: Any) -> None:
        if name == self.layers_name:
            self._use_layers(value)
            return
        if name == "in_keys":
            value = self._complete_in_keys(value)
        elif name == "out_keys":
            keys = key_arguments.join_keys("out", None, value, [])
            key_arguments.check_keys(type(self).__name__, "out", keys, self.cell.state_names)
        elif name == "recurrent_backend":
            check_choice(name, value, BACKENDS)
        super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a submodule; layers are checked and used, as after an assignment."""
        if name == self.layers_name:
            self._use_layers(module)
        else:
            super().add_module(name, module)

    def _complete_in_keys(self, keys: Sequence[NestedKey]) -> Sequence[NestedKey]:
        """Check keys and append the init key if it is not there.

        Keys after the init key are not read; in_keys may name them to a loss.
        """
        names = self.cell.state_names
        number = 1 + len(names)
        given = key_arguments.join_keys("in", None, keys, [])
        key_arguments.check_keys(type(self).__name__, "in", given[:number], names)
        needs_init = bool(names) and len(given) == number
        return [*given, self._init_key] if needs_init else keys

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_layers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._use_layers(self.layers)

    def _notice_changed_layers(self) -> None:
        """Use layers that were replaced without an assignment, and warn of hooks on them."""
        layers: Any = self._modules[self.layers_name]
        if layers is not self._layers.module:
            self._use_layers(layers)
        if not self._warned_of_hooks and self._layers.has_ignored_hooks:
            self._warned_of_hooks = True
            warn_caller(
                f"Hooks on {self.layers_name} of {type(self).__name__} do not run: its parameters "
                f"are read, and it is never called. Register them on the {type(self).__name__}."
            )

    def _check_mode_in_backward(self) -> None:
        """Raise if ``torch.utils.checkpoint`` runs a forward again without its mode."""
        if in_backward() and recurrent_mode() is None and self._recurrent_mode is None:
            raise RuntimeError(
                f"{type(self).__name__} runs inside a backward pass and no recurrent mode is set, "
                "although its first run may have had one: torch.utils.checkpoint does not restore "
                "the mode. Enter the mode inside the checkpointed function, for example by the "
                "decorator @set_recurrent_mode(True), or use recurrent_recompute='full'."
            )

    @property
    def cell(self) -> Cell:
        """The equations of one time step."""
        return self._layers.cell

    @property
    def layers(self) -> Any:
        """The module that holds the parameters."""
        return getattr(self, self.layers_name)

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Size of the last dimension of each state."""
        return self._layers.state_sizes

    @property
    def state_keys(self) -> tuple[NestedKey, ...]:
        """Keys that the states are read from, in the order of the cell's ``state_names``."""
        return tuple(self.in_keys[1 : 1 + len(self.cell.state_names)])

    @property
    def init_key(self) -> NestedKey:
        """Key of the ``is_init`` flags: the one after the states in ``in_keys``."""
        number = 1 + len(self.cell.state_names)
        return self.in_keys[number] if len(self.in_keys) > number else self._init_key

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

    def set_recurrent_mode(self, mode: bool = True) -> None:
        """Raise: use the context manager ``rnnkeys.set_recurrent_mode``."""
        raise RuntimeError(
            f"The {self.layers_name}.set_recurrent_mode() API was removed. Use the context "
            "manager rnnkeys.set_recurrent_mode(...), or the default_recurrent_mode argument of "
            "the constructor."
        )

    @property
    def canonical_keys(self) -> list[NestedKey]:
        """Keys that the module reads and writes; other entries may keep any memory layout."""
        return [*self.in_keys, *self.out_keys]

    def canonicalize(self, data: TensorDictBase, *, inplace: bool = False) -> TensorDictBase:
        """Give the module's entries row-major strides, as ``canonicalize_rnn_subset`` does.

        Args:
            data: any batch; entries that are missing are skipped.
            inplace: whether to replace the entries of ``data`` itself.

        Returns:
            ``data`` if ``inplace``, else a shallow copy.

        Examples:
            >>> from tensordict import TensorDict
            >>> from rnnkeys import GRUModule
            >>> module = GRUModule(3, 4, in_key="obs", out_key="embed")
            >>> data = TensorDict(obs=torch.zeros(5, 2, 3).transpose(0, 1), batch_size=[2, 5])
            >>> module.canonicalize(data)["obs"].is_contiguous()
            True
        """
        modules: Any = [self]
        return canonicalize_rnn_subset(data, modules, inplace=inplace)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Make the transform that creates this module's state at every reset of an environment.

        States are zeros ``[L, H]``, in the dtype and on the device of the parameters. Dimensions of
        agents come from the environment's own nested spec. The transform may be appended to single
        environments or to a batch of them.

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
        key_arguments.check_carried(self.state_keys, self.out_keys_source[1:])
        parameter = self._layers.sample
        shapes = {
            key: (self._layers.num_layers, size)
            for key, size in zip(self.state_keys, self.state_sizes, strict=True)
        }
        device = None if parameter.is_meta else parameter.device
        return make_primer(shapes, dtype=parameter.dtype, device=device)

    @dispatch_tensors
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run one time step, or whole sequences in recurrent mode.

        Args:
            tensordict: with the entries ``in_keys``. State entries may be missing and then count as
                zeros.

        Returns:
            The same TensorDict with the entries ``out_keys`` written. If an error is raised,
            nothing was written.

        Raises:
            KeyError: if the input or the init key is missing.
            TypeError: if the ``is_init`` flags are not bool.
            RuntimeError: if a state is given and another is not, or if a shape or dtype does not
                fit.
            ValueError: in recurrent mode, if there is no time dimension.
        """
        if not is_compiling():
            self._notice_changed_layers()
            self._check_mode_in_backward()
        # Without a state there is no recurrence over time.
        if self.recurrent_mode and self.cell.state_names:
            y, states = self._run_sequences(tensordict)
        else:
            y, states = self._run_step(tensordict)
        # select_out_keys() shortens out_keys; all entries are written nevertheless.
        for key, entry in zip(self.out_keys_source, (y, *states), strict=True):
            tensordict.set(key, entry)
        return tensordict

    def _run_sequences(self, tensordict: TensorDictBase) -> tuple[Tensor, list[Tensor]]:
        lead = tensordict.batch_size
        if not lead:
            raise ValueError(
                f"{type(self).__name__} in recurrent mode needs a time dimension: the last batch "
                "dimension of its TensorDict. Got a TensorDict of batch size []. For one step use "
                "set_recurrent_mode(False)."
            )
        entries.check_time_is_last(tensordict)
        spec = self._entry_spec()
        data = entries.read(spec, tensordict, sequences=True)
        entries.check_continuity(spec, tensordict, data.shape)
        self._check_device(data.x)
        own_dtype = self._layers.sample.dtype
        autocast = is_autocast(data.x)
        dtype = choose_dtype(data.x, own_dtype, autocast)
        x, states, is_init = entries.fold_sequences(spec, data, lead, dtype)
        with no_autocast(x) if autocast else nullcontext():
            y, after = unroll_layers(
                self.cell,
                self._weights(own_dtype, dtype),
                x,
                states,
                is_init,
                self._options(),
                # Packing reads the flags, which have no values without data.
                self.recurrent_backend if has_data(x) else "scan",
            )
        shape = data.shape
        # Stored in the dtype of the parameters, in which the primer makes them.
        states = [entries.unfold_sequences(s, lead, shape) for s in after]
        return entries.unfold_sequences(y, lead, shape), [as_dtype(s, own_dtype) for s in states]

    def _run_step(self, tensordict: TensorDictBase) -> tuple[Tensor, list[Tensor]]:
        spec = self._entry_spec()
        data = entries.read(spec, tensordict, sequences=False)
        if data.states is None:
            self._warn_of_missing_state(data.is_init)
        self._check_device(data.x)
        layers = self._layers
        own_dtype = layers.sample.dtype
        autocast = is_autocast(data.x)
        dtype = choose_dtype(data.x, own_dtype, autocast)
        x, states = entries.fold_step(spec, data, dtype)
        native = not (self._python_based or is_compiling() or in_transform())
        weights = self._weights(own_dtype, dtype)
        with no_autocast(x) if autocast else nullcontext():
            y, after = run_step(layers.cell, weights, x, states, layers.dropout, native)
        shape = data.shape
        states = [as_dtype(entries.unfold_step(s, shape), own_dtype) for s in after]
        return entries.unfold_step(y, shape), states

    def _check_device(self, x: Tensor) -> None:
        device = self._layers.sample.device
        if x.device != device:
            raise RuntimeError(
                f"{type(self).__name__} is on {device}, and its input {self.in_keys[0]!r} on "
                f"{x.device}. Move the TensorDict or the module with .to(). [device]"
            )

    def _entry_spec(self) -> entries.EntrySpec:
        layers = self._layers
        keys = self.in_keys
        number = 1 + len(layers.cell.state_names)
        return entries.EntrySpec(
            type(self).__name__,
            keys[0],
            tuple(keys[1:number]),
            keys[number] if len(keys) > number else self._init_key,
            layers.input_size,
            layers.num_layers,
            layers.state_sizes,
        )

    def _weights(self, own_dtype: torch.dtype, dtype: torch.dtype) -> list[Any]:
        """Return the weights of every layer, cast where they have another dtype."""
        layers = self._layers
        cast = None if dtype == own_dtype else dtype
        return [layers.weights(i, cast) for i in range(layers.num_layers)]

    def _options(self) -> Options:
        return Options(
            state_grad=self.state_grad,
            native=not self._python_based,
            dropout=self._layers.dropout,
            recompute=self.recurrent_recompute,
            compute_dtype=self.recurrent_compute_dtype,
            precision=self.recurrent_matmul_precision,
        )

    def _warn_of_missing_state(self, is_init: Tensor) -> None:
        if self._warned_of_missing_state or is_compiling() or in_transform():
            return
        if not has_data(is_init) or _is_capturing(is_init):
            return
        if not bool(is_init.all()):
            self._warned_of_missing_state = True
            warn_caller(
                f"{type(self).__name__} finds no state {list(self.state_keys)} in a step that "
                "does not start an episode, and starts from zeros: the state is lost at every "
                "step. Append the primer to the environment: "
                "env = env.append_transform(get_primers_from_module(policy))."
            )


def _is_capturing(x: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, during which values cannot be read."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
