"""Torch's native LSTM kernels (oneDNN, cuDNN) over packed rows, with the cell states they hide.

A kernel returns outputs and the last cell state. oneDNN's workspace contains the other cell states
(see ``onednn``). Elsewhere, with ``h`` known, one matmul gives all gates, and a cheap loop over
time gives ``c``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._compat import lstm_layers
from ..cells import State, Weights
from . import onednn, shared_rows
from .batch import LayerRun
from .packing import Plan

# In which the kernels are fast.
DTYPES = (torch.float32, torch.bfloat16)


def run(weights: Weights, x: Tensor, start: State, plan: Plan) -> LayerRun:
    """Run one LSTM layer over packed rows.

    Args:
        weights: of the layer, without projection.
        x: ``[N, I]``.
        start: ``(h, c)`` before the first step, each ``[S, H]``.
        plan: of the rows, in blocks.

    Returns:
        Outputs ``[N, H]`` and the states after every step, each ``[N, H]``; ``c`` is detached.
    """
    x = x.contiguous()
    h, c = (s.contiguous() for s in start)
    cells: Tensor | None = None
    if plan.is_shared:
        y, cells = shared_rows.run(weights, x, h, c, plan)
        outputs = [y]
    elif onednn.can_run(x):
        outputs, cells = onednn.run(weights, x, h, c, plan)
    else:
        outputs = _run_blocks(weights, x, h, c, plan)
    if outputs[-1].requires_grad:
        outputs[-1].register_hook(_raise_in_double_backward)
    y = onednn.join_rows(outputs)
    if cells is None:
        cells = compute_cell_states(weights, x, y, h, c, plan.sizes)
    return LayerRun(y, (y, cells), saves_output=len(outputs) == 1)


def _raise_in_double_backward(grad: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "recurrent_backend='pad' runs a native kernel without second derivative, and a "
            "gradient was computed with create_graph=True. Build the module with "
            "recurrent_backend='loop', which allows any order of autograd."
        )


def _run_blocks(weights: Weights, x: Tensor, h: Tensor, c: Tensor, plan: Plan) -> list[Tensor]:
    """Run the kernel that torch has for the device, block by block."""
    outputs = []
    state = [h.unsqueeze(0), c.unsqueeze(0)]
    parameters = [w for w in weights[:4] if w is not None]
    has_biases = weights.b_ih is not None
    parts = x.split([steps * size for steps, size in plan.blocks])
    for rows, (steps, size) in zip(parts, plan.blocks, strict=True):
        state = [s[:, :size].contiguous() for s in state]
        y, *state = lstm_layers(
            rows.view(steps, size, -1),
            state,
            parameters,
            has_biases=has_biases,
            num_layers=1,
            dropout=0.0,
            train=False,
            bidirectional=False,
            batch_first=False,
        )
        outputs.append(y.flatten(0, 1))
    return outputs


@torch.no_grad()
def compute_cell_states(
    weights: Weights, x: Tensor, y: Tensor, h0: Tensor, c0: Tensor, sizes: list[int]
) -> Tensor:
    """Compute the cell states of an LSTM from its inputs and outputs; not recorded by autograd.

    Args:
        weights: of the layer.
        x: inputs ``[N, I]``.
        y: outputs ``[N, H]``.
        h0: hidden states before the first step, ``[S, H]``.
        c0: cell states before the first step, ``[S, H]``.
        sizes: number of rows of every step.

    Returns:
        Cell states after every step, ``[N, H]``.
    """
    hidden = y.shape[1]
    steps = y.split(sizes)
    h_tm1 = torch.cat([h0, *(s[:n] for s, n in zip(steps[:-1], sizes[1:], strict=True))])
    i_f_g = slice(3 * hidden)
    gates = F.linear(x, weights.w_ih[i_f_g]).addmm_(h_tm1, weights.w_hh[i_f_g].t())
    for bias in (weights.b_ih, weights.b_hh):
        if bias is not None:
            gates.add_(bias[i_f_g])
    i, f, g = gates.chunk(3, 1)
    c = i.sigmoid_().mul(g.tanh_())
    c_tm1 = c0
    for f_t, c_t in zip(f.sigmoid_().split(sizes), c.split(sizes), strict=True):
        c_tm1 = c_t.addcmul_(f_t, c_tm1[: len(c_t)])
    return c
