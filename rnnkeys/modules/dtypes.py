"""The dtype that a recurrent module computes in, with and without autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def choose_dtype(x: Tensor, parameter: Tensor) -> torch.dtype:
    """Return the dtype to compute in: autocast's if it is on, else that of the parameters.

    Raises:
        RuntimeError: if the input has another dtype than the parameters.
    """
    if _is_autocast(x) and parameter.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype != parameter.dtype:
        raise RuntimeError(
            f"The input has dtype {x.dtype} and the parameters {parameter.dtype}; expected the "
            "same. Cast the observation (torchrl's DoubleToFloat or DTypeCastTransform), or give "
            "the module dtype=."
        )
    return parameter.dtype


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off: operands are cast once, and states are kept in that dtype."""
    if _is_autocast(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _is_autocast(x: Tensor) -> bool:
    # torch raises for tensors on the meta device.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``x`` where it has another dtype; a cast to the same dtype is not free."""
    return x if x.dtype == dtype else x.to(dtype)
