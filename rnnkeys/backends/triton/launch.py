"""Launching the kernels: the only place that imports Triton.

Both functions work in place on buffers that :mod:`.ops` allocates, and never wait for the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import gru, lstm
from .config import Device, choose_config

_KERNELS: dict[str, Any] = {"lstm": lstm, "gru": gru}


def forward(
    cell: str,
    gates: Tensor,
    states: tuple[Tensor, ...],
    resets: tuple[Tensor, ...],
    is_init: Tensor,
    w_hh: Tensor,
    bias_n: Tensor | None,
    keep: bool,
    precision: str,
) -> None:
    """Run the recurrence.

    Args:
        cell: ``"lstm"`` or ``"gru"``.
        gates: ``[B, T, 4H]``, projected inputs; with ``keep``, activations replace them.
        states: written, one ``[B, T, H]`` per state name.
        resets: read at t=0 and where ``is_init``, as ``states``; any strides.
        is_init: bool ``[B, T]``.
        w_hh: ``[G*H, H]``, in the dtype of ``gates``.
        bias_n: GRU's ``[H]``; None for an LSTM.
        keep: whether the backward pass will need the activations.
        precision: of the products.
    """
    resets, strides = _rows(resets)
    extra = () if bias_n is None else (bias_n,)
    tensors = (gates, *states, *resets, is_init, w_hh, *extra)
    _launch(cell, "forward", tensors, strides, is_init.shape, w_hh, precision, KEEP=keep)


def backward(
    cell: str,
    grads: tuple[Tensor, Tensor | None],
    act: Tensor,
    state: Tensor,
    reset: Tensor,
    is_init: Tensor,
    w_hh: Tensor,
    d_gates: Tensor,
    d_reset: Tensor | None,
    precision: str,
) -> None:
    """Walk the recurrence back.

    Args:
        cell: ``"lstm"`` or ``"gru"``.
        grads: of ``h`` and ``c``, each ``[B, T, H]``; the second is None for zero and for a GRU.
        act: activations ``[B, T, 4H]``.
        state: ``c`` of an LSTM, ``h`` of a GRU, after every step.
        reset: what replaces ``state`` where a segment starts; any strides.
        is_init: bool ``[B, T]``.
        w_hh: ``[G*H, H]``, in the dtype of ``act``.
        d_gates: written, ``[B, T, 4H]``.
        d_reset: written where a segment starts, or None.
        precision: of the products.
    """
    grad_h, grad_c = grads
    flags: dict[str, bool] = {"WANT_RESET": d_reset is not None}
    first: tuple[Tensor, ...] = (grad_h,)
    if cell == "lstm":
        flags["HAS_DC"] = grad_c is not None
        first = (grad_h, grad_h if grad_c is None else grad_c)
    (reset,), strides = _rows((reset,))
    unused = state if d_reset is None else d_reset
    tensors = (*first, act, state, reset, is_init, w_hh, d_gates, unused)
    _launch(cell, "backward", tensors, strides, is_init.shape, w_hh, precision, **flags)


def _rows(resets: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """Return tensors whose last dimension is dense, and their other strides, the same for all.

    One layer's slice of a stack's states, or zeros that were expanded, need no copy.
    """
    strides = {r.stride() for r in resets}
    if len(strides) > 1 or resets[0].stride(2) != 1:
        resets = tuple(r.contiguous() for r in resets)
    return resets, (resets[0].stride(0), resets[0].stride(1))


def _launch(
    cell: str,
    direction: str,
    tensors: tuple[Tensor, ...],
    strides: tuple[int, int],
    shape: torch.Size,
    w_hh: Tensor,
    precision: str,
    **flags: bool,
) -> None:
    batch, steps = shape
    hidden = w_hh.shape[1]
    if not (batch and steps):
        return
    config = choose_config(
        batch, hidden, w_hh.shape[0] // hidden, w_hh.element_size(), precision, _device(w_hh)
    )
    kernel = getattr(_KERNELS[cell], f"{direction}_{'resident' if config.resident else 'tiled'}")
    options: dict[str, Any] = {
        **flags, "BLOCK_B": config.block_b, "STAGES": config.stages, "PRECISION": precision,
        "num_warps": config.num_warps,
    }  # fmt: skip
    rows = -(-batch // config.block_b)
    sizes = (batch, steps, hidden, *strides)
    with _on(w_hh.device):
        if config.resident:
            kernel[(rows,)](*tensors, *sizes, BLOCK_H=config.block_n, **options)
            return
        if direction == "backward":
            tensors = (*tensors, torch.empty(batch, hidden, device=w_hh.device))
        options |= {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        columns = config.block_n if config.stepwise else hidden
        grid = (rows, -(-hidden // columns))
        ranges = [(t, t + 1) for t in range(steps)] if config.stepwise else [(0, steps)]
        for begin, end in ranges if direction == "forward" else ranges[::-1]:
            kernel[grid](*tensors, *sizes, begin, end, columns, **options)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _device(tensor: Tensor) -> Device:
    if not tensor.is_cuda:
        return Device()
    properties = torch.cuda.get_device_properties(tensor.device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)
