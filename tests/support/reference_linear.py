"""Linear cells in plain NumPy, one time step each, written from the papers' equations.

Nothing of torch or the package is imported; complex states are complex here. Each function maps
parameters, an input ``[B, I]`` and the states to the output and the next states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Parameters = Mapping[str, np.ndarray]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def candidate(v: np.ndarray) -> np.ndarray:
    return np.where(v >= 0, v + 0.5, sigmoid(v))


def as_complex(h: np.ndarray) -> np.ndarray:
    return h[..., ::2] + 1j * h[..., 1::2]


def as_real(h: np.ndarray) -> np.ndarray:
    return np.stack([np.real(h), np.imag(h)], -1).reshape(*h.shape[:-1], -1)


def mingru(w: Parameters, x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z, v = np.split(x @ w["weight_ih"].T + w["bias_ih"], 2, -1)
    z = sigmoid(z)
    h = (1 - z) * h + z * candidate(v)
    return h, h


def minlstm(w: Parameters, x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    f, i, v = np.split(x @ w["weight_ih"].T + w["bias_ih"], 3, -1)
    f, i = sigmoid(f), sigmoid(i)
    h = f / (f + i) * h + i / (f + i) * candidate(v)
    return h, h


def _output(w: Parameters, x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """``Re(C h) + D x + b``, where ``weight_out`` has pairs of columns (Re C, -Im C)."""
    c = as_complex(w["weight_out"]).conj()
    return (h @ c.T).real + x @ w["weight_skip"].T + w["bias_skip"]


def lru(w: Parameters, x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    decay = np.exp(-np.exp(w["nu_log"]) + 1j * np.exp(w["theta_log"]))
    b = as_complex(w["weight_ih"].T).T
    state = decay * as_complex(h) + np.exp(w["gamma_log"]) * (x @ b.T)
    return _output(w, x, state), as_real(state)


def s5(w: Parameters, x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rate, step = -np.exp(w["rate_log"]) + 1j * w["frequency"], np.exp(w["step_log"])
    b = as_complex(w["weight_ih"].T).T
    decay = np.exp(rate * step)
    state = decay * as_complex(h) + (decay - 1) / rate * (x @ b.T)
    return _output(w, x, state), as_real(state)


def ffm(w: Parameters, x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    traces, contexts, hidden = len(w["rate"]), len(w["frequency"]), len(w["weight_out"])
    sizes = np.cumsum([traces, traces, hidden])
    trace, i, o, skip = np.split(x @ w["weight_ih"].T + w["bias_ih"], sizes, -1)
    decay = np.exp(-np.abs(w["rate"]))[:, None] * np.exp(-1j * w["frequency"])[None, :]
    state = as_complex(h).reshape(*x.shape[:-1], traces, contexts)
    state = decay * state + (trace * sigmoid(i))[..., None]
    flat = as_real(state.reshape(*x.shape[:-1], -1))
    z = flat @ w["weight_out"].T + w["bias_out"]
    centred = z - z.mean(-1, keepdims=True)
    z = centred / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    return z * sigmoid(o) + skip * (1 - sigmoid(o)), flat


def s6(
    w: Parameters, x: np.ndarray, h: np.ndarray, window: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    (hidden, width), (_, rank) = w["weight_conv"].shape, w["weight_step"].shape
    modes = w["rate_log"].shape[1]
    u, z = np.split(x @ w["weight_ih"].T + w["bias_ih"], 2, -1)
    past = np.concatenate([u, window], -1).reshape(len(x), width, hidden)
    v = np.einsum("bkd,dk->bd", past, w["weight_conv"]) + w["bias_conv"]
    v = v * sigmoid(v)
    low_rank, b, c = np.split(v @ w["weight_select"].T, [rank, rank + modes], -1)
    delta = np.log1p(np.exp(low_rank @ w["weight_step"].T + w["bias_step"]))
    y, state = np.empty_like(v), np.empty((len(x), hidden, modes))
    before = h.reshape(state.shape)
    for d in range(hidden):
        a = -np.exp(w["rate_log"][d])
        decay = np.exp(delta[:, d, None] * a)
        state[:, d] = decay * before[:, d] + (decay - 1) / a * b * v[:, d, None]
        y[:, d] = (state[:, d] * c).sum(-1) + w["skip"][d] * v[:, d]
    y = (y * z * sigmoid(z)) @ w["weight_out"].T + w["bias_out"]
    return y, state.reshape(len(x), -1), past[:, :-1].reshape(len(x), -1)


STEPS: dict[str, Callable[..., tuple[np.ndarray, ...]]] = {
    "mingru": mingru,
    "minlstm": minlstm,
    "lru": lru,
    "s5": s5,
    "ffm": ffm,
    "s6": s6,
}
