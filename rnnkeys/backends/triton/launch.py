"""Kernel launches; only this module and the kernels import Triton.

Both functions write into buffers that :mod:`.ops` allocates, and never wait for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gru, lstm
from .config import FUSED_MULTIPLY_ADD, Config, Device, choose_config, on_device

_KERNELS: dict[str, Any] = {"lstm": lstm, "gru": gru}


class Flags(NamedTuple):
    """The ``is_init`` flags of a batch and the order of its segments.

    Attributes:
        is_init: bool ``[B, T]``, contiguous.
        order: from :func:`rnnkeys.backends.triton.ordering.order_segments`.
    """

    is_init: Tensor
    order: Tensor


def forward(
    cell: str,
    gates: Tensor,
    states: tuple[Tensor, ...],
    resets: tuple[Tensor, ...],
    flags: Flags,
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
        resets: read where segments start, as ``states``; any strides.
        flags: ``is_init`` flags and order of the segments.
        w_hh: ``[G*H, H]``, in the dtype of ``gates``.
        bias_n: GRU's ``[H]``; None for an LSTM.
        keep: whether to keep the activations for the backward pass.
        precision: of the products.
    """
    resets, strides = _rows(resets)
    extra = () if bias_n is None else (bias_n,)
    before, after = (gates, *states, *resets), (w_hh, *extra)
    _launch(cell, "forward", before, flags, after, strides, w_hh, precision, KEEP=keep)


def backward(
    cell: str,
    grads: tuple[Tensor, Tensor | None],
    act: Tensor,
    state: Tensor,
    reset: Tensor,
    flags: Flags,
    w_hh: Tensor,
    d_gates: Tensor,
    d_reset: Tensor | None,
    precision: str,
) -> None:
    """Run the backward pass of the recurrence.

    Args:
        cell: ``"lstm"`` or ``"gru"``.
        grads: of ``h`` and ``c``, each ``[B, T, H]``; the second is None for zero and for a GRU.
        act: activations ``[B, T, 4H]``.
        state: ``c`` of an LSTM, ``h`` of a GRU, after every step.
        reset: initial values of ``state``, read where a segment starts; any strides.
        flags: ``is_init`` flags and order of the segments.
        w_hh: ``[G*H, H]``, in the dtype of ``act``.
        d_gates: written, ``[B, T, 4H]``.
        d_reset: written where a segment starts, or None.
        precision: of the products.
    """
    grad_h, grad_c = grads
    switches: dict[str, bool] = {"WANT_RESET": d_reset is not None}
    first: tuple[Tensor, ...] = (grad_h,)
    if cell == "lstm":
        switches["HAS_DC"] = grad_c is not None
        first = (grad_h, grad_h if grad_c is None else grad_c)
    (reset,), strides = _rows((reset,))
    before = (*first, act, state, reset)
    after = (w_hh, d_gates, state if d_reset is None else d_reset)
    _launch(cell, "backward", before, flags, after, strides, w_hh, precision, **switches)


def _rows(resets: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """Return tensors with a contiguous last dimension, and their common other strides.

    One layer's slice of stacked states, or expanded zeros, are not copied.
    """
    strides = {r.stride() for r in resets}
    if len(strides) > 1 or resets[0].stride(2) != 1:
        resets = tuple(r.contiguous() for r in resets)
    return resets, (resets[0].stride(0), resets[0].stride(1))


def _launch(
    cell: str,
    direction: str,
    before: tuple[Tensor, ...],
    flags: Flags,
    after: tuple[Tensor, ...],
    strides: tuple[int, int],
    w_hh: Tensor,
    precision: str,
    **switches: bool,
) -> None:
    batch, steps = flags.is_init.shape
    if not (batch and steps):
        return
    hidden = w_hh.shape[1]
    device = _device(w_hh)
    itemsize = w_hh.element_size()
    config = choose_config(direction, batch, steps, hidden, itemsize, precision, device)
    options: dict[str, Any] = {
        **switches, "BLOCK_B": config.block_b, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "PRECISION": precision, "num_warps": config.num_warps, **FUSED_MULTIPLY_ADD,
    }  # fmt: skip
    kernels = _KERNELS[cell]
    with on_device(w_hh.device):
        if config.resident:
            kernel = getattr(kernels, direction)
            sizes = (batch * steps, steps, hidden, *strides)
            _launch_resident(kernel, (*before, flags.order, *after), sizes, config, device, options)
        else:
            kernel = getattr(kernels, f"{direction}_step")
            tensors = (*before, flags.is_init, *after)
            if direction == "backward":
                carry = torch.empty(batch, hidden, dtype=torch.float32, device=w_hh.device)
                tensors = (*tensors, carry)
            sizes = (batch, steps, hidden, *strides)
            _launch_steps(kernel, tensors, sizes, config, options, direction == "backward")


def _launch_resident(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    config: Config,
    device: Device,
    options: dict[str, Any],
) -> None:
    """Launch once for all time steps; programs that share rows must run at the same time."""
    groups = -(-sizes[0] // config.block_b)
    lanes = min(groups, max(1, config.lanes(device)))
    tickets = torch.zeros(lanes, dtype=torch.int32, device=tensors[0].device)
    kernel[(lanes, config.split)](
        *tensors, tickets, *sizes, SPLIT=config.split, CHUNKS=config.chunks,
        launch_cooperative_grid=config.split > 1, **options,
    )  # fmt: skip


def _launch_steps(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    config: Config,
    options: dict[str, Any],
    back: bool,
) -> None:
    """Launch once per step; the end of a launch is the barrier."""
    batch, steps, hidden = sizes[:3]
    grid = (-(-batch // config.block_b), -(-hidden // config.block_n))
    launch = kernel[grid]
    for t in range(steps - 1, -1, -1) if back else range(steps):
        launch(*tensors, *sizes, t, STAGES=config.stages, **options)


def _device(tensor: Tensor) -> Device:
    if not tensor.is_cuda:
        # The interpreter runs programs one after the other, so they cannot wait for each other.
        return Device(processors=1)
    properties = torch.cuda.get_device_properties(tensor.device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)
