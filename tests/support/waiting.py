"""Detect operations that make a host wait for a GPU, without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What returns a number to the host, or a tensor whose size follows from another's values.
_WAITING = (
    "_local_scalar_dense is_nonzero equal nonzero masked_select unique _unique2 unique_dim "
    "unique_consecutive bincount repeat_interleave"
).split()


class Waits(Exception):
    """The host would wait for the device."""


class never_waiting(TorchDispatchMode):  # noqa: N801 -- used like a function, as torch.no_grad is
    """Raises ``Waits`` at an operator that reads what a GPU has computed."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in _WAITING or (name.startswith("index") and _has_mask(args)):
            raise Waits(str(func))
        return func(*args, **(kwargs or {}))


def _has_mask(args: Sequence[Any]) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
