"""The matrix products around the recurrence, each one large cuBLAS call for all time steps.

They are the input projection, the gradients of inputs, parameters and reset states and, if
activations were not kept, their recomputation: the outputs determine all gates without a loop.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor


class Problem(NamedTuple):
    """A layer's inputs, parameters, reset states and modes, which both passes read."""

    cell: str
    x: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    reset_h: Tensor
    reset_c: Tensor | None
    is_init: Tensor
    dtype: torch.dtype
    precision: str

    @property
    def hidden(self) -> int:
        """Return ``H``."""
        return self.w_hh.shape[1]

    @property
    def inner_bias(self) -> Tensor | None:
        """Return GRU's ``b_hn [H]``, which the reset gate multiplies; zeros without biases."""
        if self.cell == "lstm":
            return None
        if self.b_hh is None:
            return self.w_hh.new_zeros(self.hidden)
        return self.b_hh[2 * self.hidden :].contiguous()


def _outer_bias(p: Problem) -> Tensor | None:
    """Return the biases that are added outside the recurrence, ``[G*H]``."""
    if p.b_ih is None or p.b_hh is None:
        return None
    if p.cell == "lstm":
        return p.b_ih + p.b_hh
    outside = p.b_hh.clone()
    outside[2 * p.hidden :] = 0
    return p.b_ih + outside


def project(p: Problem) -> Tensor:
    """Project the inputs into the first ``G`` quarters of a new ``[B, T, 4H]``."""
    gates = p.x.new_empty(*p.x.shape[:2], 4 * p.hidden, dtype=p.dtype)
    rows = gates.flatten(0, 1)[:, : p.w_ih.shape[0]]
    bias = _outer_bias(p)
    x, w = p.x.flatten(0, 1).to(p.dtype), p.w_ih.to(p.dtype).t()
    if bias is None:
        torch.mm(x, w, out=rows)
    else:
        torch.addmm(bias.to(p.dtype), x, w, out=rows)
    return gates


def gather_entering_states(p: Problem, h: Tensor) -> Tensor:
    """Return ``h`` before every step, ``[B*T, H]`` in the dtype of products."""
    before = torch.nn.functional.pad(h, (0, 0, 1, -1))
    return torch.where(_first(p), p.reset_h, before).flatten(0, 1).to(p.dtype)


def _first(p: Problem) -> Tensor:
    """Return the flags of segment starts, ``[B, T, 1]``."""
    first = p.is_init.clone()
    first[:, :1] = True
    return first.unsqueeze(-1)


def recompute_activations(p: Problem, h_tm1: Tensor) -> Tensor:
    """Compute the activations that were not kept, from ``h`` before every step."""
    gates = project(p)
    size = p.hidden
    rows = gates.flatten(0, 1)
    w_hh = p.w_hh.to(p.dtype)
    if p.cell == "lstm":
        rows.addmm_(h_tm1, w_hh.t())
        i_f, g, o = rows.split([2 * size, size, size], dim=1)
        i_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        return gates
    r_z, n, h_n = rows.split([2 * size, size, size], dim=1)
    r_z.addmm_(h_tm1, w_hh[: 2 * size].t()).sigmoid_()
    torch.addmm(cast(Tensor, p.inner_bias).to(p.dtype), h_tm1, w_hh[2 * size :].t(), out=h_n)
    n.addcmul_(r_z[:, :size], h_n).tanh_()
    return gates


def input_grad(p: Problem, d_gates: Tensor) -> Tensor:
    """Compute the gradient of ``x`` from ``d_gates [B, T, 4H]``."""
    of_x, _ = _sides(p, d_gates)
    w = p.w_ih.to(p.dtype)
    if p.cell == "gru":
        w = w.roll(p.hidden, 0)
    return (of_x @ w).view(p.x.shape).to(p.x.dtype)


def weight_grads(p: Problem, d_gates: Tensor, h_tm1: Tensor) -> tuple[Tensor, ...]:
    """Compute gradients of ``w_ih``, ``w_hh``, ``b_ih``, ``b_hh``; empty for absent biases."""
    of_x, of_h = _sides(p, d_gates)
    d_w_ih = of_x.t() @ p.x.flatten(0, 1).to(p.dtype)
    d_w_hh = of_h.t() @ h_tm1
    d_b_ih, d_b_hh = p.w_hh.new_empty(0), p.w_hh.new_empty(0)
    if p.b_ih is not None:
        d_b_ih = of_x.sum(0, dtype=torch.float32)
        d_b_hh = d_b_ih.clone() if p.cell == "lstm" else of_h.sum(0, dtype=torch.float32)
    if p.cell == "gru":
        d_w_ih = d_w_ih.roll(-p.hidden, 0)
        d_b_ih = d_b_ih.roll(-p.hidden, 0)
    return tuple(d.to(p.w_hh.dtype) for d in (d_w_ih, d_w_hh, d_b_ih, d_b_hh))


def reset_grads(p: Problem, d_gates: Tensor, direct: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of ``reset_h`` and ``reset_c`` (empty for a GRU).

    ``direct`` is written by the kernel where segments start: the gradient of an LSTM's ``c``, or of
    a GRU's ``h`` through z.
    """
    _, of_h = _sides(p, d_gates)
    through_gates = (of_h @ p.w_hh.to(p.dtype)).view(direct.shape).to(direct.dtype)
    d_h = through_gates.masked_fill_(~_first(p), 0)
    if p.cell == "gru":
        return d_h.add_(direct), direct.new_empty(0)
    return d_h, direct


def scale_into_range(
    p: Problem, grads: tuple[Tensor, Tensor | None]
) -> tuple[tuple[Tensor, Tensor | None], Tensor | None]:
    """Scale incoming gradients so that float16 can hold the gradients computed from them.

    float16 has no positive numbers below 6e-8 and none above 65504: gradients of a mean over a
    large batch would underflow, and sums over many steps overflow. The backward pass is linear in
    the incoming gradients, so the scale can be divided out at its end.

    Returns:
        The scaled gradients and the scale, a power of two on the device, for :func:`scale_back`.
        In other dtypes the unchanged gradients and None.
    """
    if p.dtype != torch.float16:
        return grads, None
    norms = [g.float().norm(torch.inf) for g in grads if g is not None]
    largest = torch.stack(norms).amax().nan_to_num(1.0, 1.0)
    # Sums over all rows of gradients below 2**room stay below 2**15.
    room = min(0, 15 - p.is_init.numel().bit_length())
    exponent = room - largest.frexp().exponent.clamp(min=-100)
    scale = torch.exp2(exponent.float())
    grad_h, grad_c = grads
    return (grad_h.float() * scale, None if grad_c is None else grad_c.float() * scale), scale


def scale_back(grads: tuple[Tensor, ...], scale: Tensor | None) -> tuple[Tensor, ...]:
    """Divide computed gradients by the scale of :func:`scale_into_range`."""
    if scale is None:
        return grads
    return tuple((g.float() / scale).to(g.dtype) for g in grads)


def _sides(p: Problem, d_gates: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradients of the input projection and of the recurrent product, each ``[B*T, G*H]``.

    The gate order of a GRU is n, r, z for the first and r, z, n for the second.
    """
    rows = d_gates.flatten(0, 1)
    if p.cell == "lstm":
        return rows, rows
    return rows[:, : 3 * p.hidden], rows[:, p.hidden :]
