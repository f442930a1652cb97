"""LSTM and GRU as recurrent modules, with the arguments of TorchRL's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from tensordict.utils import NestedKey
from torch import nn

from . import pure_pytorch
from .arguments import check_layers, make_layers
from .recurrent import RecurrentModule

_Module = TypeVar("_Module", bound="_TorchModule")

# Arguments of the layers; the others are those of RecurrentModule.
_SIZES = (
    *("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "proj_size"),
    *("bidirectional", "device", "dtype"),
)


class _TorchModule(RecurrentModule):
    """A recurrent module whose parameters are in an ``nn.LSTM`` or ``nn.GRU``, or a subclass.

    Attributes:
        native_class: torch's class of layers.
        python_class: the same in plain PyTorch operations.
    """

    native_class: ClassVar[type[nn.RNNBase]]
    python_class: ClassVar[type[nn.RNNBase]]

    def __init__(self, **arguments: Any) -> None:
        given = arguments.pop(self.layers_name)
        sizes = {name: arguments.pop(name) for name in _SIZES if name in arguments}
        python_class = self.python_class if arguments.pop("python_based") else None
        layers = make_layers(self.layers_name, given, python_class, self.native_class, **sizes)
        super().__init__(layers, **arguments)

    def _check_layers(self, layers: Any) -> None:
        check_layers(self.layers_name, layers)

    def _is_python_based(self, layers: Any) -> bool:
        return not isinstance(layers, self.native_class)

    def make_python_based(self: _Module) -> _Module:
        """Hold the same parameters in the pure-PyTorch class of layers; returns self."""
        return self._convert(self.python_class)

    def make_cudnn_based(self: _Module) -> _Module:
        """Hold the same parameters in torch's class of layers; returns self."""
        return self._convert(self.native_class)

    def _convert(self: _Module, to: type[nn.RNNBase]) -> _Module:
        old = self.layers
        if isinstance(old, to):
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
        setattr(self, self.layers_name, new)
        return self


class LSTMModule(_TorchModule):
    """A long short-term memory (LSTM) whose state lives in the TensorDict.

    Drop-in for ``torchrl.modules.LSTMModule``: the same arguments, keys, attributes and
    ``state_dict``. See :class:`RecurrentModule` for what a call does and for the arguments that are
    not listed here, and :class:`rnnkeys.cells.LongShortTermMemory` for the equations.

    Args:
        input_size: size ``I`` of the input's last dimension.
        hidden_size: size ``H`` of ``h`` and ``c``.
        num_layers: number ``L`` of layers.
        bias: whether layers have biases.
        batch_first: must be True.
        dropout: probability of dropout between layers, in training.
        proj_size: size of a projection of ``h``, 0 for none.
        bidirectional: must be False: a policy cannot read the future.
        python_based: whether to hold the parameters in :class:`rnnkeys.LSTM` instead of
            ``nn.LSTM``. The backend ``"auto"`` then runs plain PyTorch operations, which support
            autograd of any order.
        device: of the parameters.
        dtype: of the parameters.
        lstm: an ``nn.LSTM`` or :class:`rnnkeys.LSTM` to use, instead of sizes.

    Raises:
        ValueError: if arguments do not fit each other; the message names them.
        RuntimeError: if the backend cannot run here, with the reason and the one that can.

    Examples:
        >>> from tensordict import TensorDict
        >>> from rnnkeys import set_recurrent_mode
        >>> lstm = LSTMModule(3, 5, in_key="observation", out_key="embed")
        >>> batch = TensorDict(observation=torch.zeros(2, 7, 3), batch_size=[2, 7])
        >>> batch["is_init"] = torch.zeros(2, 7, 1, dtype=torch.bool)
        >>> with set_recurrent_mode(True):
        ...     out = lstm(batch)
        >>> out["embed"].shape, out["next", "recurrent_state_h"].shape
        (torch.Size([2, 7, 5]), torch.Size([2, 7, 1, 5]))
    """

    layers_name = "lstm"
    native_class = nn.LSTM
    python_class = pure_pytorch.LSTM
    DEFAULT_IN_KEYS = ["recurrent_state_h", "recurrent_state_c"]
    DEFAULT_OUT_KEYS = [("next", "recurrent_state_h"), ("next", "recurrent_state_c")]

    def __init__(
        self,
        input_size: int | None = None,
        hidden_size: int | None = None,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0,
        proj_size: int = 0,
        bidirectional: bool = False,
        python_based: bool = False,
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
        lstm: nn.RNNBase | None = None,
        default_recurrent_mode: bool | None = None,
        init_key: NestedKey | None = None,
        state_grad: bool = False,
        state_key: NestedKey | None = None,
    ) -> None:
        super().__init__(**_read_arguments(locals()))


class GRUModule(_TorchModule):
    """A gated recurrent unit (GRU) whose state lives in the TensorDict.

    Drop-in for ``torchrl.modules.GRUModule``: the same arguments, keys, attributes and
    ``state_dict``. See :class:`RecurrentModule` for what a call does and for the arguments that are
    not listed here, and :class:`rnnkeys.cells.GatedRecurrentUnit` for the equations.

    Args:
        input_size: size ``I`` of the input's last dimension.
        hidden_size: size ``H`` of the hidden state.
        num_layers: number ``L`` of layers.
        bias: whether layers have biases.
        batch_first: must be True.
        dropout: probability of dropout between layers, in training.
        bidirectional: must be False: a policy cannot read the future.
        python_based: whether to hold the parameters in :class:`rnnkeys.GRU` instead of
            ``nn.GRU``. The backend ``"auto"`` then runs plain PyTorch operations, which support
            autograd of any order.
        device: of the parameters.
        dtype: of the parameters.
        gru: an ``nn.GRU`` or :class:`rnnkeys.GRU` to use, instead of sizes.

    Raises:
        ValueError: if arguments do not fit each other; the message names them.
        RuntimeError: if the backend cannot run here, with the reason and the one that can.

    Examples:
        >>> from tensordict import TensorDict
        >>> gru = GRUModule(3, 5, in_key="observation", out_key="embed")
        >>> step = TensorDict(observation=torch.zeros(3), is_init=torch.ones(1).bool())
        >>> gru(step)["next", "recurrent_state"].shape
        torch.Size([1, 5])
    """

    layers_name = "gru"
    native_class = nn.GRU
    python_class = pure_pytorch.GRU
    DEFAULT_IN_KEYS = ["recurrent_state"]
    DEFAULT_OUT_KEYS = [("next", "recurrent_state")]

    def __init__(
        self,
        input_size: int | None = None,
        hidden_size: int | None = None,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0,
        bidirectional: bool = False,
        python_based: bool = False,
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
        gru: nn.RNNBase | None = None,
        default_recurrent_mode: bool | None = None,
        init_key: NestedKey | None = None,
        state_grad: bool = False,
        state_key: NestedKey | None = None,
    ) -> None:
        super().__init__(**_read_arguments(locals()))


def _read_arguments(scope: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor by name, from its ``locals()``."""
    return {name: value for name, value in scope.items() if name not in ("self", "__class__")}
