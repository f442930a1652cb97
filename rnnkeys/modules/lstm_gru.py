"""LSTM and GRU as recurrent modules, with the arguments that TorchRL's have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.utils import NestedKey
from torch import nn

from ..cells import GRU_CELL, LSTM_CELL
from . import pure_pytorch as rnn
from .arguments import make_layers
from .recurrent import RecurrentModule


class LSTMModule(RecurrentModule):
    """A long short-term memory (LSTM) whose state lives in the TensorDict.

    Drop-in for ``torchrl.modules.LSTMModule``: the same arguments, keys, attributes and
    ``state_dict``. See :class:`RecurrentModule` for what a call does and
    :class:`rnnkeys.cells.LongShortTermMemory` for the equations.

    Args:
        input_size: size ``I`` of the input's last dimension.
        hidden_size: size ``H`` of ``h`` and ``c``.
        num_layers: number ``L`` of layers.
        bias: whether layers have biases.
        batch_first: must be True.
        dropout: probability of dropout between layers, in training.
        proj_size: size of a projection of ``h``, 0 for none.
        bidirectional: must be False: a policy cannot read the future.
        python_based: hold the parameters in :class:`rnnkeys.LSTM` instead of ``nn.LSTM``;
            ``"auto"`` then runs plain torch operations, which any order of autograd sees through.
        recurrent_backend: ``"auto"``, ``"pad"``, ``"scan"``, ``"loop"`` or ``"triton"``; see
            ``rnnkeys.backends``.
        recurrent_compute_dtype: dtype of the recurrent matmul in the ``"triton"`` backend.
        recurrent_recompute: ``"full"`` keeps no activations for the backward pass and computes them
            again (``"scan"``, ``"loop"`` and ``"triton"``).
        recurrent_matmul_precision: of the ``"triton"`` backend; see ``rnnkeys.precision``.
        in_key: key of the input; states are then read at ``DEFAULT_IN_KEYS``.
        in_keys: keys of the input, ``h`` and ``c``; optionally the init key last.
        out_key: key of the output; states are then written at ``DEFAULT_OUT_KEYS``.
        out_keys: keys of the output, ``h`` and ``c``; the latter must be ``("next", <in key>)`` for
            environments to carry the state.
        device: of the parameters.
        dtype: of the parameters.
        lstm: an ``nn.LSTM`` (or twin) to use, instead of sizes.
        default_recurrent_mode: mode where ``set_recurrent_mode`` is not in force; False by default.
        init_key: bool entry ``[*batch, 1]`` that marks first steps; any name and depth, shared or
            per agent.
        state_grad: whether states written in recurrent mode carry gradients. False by default, so
            that no gradient reaches a target through a stored state.
        store_states: ``"all"``, or ``"starts"`` to write states only after segments' first steps,
            where a next view reads them (others are NaN), which costs nothing.

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

    cell = LSTM_CELL
    rnn_attribute = "lstm"
    plain_class = rnn.LSTM
    vendor_class = nn.LSTM
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
        store_states: str = "all",
    ) -> None:
        layers = make_layers(
            "lstm",
            lstm,
            rnn.LSTM if python_based else None,
            nn.LSTM,
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            proj_size=proj_size,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
        )
        super().__init__(
            layers,
            in_key=in_key,
            in_keys=in_keys,
            out_key=out_key,
            out_keys=out_keys,
            init_key=init_key,
            default_recurrent_mode=default_recurrent_mode,
            recurrent_backend=recurrent_backend,
            recurrent_compute_dtype=recurrent_compute_dtype,
            recurrent_recompute=recurrent_recompute,
            recurrent_matmul_precision=recurrent_matmul_precision,
            state_grad=state_grad,
            store_states=store_states,
        )


class GRUModule(RecurrentModule):
    """A gated recurrent unit (GRU) whose state lives in the TensorDict.

    Drop-in for ``torchrl.modules.GRUModule``: the same arguments, keys, attributes and
    ``state_dict``. See :class:`RecurrentModule` for what a call does and
    :class:`rnnkeys.cells.GatedRecurrentUnit` for the equations.

    Args:
        input_size: size ``I`` of the input's last dimension.
        hidden_size: size ``H`` of the state.
        num_layers: number ``L`` of layers.
        bias: whether layers have biases.
        batch_first: must be True.
        dropout: probability of dropout between layers, in training.
        bidirectional: must be False: a policy cannot read the future.
        python_based: hold the parameters in :class:`rnnkeys.GRU` instead of ``nn.GRU``; ``"auto"``
            then runs plain torch operations, which any order of autograd sees through.
        recurrent_backend: ``"auto"``, ``"pad"``, ``"scan"``, ``"loop"`` or ``"triton"``; see
            ``rnnkeys.backends``.
        recurrent_compute_dtype: dtype of the recurrent matmul in the ``"triton"`` backend.
        recurrent_recompute: ``"full"`` keeps no activations for the backward pass and computes them
            again (``"scan"``, ``"loop"`` and ``"triton"``).
        recurrent_matmul_precision: of the ``"triton"`` backend; see ``rnnkeys.precision``.
        in_key: key of the input; the state is then read at ``DEFAULT_IN_KEYS``.
        in_keys: keys of the input and the state; optionally the init key last.
        out_key: key of the output; the state is then written at ``DEFAULT_OUT_KEYS``.
        out_keys: keys of the output and the state; the latter must be ``("next", <in key>)`` for
            environments to carry the state.
        device: of the parameters.
        dtype: of the parameters.
        gru: an ``nn.GRU`` (or twin) to use, instead of sizes.
        default_recurrent_mode: mode where ``set_recurrent_mode`` is not in force; False by default.
        init_key: bool entry ``[*batch, 1]`` that marks first steps; any name and depth, shared or
            per agent.
        state_grad: whether states written in recurrent mode carry gradients. False by default, so
            that no gradient reaches a target through a stored state.
        store_states: ``"all"``, or ``"starts"`` to write states only after segments' first steps,
            where a next view reads them (others are NaN), which costs nothing.

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

    cell = GRU_CELL
    rnn_attribute = "gru"
    plain_class = rnn.GRU
    vendor_class = nn.GRU
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
        store_states: str = "all",
    ) -> None:
        layers = make_layers(
            "gru",
            gru,
            rnn.GRU if python_based else None,
            nn.GRU,
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
        )
        super().__init__(
            layers,
            in_key=in_key,
            in_keys=in_keys,
            out_key=out_key,
            out_keys=out_keys,
            init_key=init_key,
            default_recurrent_mode=default_recurrent_mode,
            recurrent_backend=recurrent_backend,
            recurrent_compute_dtype=recurrent_compute_dtype,
            recurrent_recompute=recurrent_recompute,
            recurrent_matmul_precision=recurrent_matmul_precision,
            state_grad=state_grad,
            store_states=store_states,
        )
