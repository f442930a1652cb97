"""Private API of torch and TorchRL, in one place: an upgrade has one door.

Each name says for which versions it holds. Nothing else in the package imports from a private
module of either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# torch 2.11 to 2.14.
from torch._C._functorch import TransformType as TransformType
from torch._C._functorch import get_interpreter_stack as get_interpreter_stack
from torch._C._functorch import is_legacy_batchedtensor as is_legacy_batchedtensor
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._contextlib import context_decorator as context_decorator

# TorchRL 0.14.1: the recurrent mode, which both libraries share.
from torchrl.modules.tensordict_module.rnn import (
    recurrent_mode_state_manager as recurrent_mode_state_manager,
)

# Torch's native kernels, which have no public name: torch 2.11 to 2.14.
_VF: Any = vars(torch)["_VF"]
lstm_cell: Callable[..., Any] = _VF.lstm_cell
gru_cell: Callable[..., Any] = _VF.gru_cell
lstm_layers: Callable[..., Any] = _VF.lstm


def in_forward_derivative() -> bool:
    """Whether the code runs under forward-mode differentiation."""
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether the code runs inside a function transform (``torch.vmap``, ``torch.func.grad``).

    Forward-mode differentiation is one as well.
    """
    return peek_interpreter_stack() is not None or in_forward_derivative()


def has_data(x: torch.Tensor) -> bool:
    """Whether a tensor has values: not on the meta device, and not a fake tensor."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def in_derivative() -> bool:
    """Whether ``torch.func.grad`` or its like runs, for which custom operators have no rule."""
    if is_compiling() or not in_transform():
        return False
    kinds = (transform.key() for transform in get_interpreter_stack() or ())
    return in_forward_derivative() or any(kind != TransformType.Vmap for kind in kinds)
