"""Plots of recurrent states. They need matplotlib: ``pip install 'rnnkeys[plot]'``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase, unravel_key
from torch import Tensor, nn
from torch.nn.functional import linear

from ..keys import join_key, next_key
from ..modules.network import RecurrentLayer, RecurrentNetwork
from ..sequences import find_segment_starts, set_segment_starts
from ..sequences.segment_starts import reduce_agents
from .runs import Staleness, compute_ages, evaluating, run_sequences, staleness_by_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Sigmoid gates by their place in the gate order.
_GATES = {"LSTM": {"i": 0, "f": 1, "o": 3}, "GRU": {"r": 0, "z": 1}}
_SATURATED = 0.05
_REACH = 32
_ANCHORS = 16


def _new_figure(rows: int) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels below each other, outside pyplot, which would keep it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed: pip install 'rnnkeys[plot]'."
        ) from error
    figure = Figure(figsize=(8, 2.4 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, squeeze=False)
    return figure, list(panels[:, 0])


def plot_episode_states(
    tensordict: TensorDictBase, policy: nn.Module | None = None, *, row: int = 0
) -> Figure:
    """Plot the recurrent states of a policy along a rollout, with its episode starts.

    The first panel shows the norm of each state that enters a step. With a policy there are two
    more: the share of units whose gates are saturated (below 0.05 or above 0.95), and the mean norm
    of the gradient of an output with respect to inputs of each age within the episode, relative to
    age 0.

    Args:
        tensordict: a rollout ``[T]``, a flat sample ``[N]``, or ``[*, T]`` of which one row is
            plotted.
        policy: the policy that collected it. States that are not stored are recomputed. None finds
            states as entries at ``key`` and ``("next", key)`` with two dimensions of their own, and
            plots the first panel alone.
        row: the row of a batch.

    Returns:
        A figure: ``figure.savefig("states.png")``.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is no state, no time dimension, or no such row.

    Examples:
        >>> from tensordict import TensorDict
        >>> rollout = TensorDict(h=torch.randn(9, 1, 5), is_init=torch.zeros(9, 1).bool())
        >>> rollout = rollout.auto_batch_size_(1).set(("next", "h"), torch.randn(9, 1, 5))
        >>> len(plot_episode_states(rollout).axes)
        1
    """
    data = _one_row(tensordict, row)
    if policy is None:
        figure, [norms] = _new_figure(1)
        _draw_norms(norms, {key: data.get(key) for key in _find_states(data)})
        _finish(norms, reduce_agents(find_segment_starts(data, "is_init"), 1))
        return figure
    # Native kernels have no gradient in evaluation on a GPU, and a plot needs no speed.
    policy, data = copy.deepcopy(policy).cpu(), data.cpu()
    network = RecurrentNetwork(policy)
    network.check_is_recurrent()
    layers = [layer for layer in network.layers if layer.writes_states and layer.state_keys]
    figure, (norms, *others) = _new_figure(1 + 2 * bool(layers))
    _draw_norms(norms, find_entering_states(network, data))
    starts = reduce_agents(find_segment_starts(data, network.init_keys[0]), 1)
    if layers:
        _draw_saturation(others[0], network, data, layers)
        _draw_reach(others[1], network, data, layers[0], starts)
    for panel in (norms, *others[:1]):
        _finish(panel, starts)
    return figure


def find_entering_states(network: RecurrentNetwork, data: TensorDictBase) -> dict[Any, Tensor]:
    """Return the state that enters each step, as stored, or else recomputed.

    Args:
        network: the policy.
        data: steps ``[T]``.
    """
    states = {key: data.get(key, None) for key in network.state_keys}
    if all(state is not None for state in states.values()):
        return states
    flagged = set_segment_starts(data, network.init_keys)
    with evaluating(network.network):
        computed = network.recompute_states(flagged)
    return {key: computed.get(key) if one is None else one for key, one in states.items()}


def _finish(panel: Axes, starts: Tensor) -> None:
    _draw_starts(panel, starts)
    panel.set_xlim(0, max(len(starts) - 1, 1))
    panel.set_xlabel("step")
    _add_legend(panel)


def _count_in_steps(panel: Axes) -> None:
    locator: Any = panel.xaxis.get_major_locator()
    locator.set_params(integer=True)


def _add_legend(panel: Axes) -> None:
    """Put the legend beside the panel, where it hides nothing."""
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")


def _one_row(tensordict: TensorDictBase, row: int) -> TensorDictBase:
    if not tensordict.ndim:
        raise ValueError("A rollout needs a time dimension, the last one. Got batch size [].")
    rows = tensordict.reshape(-1, tensordict.shape[-1])
    if not -len(rows) <= row < len(rows):
        raise ValueError(f"row={row}: the batch {list(tensordict.shape)} has {len(rows)} rows.")
    return rows[row]


def _find_states(data: TensorDictBase) -> list[Any]:
    keys = [unravel_key(key) for key in data.exclude("next").keys(True, True)]
    found = [
        key
        for key in keys
        if data.get(next_key(key), None) is not None
        and data.get(key).ndim >= 3
        and data.get(key).is_floating_point()
    ]
    if not found:
        raise ValueError(
            "There is no state to plot: no entry is there as key and ('next', key), with layers "
            f"and units last. Pass the policy. Entries: {sorted(map(str, data.keys()))}."
        )
    return found


def _draw_norms(panel: Axes, states: dict[Any, Tensor]) -> None:
    for key, state in states.items():
        norm = state.detach().float().flatten(1).norm(dim=-1)
        panel.plot(norm.cpu(), label=join_key(key))
    panel.set_ylabel("norm of the state")
    panel.set_ylim(bottom=0)


def _draw_starts(panel: Axes, starts: Tensor) -> None:
    for number, step in enumerate(starts.nonzero().flatten().tolist()):
        panel.axvline(
            step, color="0.6", linewidth=1, linestyle=":", label="start" if not number else None
        )


def _draw_saturation(
    panel: Axes, network: RecurrentNetwork, data: TensorDictBase, layers: list[RecurrentLayer]
) -> None:
    for layer in layers:
        prefix = f"{join_key(layer.state_keys[0])}: " if len(layers) > 1 else ""
        for gate, share in gate_saturation(network, data, layer).items():
            panel.plot(share.cpu(), label=f"{prefix}{gate}")
    panel.set_ylabel("share of saturated gates")
    panel.set_ylim(-0.02, 1.02)


def gate_saturation(
    network: RecurrentNetwork, data: TensorDictBase, layer: RecurrentLayer
) -> dict[str, Tensor]:
    """Return for each gate of the first layer the share of saturated units at every step, ``[T]``.

    Args:
        network: the policy.
        data: steps ``[T]``.
        layer: a recurrent module in it.

    Returns:
        Gates ``i, f, o`` of an LSTM and ``r, z`` of a GRU; nothing for other cells.
    """
    module: Any = layer.module
    rnn: Any = module.layers
    gates = _GATES.get(rnn.mode, {}) if isinstance(rnn, nn.RNNBase) else {}
    if not gates:
        return {}
    with evaluating(network.network):
        x = run_sequences(network, data).get(module.in_keys[0])
        h = find_entering_states(network, data)[layer.state_keys[0]][..., 0, :]
        held: Any = rnn
        biases = (held.bias_ih_l0, held.bias_hh_l0) if rnn.bias else (None, None)
        summed = linear(x, held.weight_ih_l0, biases[0]) + linear(h, held.weight_hh_l0, biases[1])
        parts = summed.sigmoid().chunk(len(held.weight_hh_l0) // rnn.hidden_size, -1)
    off = {gate: (parts[i] < _SATURATED) | (parts[i] > 1 - _SATURATED) for gate, i in gates.items()}
    return {gate: share.float().flatten(1).mean(-1) for gate, share in off.items()}


def _draw_reach(
    panel: Axes,
    network: RecurrentNetwork,
    data: TensorDictBase,
    layer: RecurrentLayer,
    starts: Tensor,
) -> None:
    key, reach = gradient_reach(network, data, layer, starts)
    panel.semilogy(reach.cpu(), marker=".", label=f"d {join_key(key)} / d input")
    panel.set_xlabel("age of the observation (steps)")
    panel.set_ylabel("gradient, age 0 = 1")
    _count_in_steps(panel)
    _add_legend(panel)


def gradient_reach(
    network: RecurrentNetwork, data: TensorDictBase, layer: RecurrentLayer, starts: Tensor
) -> tuple[Any, Tensor]:
    """Measure how much an output depends on inputs of some steps ago.

    Args:
        network: the policy.
        data: steps ``[T]``.
        layer: the recurrent module whose input is used.
        starts: where segments start, bool ``[T]``.

    Returns:
        The output's key, and for every age the mean norm of the gradient of the output's sum with
        respect to the module's input, relative to age 0; NaN where no segment is that old.
    """
    age = compute_ages(starts)
    longest = min(int(age.max()), _REACH)
    # Steps that look back furthest, spread over the rollout.
    deep = (age >= longest).nonzero().flatten()
    anchors = deep[:: max(len(deep) // _ANCHORS, 1)].tolist()
    total = torch.zeros(longest + 1)
    with evaluating(network.network), torch.enable_grad():
        module: Any = layer.module
        handle = module.register_forward_pre_hook(_require_grad, prepend=True)
        try:
            whole = run_sequences(network, data)
        finally:
            handle.remove()
        key = _last_output(network, whole)
        x, y = whole.get(module.in_keys[0]), whole.get(key)
        for step in anchors:
            [grad] = torch.autograd.grad(y[step].sum(), x, retain_graph=True)
            total += grad[step - longest : step + 1].flatten(1).norm(dim=-1).flip(0).cpu()
    return key, total / total[0].clamp_min(1e-30)


def _require_grad(module: Any, args: tuple[Any, ...]) -> None:
    tensordict = args[0]
    key = module.in_keys[0]
    tensordict.set(key, tensordict.get(key).detach().clone().requires_grad_())


def _last_output(network: RecurrentNetwork, whole: TensorDictBase) -> Any:
    """Return the last entry that the policy writes and that has a gradient; states excluded."""
    policy: Any = network.network
    states = set(map(next_key, network.state_keys))
    keys = [unravel_key(key) for key in policy.out_keys]
    outputs = [key for key in keys if key not in states and whole.get(key, None) is not None]
    outputs = [key for key in outputs if whole.get(key).requires_grad]
    if not outputs:
        raise ValueError(f"No output of the policy depends on its recurrent layer: {keys}.")
    return outputs[-1]


def plot_state_staleness(
    policy: nn.Module, batches: TensorDictBase | Mapping[str, TensorDictBase]
) -> Figure:
    """Plot how stale the states stored in batches are for the current weights of a policy.

    One line for each batch: the median staleness over the steps since the start of a sequence (see
    :func:`rnnkeys.diagnostics.staleness_by_step`); the band holds the middle 80 % of the sequences.
    A line that rises shows states of older weights. Where it levels off, the sequence no longer
    depends on the state that it started from: a burn-in of that length is enough.

    Args:
        policy: with its current weights.
        batches: sequences with their stored states, or several by name.

    Returns:
        A figure: ``figure.savefig("staleness.png")``.

    Raises:
        ImportError: if matplotlib is not installed.
        KeyError: if states are missing.
        ValueError: if there are no batches.
    """
    named = {"stored states": batches} if isinstance(batches, TensorDictBase) else batches
    if not named:
        raise ValueError("batches={} holds nothing to plot: pass a batch, or several by name.")
    figure, [panel] = _new_figure(1)
    figure.set_size_inches(8, 4)
    keys = []
    for name, batch in named.items():
        found = staleness_by_step(policy, batch)
        keys.append(found.key)
        _draw_staleness(panel, name, found)
    panel.set_xlabel("steps since the start of the sequence")
    _count_in_steps(panel)
    panel.set_ylabel(f"staleness of {join_key(keys[0])}")
    panel.set_ylim(bottom=0)
    _add_legend(panel)
    return figure


def _draw_staleness(panel: Axes, name: str, found: Staleness) -> None:
    by_age = [found.difference[found.age == age] for age in range(int(found.age.max()) + 1)]
    low, middle, high = (
        torch.stack([one.float().quantile(q) for one in by_age]).cpu() for q in (0.1, 0.5, 0.9)
    )
    [line] = panel.plot(middle, marker=".", label=name)
    panel.fill_between(range(len(by_age)), low, high, alpha=0.15, color=line.get_color())
