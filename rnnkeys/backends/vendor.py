"""The vendor's LSTM kernel (oneDNN, cuDNN) over packed rows, with the cell states it hides.

The kernel runs packed rows block by block and returns outputs and the last cell state only. The
states after every step cost little all the same:

- oneDNN leaves the activated gates in the workspace that it keeps for its backward pass, and
  ``c_t = f_t c_{t-1} + i_t g_t`` is pointwise. Where they lie is no part of its interface, so it is
  probed once for every hidden size, and every block's last state is compared with the returned one.
- Otherwise, with ``h`` known, all gates come from one matmul without a loop.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cells import LSTM_CELL, Weights
from ..segments import Plan

_DTYPES = (torch.float32, torch.bfloat16)
# Relative to the largest state: rounding differs a little, a wrong place differs a lot.
_END_TOLERANCE = 1e-4


def serves(dtype: torch.dtype) -> bool:
    """Whether the kernel is fast for this dtype."""
    return dtype in _DTYPES


def run(
    weights: Weights, x: Tensor, start: tuple[Tensor, ...], plan: Plan, only_starts: bool
) -> tuple[Tensor, Tensor]:
    """Run one LSTM layer over packed rows ``x [N, I]``.

    Args:
        weights: of the layer, without projection.
        x: inputs.
        start: ``(h, c)`` the segments start from, each ``[S, H]``.
        plan: that packed the rows, in blocks.
        only_starts: whether cell states after segments' first steps suffice; the rest is NaN then.

    Returns:
        Outputs ``[N, H]`` and the cell states after every step, ``[N, H]``, detached.
    """
    use_onednn = x.dtype == torch.float32 and _onednn_runs(x)
    run_block = _onednn_block if use_onednn else _vendor_block
    hidden = weights.w_hh.shape[1]
    cells = x.new_empty(x.shape[0], hidden) if use_onednn and not only_starts else None
    outputs, row, state = [], 0, start
    for _, steps, rows in plan.blocks:
        block = x[row : row + steps * rows].view(steps, rows, -1)
        entering = (state[0][:rows].contiguous(), state[1][:rows].contiguous())
        y, state, workspace = run_block(weights, block, entering)
        outputs.append(y.reshape(steps * rows, hidden))
        if cells is not None:
            out = cells[row : row + steps * rows].view(steps, rows, hidden)
            if not _cells_from_workspace(workspace, entering[1], state[1], out):
                cells = None
        row += steps * rows
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    with torch.no_grad():
        if cells is None:
            cells = _cells_from_outputs(weights, x, y, start, plan, only_starts)
    return _FirstOrderOnly.apply(y), cells


def _onednn_runs(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.backends.mkldnn.is_available()


def _vendor_block(weights: Weights, x: Tensor, state: tuple[Tensor, Tensor]):
    """Run ``x [T, B, I]`` by whatever kernel torch has for the device."""
    parameters = weights.tensors
    hx = (state[0].unsqueeze(0), state[1].unsqueeze(0))
    has_biases = weights.b_ih is not None
    y, h, c = torch._VF.lstm(x, hx, parameters, has_biases, 1, 0.0, False, False, False)  # pyright: ignore[reportAttributeAccessIssue]
    return y, (h[0], c[0]), None


def _onednn_block(weights: Weights, x: Tensor, state: tuple[Tensor, Tensor]):
    """Run ``x [T, B, I]`` by the operator beneath ``nn.LSTM``, which also returns its workspace."""
    hidden = weights.w_hh.shape[1]
    b_ih, b_hh = weights.b_ih, weights.b_hh
    if b_ih is None or b_hh is None:
        b_ih = b_hh = x.new_zeros(4 * hidden)
    tensors = (x.contiguous(), weights.w_ih, weights.w_hh, b_ih, b_hh, *state)
    if not torch.is_grad_enabled():
        # It keeps a workspace only where gradients are recorded.
        tensors = tuple(t.detach() for t in tensors)
    lstm_mode = 2
    with torch.enable_grad():
        y, h, c, workspace = torch.mkldnn_rnn_layer(  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            *tensors,
            *(False, [], lstm_mode, hidden, 1, True, False, False, True),
        )
    return y, (h, c), workspace


def _cells_from_workspace(workspace: Any, before: Tensor, last: Tensor, out: Tensor) -> bool:
    """Fill ``out [T, B, H]`` with cell states from the gates oneDNN keeps; False if it cannot."""
    steps, rows, hidden = out.shape
    if workspace is None or not _workspace_is_known(hidden):
        return False
    with torch.no_grad():
        gates = _gates_in(workspace, steps, rows, hidden)
        torch.mul(gates[..., :hidden], gates[..., 2 * hidden : 3 * hidden], out=out)
        forget = gates[..., hidden : 2 * hidden]
        c = before
        for f_t, c_t in zip(forget.unbind(0), out.unbind(0), strict=True):
            c = c_t.addcmul_(f_t, c)
        # A row that is not finite tells nothing and must not change how the others are computed.
        finite = last.isfinite()
        error = torch.where(finite, c - last, 0).abs().max()
        return bool(error <= _END_TOLERANCE * torch.where(finite, last, 0).abs().max())


def _gates_in(workspace: Tensor, steps: int, rows: int, hidden: int) -> Tensor:
    """View the activated gates ``[T, B, 4H]`` at the head of a workspace.

    Rows are padded to 16 elements, and by 16 more where the width is a multiple of 256.
    """
    width = -(-4 * hidden // 16) * 16
    width += 16 * (width % 256 == 0)
    flat = workspace.view(torch.float32).flatten()[: steps * rows * width]
    return flat.view(steps, rows, width)[..., : 4 * hidden]


@functools.cache
def _workspace_is_known(hidden: int) -> bool:
    """Whether the gates lie where they are looked for, by a small example."""
    steps, rows, inputs = 3, 2, 2
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) - 0.5

    with torch.no_grad():
        sizes = ((4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
        weights = Weights(*(draw(*size) for size in sizes))
        x, h, c = draw(steps, rows, inputs), draw(rows, hidden), draw(rows, hidden)
        y, _, workspace = _onednn_block(weights, x, (h, c))
        entering = torch.cat([h.unsqueeze(0), y[:-1]])
        gates = LSTM_CELL.input_gates(weights, x) + LSTM_CELL.state_gates(weights, entering)
        i, f, g, o = gates.chunk(4, -1)
        expected = torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], -1)
        if workspace is None or workspace.numel() < 4 * expected.numel():
            return False
        found = _gates_in(workspace, steps, rows, hidden)
    return torch.allclose(found, expected, rtol=0, atol=1e-5)


def _cells_from_outputs(
    weights: Weights,
    x: Tensor,
    h: Tensor,
    start: tuple[Tensor, ...],
    plan: Plan,
    only_starts: bool,
) -> Tensor:
    """Compute cell states from outputs; with ``only_starts`` NaN after segments' first steps."""
    hidden = h.shape[1]
    gates = 3 * hidden
    sizes = plan.sizes[:1] if only_starts else plan.sizes
    rows = sum(sizes)
    w_ih, w_hh = weights.w_ih[:gates], weights.w_hh[:gates]
    bias = None
    if weights.b_ih is not None and weights.b_hh is not None:
        bias = weights.b_ih[:gates] + weights.b_hh[:gates]
    pre = F.linear(x[:rows], w_ih, bias).addmm_(_before(start[0], h, sizes), w_hh.t())
    i_f, g = pre[:, : 2 * hidden].sigmoid_(), pre[:, 2 * hidden :].tanh_()
    i, f = i_f.split(hidden, 1)
    c = i.mul_(g) if only_starts else torch.mul(i, g)
    previous = start[1]
    for f_now, c_now in zip(f.split(sizes), c.split(sizes), strict=True):
        previous = c_now.addcmul_(f_now, previous[: c_now.shape[0]])
    if not only_starts:
        return c
    all_rows = h.new_full(h.shape, float("nan"))
    all_rows[:rows] = c
    return all_rows


def _before(start: Tensor, after: Tensor, sizes: list[int]) -> Tensor:
    steps = after[: sum(sizes)].split(sizes)
    return torch.cat([start, *(s[:n] for s, n in zip(steps[:-1], sizes[1:], strict=True))])


class _FirstOrderOnly(torch.autograd.Function):
    """Identity that refuses to be differentiated twice, which the vendor's kernel cannot be."""

    @staticmethod
    def forward(ctx: Any, y: Tensor):
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "recurrent_backend='pad' runs a vendor kernel that has no second derivative, and a "
                "gradient was asked for with create_graph=True. Build the module with "
                "recurrent_backend='loop', which any order of autograd sees through."
            )
        return grads[0]
