"""Next values worked out one step at a time, from the equations: the oracle of the target tests.

Nothing of the package is used. A recurrent layer's weights are read off the module, whoever made
it, and each step is computed by itself; feed-forward layers are run as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictSequential
from torch import Tensor, nn

State = tuple[Tensor, ...]


def step(layers: nn.Module, layer: int, x: Tensor, state: State) -> State:
    """Return the next ``(h, c)`` of an LSTM (gates i, f, g, o) or ``(h,)`` of a GRU (r, z, n)."""
    w_ih, w_hh, b_ih, b_hh = (
        getattr(layers, f"{name}_l{layer}")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    from_x, from_h = w_ih @ x + b_ih, w_hh @ state[0] + b_hh
    if len(state) == 2:
        i, f, g, o = (from_x + from_h).chunk(4)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x.chunk(3), from_h.chunk(3)
    z = (z_x + z_h).sigmoid()
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return ((1 - z) * n + z * state[0],)


def unroll(layers: Any, x: Tensor, starts: Tensor, stored: State) -> tuple[Tensor, State]:
    """Run rows ``x [B, T, I]`` step by step.

    Args:
        layers: holds the weights.
        x: inputs.
        starts: bool ``[B, T]``; the first step of a row is one anyway.
        stored: per state name ``[B, T, L, H]``, read where a segment starts.

    Returns:
        Outputs ``[B, T, H]`` and the states after each step, ``[B, T, L, H]``.
    """
    outputs, after = [], []
    for row in range(x.shape[0]):
        state: list[State] = []
        for t in range(x.shape[1]):
            if t == 0 or starts[row, t]:
                state = [
                    tuple(s[row, t, layer] for s in stored) for layer in range(layers.num_layers)
                ]
            value = x[row, t]
            for layer, before in enumerate(state):
                state[layer] = step(layers, layer, value, before)
                value = state[layer][0]
            outputs.append(value)
            after.append([torch.stack([s[i] for s in state]) for i in range(len(stored))])
    shape = x.shape[:2]
    states = tuple(torch.stack([a[i] for a in after]) for i in range(len(stored)))
    return (
        torch.stack(outputs).reshape(*shape, -1),
        tuple(s.reshape(*shape, *s.shape[1:]) for s in states),
    )


def leaves(network: nn.Module) -> Iterator[Any]:
    """Yield the modules of nested sequences in the order they run in."""
    if isinstance(network, TensorDictSequential):
        for one in network.module:
            yield from leaves(one)
    else:
        yield network


def run(network: nn.Module, view: TensorDictBase, starts: Tensor) -> TensorDictBase:
    """Run a network on a view ``[*, T]`` and return what it reads and writes, samplers left out."""
    out = view.copy()
    for one in leaves(network):
        if isinstance(one, ProbabilisticTensorDictModule):
            break
        if hasattr(one, "recurrent_mode"):
            _run_recurrent(one, out, starts)
        else:
            one(out)
    return out


def _run_recurrent(module: Any, view: TensorDictBase, starts: Tensor) -> None:
    layers = module.lstm if hasattr(module, "lstm") else module.gru
    # In keys: the input, a state for each one that is written, and the is_init flags, by any name.
    input_key, *state_keys = module.in_keys[: len(module.out_keys)]
    x, stored = view.get(input_key), tuple(view.get(key) for key in state_keys)
    lead = view.batch_size
    agents = x.ndim - 1 - len(lead)
    # Time is moved after agents, and everything before it is a row.
    time = len(lead) - 1

    def fold(entry: Tensor) -> Tensor:
        entry = entry.movedim(time, time + agents)
        return entry.reshape(-1, *entry.shape[time + agents :])

    wide = starts.reshape(*lead, *[1] * agents).expand(*lead, *x.shape[len(lead) : -1])
    y, after = unroll(layers, fold(x), fold(wide), tuple(map(fold, stored)))
    shape = x.movedim(time, time + agents).shape[:-1]
    for key, value in zip(module.out_keys, (y, *after), strict=True):
        view.set(key, value.reshape(*shape, *value.shape[2:]).movedim(time + agents, time))


def with_params(network: Any, params: Any, view: TensorDictBase, starts: Tensor) -> TensorDictBase:
    """Run a network with the parameters a loss keeps for it."""
    with params.to_module(network, preserve_module_state=False):
        return run(network, view, starts)


def ensemble(network: Any, params: Any, view: TensorDictBase, starts: Tensor, key: str) -> Tensor:
    """Run a network once per set of stacked parameters and stack the values at ``key``."""
    outs = [with_params(network, one, view, starts).get(key) for one in params.unbind(0)]
    return torch.stack(outs)


def starts_of(batch: TensorDictBase, init_key: Any = "is_init") -> Tensor:
    """Return bool ``[*, T]``: flagged, or after a ``done``, or first in its row."""
    lead = batch.batch_size
    starts = batch.get(init_key).reshape(*lead, -1).any(-1).clone()
    starts[..., 0] = True
    done = batch.get(("next", "done")).reshape(lead)
    starts[..., 1:] |= done[..., :-1]
    return starts


def next_view(batch: TensorDictBase, states: TensorDictBase | None = None) -> TensorDictBase:
    """Return the next tensordict; its states are the stored ones, or those in ``states``."""
    view = batch.get("next").copy()
    if states is not None:
        view.update(states.get("next"))
    return view


def greedy(values: Tensor) -> Tensor:
    """Return the index ``[*, 1]`` of the largest action value."""
    return values.argmax(-1, keepdim=True)


def project(probs: Tensor, reward: Tensor, keep: Tensor, support: Tensor) -> Tensor:
    """Project ``reward + keep * support`` back on the support: each atom spreads as a triangle."""
    width = support[1] - support[0]
    moved = (reward + keep * support).clamp(support[0], support[-1])
    weight = (1 - (moved.unsqueeze(-2) - support.unsqueeze(-1)).abs() / width).clamp(0, 1)
    return (weight * probs.unsqueeze(-2)).sum(-1)
