"""Private API of torch and TorchRL, in one place: an upgrade has one door.

A comment or a docstring gives the versions that each name was checked with. Nothing else in the
package imports from a private module of either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# torch 2.11 to 2.15.
from torch._C._functorch import TransformType as TransformType
from torch._C._functorch import get_interpreter_stack as get_interpreter_stack
from torch._C._functorch import is_legacy_batchedtensor as is_legacy_batchedtensor
from torch._C._functorch import peek_interpreter_stack
from torch._dynamo.exc import UserError as UserError
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._contextlib import context_decorator as context_decorator
from torchrl.envs.transforms import Compose, Transform

# TorchRL 0.14.1 to 0.15: the precision of recurrent matmuls, which both libraries share.
from torchrl.modules.tensordict_module import _rnn_precision
from torchrl.modules.tensordict_module._rnn_precision import (
    RecurrentMatmulPrecision as RecurrentMatmulPrecision,
)
from torchrl.modules.tensordict_module._rnn_precision import (
    RecurrentMatmulPrecisionUserMode as RecurrentMatmulPrecisionUserMode,
)

# TorchRL 0.14.1 to 0.15: the recurrent mode, which both libraries share.
from torchrl.modules.tensordict_module.rnn import (
    recurrent_mode_state_manager as recurrent_mode_state_manager,
)


class NestableCompose(Compose):
    """A ``Compose`` that works inside another one, as its first transform, too.

    A transform finds the environment before it by a chain of copies, which TorchRL cannot build
    where a ``Compose`` inside another is preceded by no transform.
    """

    def clone(self) -> NestableCompose:
        """Return a copy of the same class, where TorchRL's is a plain ``Compose``."""
        transforms: Any = self.transforms
        return type(self)(*(transform.clone() for transform in transforms))

    def _rebuild_up_to(self, final_transform: Transform) -> Any:
        container = self.__dict__["_container"]
        container = None if container is None else container()
        if not isinstance(container, Compose):
            return super()._rebuild_up_to(final_transform)
        outer: Any = container
        env, _ = outer._rebuild_up_to(self)
        if env is None:
            return None, None
        inner: Any = self.transforms
        for transform in inner:
            if transform is final_transform:
                break
            copy = transform.clone()
            copy.reset_parent()
            env.append_transform(copy)
        return env, env.transform


# Torch's native kernels, which have no public name: torch 2.11 to 2.15.
_VF: Any = vars(torch)["_VF"]
lstm_cell: Callable[..., Any] = _VF.lstm_cell
gru_cell: Callable[..., Any] = _VF.gru_cell
lstm_layers: Callable[..., Any] = _VF.lstm
_onednn_rnn_layer: Callable[..., Any] = vars(torch)["mkldnn_rnn_layer"]
# Of both passes: one LSTM layer, which runs forward in time and keeps what the backward pass reads.
_ONEDNN_LSTM: dict[str, Any] = {
    "mode": 2,
    "num_layers": 1,
    "has_biases": True,
    "bidirectional": False,
    "reverse": False,
    "batch_first": False,
    "batch_sizes": [],
    "train": True,
}


def onednn_lstm_layer(
    x: Tensor, parameters: Sequence[Tensor], h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run oneDNN's LSTM over ``x [T, B, I]``: torch 2.11 to 2.15, see ``aten::mkldnn_rnn_layer``.

    Args:
        x: ``[T, B, I]``, float32 on the CPU.
        parameters: ``w_ih``, ``w_hh``, ``b_ih`` and ``b_hh``.
        h: ``[B, H]``.
        c: ``[B, H]``.

    Returns:
        Outputs ``[T, B, H]``, the last ``h`` and ``c``, and the workspace of the backward pass.
    """
    return _onednn_rnn_layer(x, *parameters, h, c, hidden_size=h.shape[1], **_ONEDNN_LSTM)


def onednn_lstm_layer_backward(
    x: Tensor,
    parameters: Sequence[Tensor],
    start: tuple[Tensor, Tensor],
    result: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None, Tensor | None],
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compute gradients of :func:`onednn_lstm_layer`: torch 2.11 to 2.15.

    Args:
        x: as in the forward pass.
        parameters: as in the forward pass.
        start: ``h`` and ``c``, as in the forward pass.
        result: of the forward pass.
        grads: of the outputs and of the last ``h`` and ``c``; None is zero.

    Returns:
        Gradients of ``x``, ``w_ih``, ``w_hh`` and either bias; and of ``h`` and ``c``.
    """
    y, h, c, workspace = result
    d_x, d_w_ih, d_w_hh, d_b, _, d_h, d_c = torch.ops.aten.mkldnn_rnn_layer_backward(
        *(x, *parameters, *start, y, h, c, *grads),
        hidden_size=y.shape[2],
        workspace=workspace,
        **_ONEDNN_LSTM,
    )
    return (d_x, d_w_ih, d_w_hh, d_b), (d_h, d_c)


def has_onednn_linear() -> bool:
    """Return whether torch, 2.11 to 2.15, has oneDNN's matmul."""
    has_op = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_op and torch.backends.mkldnn.is_available()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` by oneDNN, in float32 on the CPU; not seen by autograd."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# TorchRL's modes by the names of torch's float32 matmul precision.
PRECISION_OF_TORCH: dict[str, str] = _rnn_precision._TORCH_TO_RNN_PRECISION
set_precision_override: Callable[[str | None], None] = _rnn_precision.set_recurrent_matmul_precision


def get_precision_override() -> str | None:
    """Return the precision set for the process by TorchRL's setter or environment variable."""
    return _rnn_precision._GLOBAL_OVERRIDE


def restore_precision_override(mode: str | None) -> None:
    """Restore what :func:`get_precision_override` returned; the setter reads the environment."""
    _rnn_precision._GLOBAL_OVERRIDE = mode


def in_forward_derivative() -> bool:
    """Return whether the code runs under forward-mode differentiation."""
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Return whether the code runs inside a function transform, such as ``torch.vmap``.

    Forward-mode differentiation is one as well.
    """
    return peek_interpreter_stack() is not None or in_forward_derivative()


def in_backward() -> bool:
    """Return whether autograd runs a backward pass in this thread: torch 2.11 to 2.15."""
    return torch._C._current_graph_task_id() != -1


def has_data(x: torch.Tensor) -> bool:
    """Return whether a tensor has values: it is neither on the meta device nor a fake tensor."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def in_derivative() -> bool:
    """Return whether ``torch.func.grad`` or the like runs; custom operators do not support it."""
    if is_compiling() or not in_transform():
        return False
    kinds = (transform.key() for transform in get_interpreter_stack() or ())
    return in_forward_derivative() or any(kind != TransformType.Vmap for kind in kinds)


_FOREACH: dict[str, Callable[..., None]] = {
    name: vars(torch)[f"_foreach_{name}"] for name in ("addcmul_", "mul_")
}


def run_in_order(name: str, states: tuple[Tensor, ...], *others: tuple[Tensor, ...]) -> None:
    """Run ``states[i].<name>(*others[i])`` one after the other, ``others`` among ``states``.

    One call on the CPU, where torch, 2.11 to 2.15, runs the list in its order. On other devices
    torch may fuse the list, so the operations are called one by one.

    Args:
        name: ``"addcmul_"`` or ``"mul_"``.
        states: tensors to change in place.
        *others: the arguments, a list for each.
    """
    if not states:
        return
    if states[0].device.type == "cpu":
        _FOREACH[name](states, *others)
        return
    for state, *arguments in zip(states, *others, strict=True):
        getattr(state, name)(*arguments)
