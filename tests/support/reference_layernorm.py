r"""LSTM with layer normalisation in plain NumPy float64, with a backward pass derived by hand.

Written from the equations, as ``reference.py``; imports neither torch nor the package.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tests.support.reference import Array, Cell, State

EPS = 1e-5


class LayerNormWeights(NamedTuple):
    """Parameters of one layer, or their gradients; one bias, two norms over ``4 H``."""

    w_ih: Array
    w_hh: Array
    b_ih: Array | None
    norm_x_weight: Array
    norm_x_bias: Array
    norm_h_weight: Array
    norm_h_bias: Array


class LayerNormLSTM(Cell):
    r"""Gates ``i f o u``, state ``(h, c)``.

    .. math::
        a = LN_x(W_x x) + LN_h(W_h h) + b, \quad c' = \sigma(f) c + \sigma(i) \tanh(u),
        \quad h' = \sigma(o) \tanh(c')
    """

    num_gates = 4

    def step(self, weights: Any, x: Array, state: State) -> tuple[State, tuple[Any, ...]]:
        """Return ``(h', c')`` and the tape."""
        h, c = state
        normed_x, scale_x = _normalise(x @ weights.w_ih.T)
        normed_h, scale_h = _normalise(h @ weights.w_hh.T)
        gates = weights.norm_x_weight * normed_x + weights.norm_x_bias
        gates = gates + weights.norm_h_weight * normed_h + weights.norm_h_bias
        if weights.b_ih is not None:
            gates = gates + weights.b_ih
        size = c.shape[1]
        i, f, o = (1 / (1 + np.exp(-gates[:, k * size : (k + 1) * size])) for k in range(3))
        u = np.tanh(gates[:, 3 * size :])
        c_next = f * c + i * u
        tape = (x, h, c, i, f, o, u, c_next, normed_x, scale_x, normed_h, scale_h)
        return (o * np.tanh(c_next), c_next), tape

    def step_backward(
        self, weights: Any, tape: tuple[Any, ...], d_state: State
    ) -> tuple[Array, State, Any]:
        """Return the gradients of ``x``, ``(h, c)`` and the weights."""
        x, h, c, i, f, o, u, c_next, normed_x, scale_x, normed_h, scale_h = tape
        d_h_next, d_c_next = d_state
        d_c = d_c_next + d_h_next * o * (1 - np.tanh(c_next) ** 2)
        d_gates = np.concatenate(
            [
                d_c * u * i * (1 - i),
                d_c * c * f * (1 - f),
                d_h_next * np.tanh(c_next) * o * (1 - o),
                d_c * i * (1 - u**2),
            ],
            axis=1,
        )
        d_x_gates = _normalise_backward(d_gates * weights.norm_x_weight, normed_x, scale_x)
        d_h_gates = _normalise_backward(d_gates * weights.norm_h_weight, normed_h, scale_h)
        total = d_gates.sum(0)
        d_weights = LayerNormWeights(
            w_ih=d_x_gates.T @ x,
            w_hh=d_h_gates.T @ h,
            b_ih=None if weights.b_ih is None else total,
            norm_x_weight=(d_gates * normed_x).sum(0),
            norm_x_bias=total,
            norm_h_weight=(d_gates * normed_h).sum(0),
            norm_h_bias=total,
        )
        return d_x_gates @ weights.w_ih, (d_h_gates @ weights.w_hh, d_c * f), d_weights


def _normalise(a: Array) -> tuple[Array, Array]:
    """Return rows of mean 0 and variance 1, and what they were divided by."""
    centred = a - a.mean(1, keepdims=True)
    scale = np.sqrt((centred**2).mean(1, keepdims=True) + EPS)
    return centred / scale, scale


def _normalise_backward(d: Array, normed: Array, scale: Array) -> Array:
    along = (d * normed).mean(1, keepdims=True)
    return (d - d.mean(1, keepdims=True) - normed * along) / scale
