r"""LSTM and GRU in plain NumPy float64, from their equations: what every backend is compared with.

One loop over time, resets included, and a backward pass derived by hand. Nothing of torch or of the
package is imported, so an error would have to be made twice to pass. Slow, and meant to be read.

Letters: ``B T I H G`` are batch, time, input size, hidden size and gates; ``P`` is the size of the
output ``h``, which is ``H`` unless an LSTM projects it. Arrays are batch-major. ``d_a`` is the
gradient of the loss with respect to ``a``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
State = tuple[Array, ...]


class Weights(NamedTuple):
    """Parameters of one layer, in torch's layout, or their gradients.

    Attributes:
        w_ih: input weights ``[G * H, I]``.
        w_hh: recurrent weights ``[G * H, P]``.
        b_ih: input bias ``[G * H]``, or None.
        b_hh: recurrent bias ``[G * H]``, or None.
        w_hr: projection ``[P, H]`` of an LSTM's output, or None.
    """

    w_ih: Array
    w_hh: Array
    b_ih: Array | None = None
    b_hh: Array | None = None
    w_hr: Array | None = None


class Run(NamedTuple):
    """What :func:`unroll` returns, and :func:`backward` reads.

    Attributes:
        y: outputs ``[B, T, P]``.
        states: the state after every step, one ``[B, T, H or P]`` per name (``h`` first).
        cell: the cell that was run.
        weights: its parameters.
        starts: bool ``[B, T]``, True where a segment starts.
        tapes: what each step keeps for its backward pass.
    """

    y: Array
    states: State
    cell: Cell
    weights: Weights
    starts: npt.NDArray[np.bool_]
    tapes: list[tuple[Array, ...]]


class Gradients(NamedTuple):
    """Gradients of one layer: with the shapes of ``x``, ``weights`` and ``reset_state``."""

    x: Array
    weights: Weights
    reset_state: State


class Cell:
    """One step and its backward pass (abstract)."""

    num_gates: int

    def step(self, weights: Weights, x: Array, state: State) -> tuple[State, tuple[Array, ...]]:
        """Return the next state and what :meth:`step_backward` needs."""
        raise NotImplementedError

    def step_backward(
        self, weights: Weights, tape: tuple[Array, ...], d_state: State
    ) -> tuple[Array, State, Weights]:
        """Return the gradients of ``x``, of the previous state and of the weights."""
        raise NotImplementedError


class Elman(Cell):
    r"""Simple recurrent network, state ``(h,)``.

    .. math:: h' = \tanh(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    "Finding Structure in Time", Elman, 1990.
    """

    num_gates = 1

    def step(self, weights: Weights, x: Array, state: State) -> tuple[State, tuple[Array, ...]]:
        """Return ``(h',)`` and the tape."""
        (h,) = state
        total = _affine(x, weights.w_ih, weights.b_ih) + _affine(h, weights.w_hh, weights.b_hh)
        h_next = np.tanh(total)
        return (h_next,), (x, h, h_next)

    def step_backward(
        self, weights: Weights, tape: tuple[Array, ...], d_state: State
    ) -> tuple[Array, State, Weights]:
        """Return the gradients of ``x``, ``(h,)`` and the weights."""
        x, h, h_next = tape
        d_total = d_state[0] * (1 - h_next**2)
        d_bias = d_total.sum(0)
        d_weights = Weights(
            w_ih=d_total.T @ x,
            w_hh=d_total.T @ h,
            b_ih=None if weights.b_ih is None else d_bias,
            b_hh=None if weights.b_hh is None else d_bias,
        )
        return d_total @ weights.w_ih, (d_total @ weights.w_hh,), d_weights


class LSTM(Cell):
    r"""Long short-term memory, gates ``i f g o``, state ``(h, c)``.

    .. math::
        i &= \sigma(W_{ii} x + b_{ii} + W_{hi} h + b_{hi}), \quad f \text{ and } o \text{ alike} \\
        g &= \tanh(W_{ig} x + b_{ig} + W_{hg} h + b_{hg}) \\
        c' &= f c + i g, \qquad h' = o \tanh(c') \quad (\text{or } W_{hr}\, o \tanh(c'))

    "Long Short-Term Memory", Hochreiter and Schmidhuber, 1997; with the forget gate of "Learning to
    Forget", Gers et al., 2000.
    """

    num_gates = 4

    def step(self, weights: Weights, x: Array, state: State) -> tuple[State, tuple[Array, ...]]:
        """Return ``(h', c')`` and the tape."""
        h, c = state
        gates = _affine(x, weights.w_ih, weights.b_ih) + _affine(h, weights.w_hh, weights.b_hh)
        i, f, g, o = np.split(gates, 4, axis=1)
        i, f, g, o = _sigmoid(i), _sigmoid(f), np.tanh(g), _sigmoid(o)
        c_next = f * c + i * g
        out = o * np.tanh(c_next)
        h_next = out if weights.w_hr is None else out @ weights.w_hr.T
        return (h_next, c_next), (x, h, c, i, f, g, o, c_next)

    def step_backward(
        self, weights: Weights, tape: tuple[Array, ...], d_state: State
    ) -> tuple[Array, State, Weights]:
        """Return the gradients of ``x``, ``(h, c)`` and the weights."""
        x, h, c, i, f, g, o, c_next = tape
        d_h_next, d_c_next = d_state
        tanh_c = np.tanh(c_next)
        if weights.w_hr is None:
            d_out, d_w_hr = d_h_next, None
        else:
            d_out, d_w_hr = d_h_next @ weights.w_hr, d_h_next.T @ (o * tanh_c)
        d_c_next = d_c_next + d_out * o * (1 - tanh_c**2)
        d_gates = np.concatenate(
            [
                d_c_next * g * i * (1 - i),
                d_c_next * c * f * (1 - f),
                d_c_next * i * (1 - g**2),
                d_out * tanh_c * o * (1 - o),
            ],
            axis=1,
        )
        d_weights = Weights(
            w_ih=d_gates.T @ x,
            w_hh=d_gates.T @ h,
            b_ih=None if weights.b_ih is None else d_gates.sum(0),
            b_hh=None if weights.b_hh is None else d_gates.sum(0),
            w_hr=d_w_hr,
        )
        return d_gates @ weights.w_ih, (d_gates @ weights.w_hh, d_c_next * f), d_weights


class GRU(Cell):
    r"""Gated recurrent unit, gates ``r z n``, state ``(h,)``, reset after the matmul.

    .. math::
        r &= \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}), \quad z \text{ alike} \\
        n &= \tanh(W_{in} x + b_{in} + r (W_{hn} h + b_{hn})) \\
        h' &= (1 - z) n + z h

    "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation",
    Cho et al., 2014 (arXiv:1406.1078), in the form that cuDNN and torch compute.
    """

    num_gates = 3

    def step(self, weights: Weights, x: Array, state: State) -> tuple[State, tuple[Array, ...]]:
        """Return ``(h',)`` and the tape."""
        (h,) = state
        r_x, z_x, n_x = np.split(_affine(x, weights.w_ih, weights.b_ih), 3, axis=1)
        r_h, z_h, n_h = np.split(_affine(h, weights.w_hh, weights.b_hh), 3, axis=1)
        r, z = _sigmoid(r_x + r_h), _sigmoid(z_x + z_h)
        n = np.tanh(n_x + r * n_h)
        return ((1 - z) * n + z * h,), (x, h, r, z, n, n_h)

    def step_backward(
        self, weights: Weights, tape: tuple[Array, ...], d_state: State
    ) -> tuple[Array, State, Weights]:
        """Return the gradients of ``x``, ``(h,)`` and the weights."""
        x, h, r, z, n, n_h = tape
        (d_h_next,) = d_state
        d_n = d_h_next * (1 - z) * (1 - n**2)
        d_r = d_n * n_h * r * (1 - r)
        d_z = d_h_next * (h - n) * z * (1 - z)
        d_gates_x = np.concatenate([d_r, d_z, d_n], axis=1)
        d_gates_h = np.concatenate([d_r, d_z, d_n * r], axis=1)
        d_weights = Weights(
            w_ih=d_gates_x.T @ x,
            w_hh=d_gates_h.T @ h,
            b_ih=None if weights.b_ih is None else d_gates_x.sum(0),
            b_hh=None if weights.b_hh is None else d_gates_h.sum(0),
        )
        d_h = d_h_next * z + d_gates_h @ weights.w_hh
        return d_gates_x @ weights.w_ih, (d_h,), d_weights


def unroll(
    cell: Cell,
    weights: Weights,
    x: npt.ArrayLike,
    reset_state: Sequence[npt.ArrayLike],
    is_init: npt.ArrayLike,
) -> Run:
    """Run one layer over time.

    Args:
        cell: ``LSTM()`` or ``GRU()``.
        weights: parameters of the layer; anything that NumPy turns into float64 arrays.
        x: inputs ``[B, T, I]``.
        reset_state: one ``[B, T, H]`` per state name (``h`` of an LSTM with projection
            ``[B, T, P]``): where a segment starts, the state before the step.
        is_init: bool ``[B, T]``. A segment starts where it is True, and at ``t = 0``.
    """
    x, weights = _float64(x), _map(_float64, weights)
    reset_state = tuple(_float64(r) for r in reset_state)
    starts = np.array(is_init, dtype=bool)
    starts[:, :1] = True
    state: State = tuple(r[:, 0] for r in reset_state)
    history, tapes = [], []
    for t in range(x.shape[1]):
        state = _select(starts[:, t], tuple(r[:, t] for r in reset_state), state)
        state, tape = cell.step(weights, x[:, t], state)
        history.append(state)
        tapes.append(tape)
    states = tuple(np.stack(s, axis=1) for s in zip(*history, strict=True))
    return Run(states[0], states, cell, weights, starts, tapes)


def backward(run: Run, d_y: npt.ArrayLike, d_states: Sequence[npt.ArrayLike]) -> Gradients:
    """Return the gradients of ``sum(y * d_y) + sum(state * d_state for every state)``.

    Args:
        run: what :func:`unroll` returned.
        d_y: gradient that arrives at the outputs, ``[B, T, P]``.
        d_states: gradients that arrive at the states, with their shapes.
    """
    d_out = [_float64(d) for d in d_states]
    d_out[0] = d_out[0] + _float64(d_y)
    d_state: State = tuple(np.zeros_like(d[:, 0]) for d in d_out)
    d_weights = _map(np.zeros_like, run.weights)
    d_x, d_reset = [], []
    for t in reversed(range(len(run.tapes))):
        d_state = tuple(d + d_t[:, t] for d, d_t in zip(d_state, d_out, strict=True))
        d_x_t, d_state, d_weights_t = run.cell.step_backward(run.weights, run.tapes[t], d_state)
        zero = tuple(np.zeros_like(d) for d in d_state)
        d_x.append(d_x_t)
        d_reset.append(_select(run.starts[:, t], d_state, zero))
        d_state = _select(run.starts[:, t], zero, d_state)
        d_weights = _map(np.add, d_weights, d_weights_t)
    d_resets = tuple(np.stack(d[::-1], axis=1) for d in zip(*d_reset, strict=True))
    return Gradients(np.stack(d_x[::-1], axis=1), d_weights, d_resets)


def unroll_layers(
    cell: Cell,
    layers: Sequence[Weights],
    x: npt.ArrayLike,
    reset_states: Sequence[Sequence[npt.ArrayLike]],
    is_init: npt.ArrayLike,
) -> list[Run]:
    """Run a stack: the outputs of a layer are the inputs of the next. ``[-1].y`` is the output."""
    runs: list[Run] = []
    for weights, reset_state in zip(layers, reset_states, strict=True):
        runs.append(unroll(cell, weights, x, reset_state, is_init))
        x = runs[-1].y
    return runs


def backward_layers(
    runs: Sequence[Run], d_y: npt.ArrayLike, d_states: Sequence[Sequence[npt.ArrayLike]]
) -> list[Gradients]:
    """Return each layer's gradients, for a loss that reads the stack's outputs and all states."""
    gradients: list[Gradients] = []
    for run, d_state in zip(reversed(runs), reversed(d_states), strict=True):
        gradients.append(backward(run, d_y, d_state))
        d_y = gradients[-1].x
    return gradients[::-1]


def _affine(a: Array, w: Array, b: Array | None) -> Array:
    return a @ w.T if b is None else a @ w.T + b


def _sigmoid(a: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * a))  # never overflows, as 1 / (1 + exp(-a)) does


def _select(mask: npt.NDArray[np.bool_], a: State, b: State) -> State:
    return tuple(np.where(mask[:, None], p, q) for p, q in zip(a, b, strict=True))


def _float64(a: npt.ArrayLike) -> Array:
    return np.asarray(a, dtype=np.float64)


def _map(function: Any, *weights: Weights) -> Weights:
    """Apply a function to each parameter that is present."""
    mapped: list[Any] = [None if w[0] is None else function(*w) for w in zip(*weights, strict=True)]
    return type(weights[0])(*mapped)
