"""``"triton"``: one fused CUDA kernel per layer runs all time steps, with resets to stored states.

Triton is imported on the first call. With ``TRITON_INTERPRET=1`` in the environment the kernels run
slowly on the CPU, in Triton's interpreter, so that tests need no GPU.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..._compat import TransformType, get_interpreter_stack
from ...cells import Cell, State, Weights
from ...precision import resolve
from ..batch import Options
from .config import MAX_HIDDEN
from .ordering import order_segments as order_segments

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INSTEAD = "Use recurrent_backend='pad' or 'auto'"


def why_not(
    cell: Cell,
    weights: Any,
    device: torch.device | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> str | None:
    """Return the reason why the kernels cannot run a layer, or None if they can.

    On a machine with a GPU, parameters on the CPU are allowed: the module can move to the GPU
    before the first call.

    Args:
        cell: the cell.
        weights: the layer's weights, for sizes and dtype.
        device: device of the inputs; by default that of the parameters.
        compute_dtype: ``recurrent_compute_dtype``.

    Returns:
        The reason and the backends to use instead, or None.

    Examples:
        >>> from rnnkeys.cells import GRU_CELL, Weights
        >>> float64 = Weights(torch.zeros(3, 1).double(), torch.zeros(3, 1).double())
        >>> why_not(GRU_CELL, float64)
        "recurrent_backend='triton' takes parameters in float32, bfloat16 or float16, ..."
    """
    reason = _why_not_layer(cell, weights, compute_dtype)
    return reason or why_not_machine(device or weights.w_hh.device)


def _why_not_layer(cell: Cell, weights: Any, compute_dtype: torch.dtype) -> str | None:
    if cell.name not in ("lstm", "gru"):
        return f"recurrent_backend='triton' runs LSTM and GRU, got {cell.name!r}. {_INSTEAD}."
    dtype = weights.w_hh.dtype
    hidden = weights.w_hh.shape[1]
    if weights.w_hr is not None:
        return (
            "recurrent_backend='triton' has no projection, got "
            f"proj_size={weights.w_hr.shape[0]}. {_INSTEAD}."
        )
    if dtype not in _DTYPES:
        return (
            "recurrent_backend='triton' takes parameters in float32, bfloat16 or float16, got "
            f"{_name(dtype)}. {_INSTEAD}."
        )
    if compute_dtype not in _DTYPES:
        return (
            "recurrent_backend='triton' computes in float32, bfloat16 or float16, got "
            f"recurrent_compute_dtype={_name(compute_dtype)}. {_INSTEAD} with parameters of that "
            "dtype."
        )
    if hidden > MAX_HIDDEN:
        return (
            f"recurrent_backend='triton' takes hidden_size up to {MAX_HIDDEN}, got {hidden}. "
            f"{_INSTEAD}."
        )
    return None


def why_not_machine(device: torch.device | None) -> str | None:
    """Return the reason why no kernel can run here, or None."""
    if find_spec("triton") is None:
        return (
            "recurrent_backend='triton' needs the triton package, which is not installed "
            f"(pip install 'rnnkeys[triton]'). {_INSTEAD}."
        )
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return f"recurrent_backend='triton' needs a CUDA device, and there is none. {_INSTEAD}."
    if torch.version.hip is not None:
        return (
            "recurrent_backend='triton' needs an NVIDIA GPU, got one of AMD (ROCm "
            f"{torch.version.hip}). {_INSTEAD}."
        )
    index = device if device is not None and device.type == "cuda" else None
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return (
            "recurrent_backend='triton' needs a GPU of compute capability 8.0 or higher, got "
            f"{major}.{minor}. {_INSTEAD}."
        )
    return None


def unroll(
    cell: Cell,
    weights: Weights,
    x: Tensor,
    reset_state: State,
    is_init: Tensor,
    options: Options,
    order: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Run one layer over a batch.

    The host never waits for the GPU. Parameters in bfloat16 or float16 keep their dtype in
    products; float32 parameters are cast to ``options.compute_dtype``, and states stay float32.

    Args:
        cell: LSTM or GRU.
        weights: the layer's weights.
        x: ``[B, T, I]``, any strides.
        reset_state: per state name ``[B, T, H]``, any strides, read at t=0 and where ``is_init``.
        is_init: bool ``[B, T]``.
        options: of the call; ``compute_dtype``, ``recompute`` and ``precision`` are read.
        order: result of :func:`order_segments` for ``is_init``, which layers can share; computed
            here by default.

    Returns:
        Outputs ``[B, T, H]`` and, per state name, the states after every step, ``[B, T, H]``, in
        the dtype of the parameters.

    Raises:
        TypeError: if ``is_init`` is not bool.
        ValueError: if a tensor is not on the device of ``x`` or has a wrong shape.
        RuntimeError: if the kernels cannot run this layer here.
    """
    _check(cell, weights, x, reset_state, is_init, options)
    _check_transforms()
    from . import ops

    dtype = weights.w_hh.dtype
    if dtype == torch.float32:
        dtype = options.compute_dtype
    reset_h, reset_c = reset_state if len(reset_state) == 2 else (*reset_state, None)
    inputs = (x, *weights[:4], reset_h, reset_c)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if order is None:
        order = order_segments(is_init)
    h, c, _ = ops.layer(
        cell.name, *inputs, is_init, order, dtype, resolve(options.precision, x.device),
        grad and options.recompute == "none",
    )  # fmt: skip
    return h, (h,) if reset_c is None else (h, c)


def _check(
    cell: Cell, weights: Weights, x: Tensor, reset_state: State, is_init: Tensor, options: Options
) -> None:
    if is_init.dtype != torch.bool:
        raise TypeError(
            f"is_init must be bool for recurrent_backend='triton', got {_name(is_init.dtype)}. "
            "Pass is_init.bool()."
        )
    reason = why_not(cell, weights, x.device, options.compute_dtype)
    if reason is None and x.device.type != "cuda" and not _interpreted():
        reason = (
            f"recurrent_backend='triton' runs on CUDA tensors, got x on {str(x.device)!r}. Move "
            "the module and its data to the GPU, or use recurrent_backend='pad' or 'auto'."
        )
    if reason is not None:
        raise RuntimeError(reason)
    lead = x.shape[:2]
    hidden = weights.w_hh.shape[1]
    named = {"is_init": (is_init, (*lead,)), "w_hh": (weights.w_hh, weights.w_hh.shape)}
    for name, state in zip(cell.state_names, reset_state, strict=True):
        named[f"reset state {name!r}"] = (state, (*lead, hidden))
    for name, (tensor, shape) in named.items():
        if tensor.device != x.device:
            raise ValueError(
                f"{name} is on {str(tensor.device)!r} and x on {str(x.device)!r}; "
                "recurrent_backend='triton' needs all on one GPU. Move it with .to(x.device)."
            )
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {list(shape)} beside x {list(x.shape)}, "
                f"got {list(tensor.shape)}."
            )


def _check_transforms() -> None:
    """Raise inside ``torch.func.grad``, ``vjp``, ``jvp`` and ``jacrev``; vmap is supported."""
    if is_compiling():
        return
    for transform in get_interpreter_stack() or ():
        if transform.key() in (TransformType.Grad, TransformType.Jvp):
            raise RuntimeError(
                "recurrent_backend='triton' runs in torch.vmap, but not inside torch.func.grad, "
                "vjp, jvp or jacrev. Use torch.autograd.grad outside of vmap, or "
                "recurrent_backend='loop', which every transform sees through."
            )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
