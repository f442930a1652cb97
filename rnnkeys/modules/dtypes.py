"""The dtype that a recurrent module computes in, with and without autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def is_autocast(x: Tensor) -> bool:
    """Return whether autocast is on for the device of a tensor."""
    # torch raises for tensors on the meta device.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def no_autocast(x: Tensor) -> torch.autocast:
    """Switch autocast off for the device of a tensor: operands are cast once, states are kept."""
    return torch.autocast(x.device.type, enabled=False)


def choose_dtype(x: Tensor, parameter_dtype: torch.dtype, autocast: bool) -> torch.dtype:
    """Return the dtype to compute in: autocast's if it is on, else that of the parameters.

    Raises:
        RuntimeError: if the input has another dtype than the parameters.
    """
    if autocast and parameter_dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype != parameter_dtype:
        raise RuntimeError(
            f"The input has dtype {x.dtype} and the parameters {parameter_dtype}; expected the "
            "same. Cast the observation (torchrl's DoubleToFloat or DTypeCastTransform), or give "
            "the module dtype=."
        )
    return parameter_dtype


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``x`` where it has another dtype; a cast to the same dtype is not free."""
    return x if x.dtype == dtype else x.to(dtype)
