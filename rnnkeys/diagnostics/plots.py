"""Pictures of recurrent states. They need matplotlib: ``pip install 'rnnkeys[plot]'``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase, unravel_key
from torch import Tensor, nn

from ..keys import next_key
from ..mode import set_recurrent_mode
from ..modules.network import Recurrent, find_recurrent
from ..modules.recurrent import RecurrentModule
from ..sequences.segment_starts import find_segment_starts
from .runs import Staleness, ages, quietly, run_sequences, staleness_by_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GATES = {"lstm": {"i": 0, "f": 1, "o": 3}, "gru": {"r": 0, "z": 1}}
_SATURATED = 0.05
_REACH = 32
_ANCHORS = 16


def _new_figure(rows: int) -> tuple[Figure, list[Axes]]:
    """Make a figure with panels below each other, not known to pyplot: no window, no leak."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib, which is not installed: pip install 'rnnkeys[plot]'."
        ) from error
    figure = Figure(figsize=(8, 2.4 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, squeeze=False)
    return figure, list(panels[:, 0])


def plot_episode_states(
    tensordict: TensorDictBase, policy: nn.Module | None = None, *, row: int = 0
) -> Figure:
    """Draw what a policy remembers along a rollout, with its resets marked.

    The panels, each for every recurrent module: the norm of each state that entered a step; with a
    policy, the share of units whose gates are saturated (below 0.05 or above 0.95), and how far
    back its memory reaches: the mean size of the gradient of an output with respect to observations
    of each age, within the episode, relative to age 0.

    Args:
        tensordict: a rollout ``[T]``, a flat sample ``[N]``, or ``[*, T]`` of which one row is
            drawn.
        policy: what collected it; None finds states as entries that are there as ``key`` and
            ``("next", key)`` with two dimensions of their own, and draws the first panel alone.
        row: which row of a batch.

    Returns:
        A figure: ``figure.savefig("states.png")``.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is no state, no time, or no such row.

    Examples:
        >>> from tensordict import TensorDict
        >>> rollout = TensorDict(h=torch.randn(9, 1, 5), is_init=torch.zeros(9, 1).bool())
        >>> rollout = rollout.auto_batch_size_(1).set(("next", "h"), torch.randn(9, 1, 5))
        >>> len(plot_episode_states(rollout).axes)
        1
    """
    if policy is not None:
        # Vendors' kernels have no gradient in evaluation on a GPU, and a picture needs no speed.
        policy, tensordict = copy.deepcopy(policy).cpu(), tensordict.cpu()
    recurrent = [] if policy is None else find_recurrent(policy)
    ours = [one for one in recurrent if isinstance(one.module, RecurrentModule)]
    data = _one_row(tensordict, row)
    states = [key for one in recurrent for key in one.state_keys] or _find_states(data)
    init_key = recurrent[0].init_key if recurrent else "is_init"
    if not states:
        raise ValueError(
            "There is no state to draw: no entry that is there as key and ('next', key), with "
            f"layers and units last. Pass the policy. Entries: {sorted(map(str, data.keys()))}."
        )
    figure, (norms, *others) = _new_figure(1 + 2 * bool(ours))
    _draw_norms(norms, data, states)
    starts = find_segment_starts(data, init_key).flatten(1).any(-1)
    if policy is not None and ours:
        _draw_saturation(others[0], policy, data, ours)
        _draw_reach(others[1], policy, data, ours, starts)
    for panel in (norms, *others[:1]):
        _draw_starts(panel, starts)
        panel.set_xlim(0, max(len(data) - 1, 1))
        panel.set_xlabel("step")
        _add_legend(panel)
    return figure


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
    keys = (unravel_key(key) for key in data.exclude("next").keys(True, True))
    return [
        key
        for key in keys
        if data.get(next_key(key), None) is not None
        and data.get(key).ndim >= 3
        and data.get(key).is_floating_point()
    ]


def _draw_norms(panel: Axes, data: TensorDictBase, states: list[Any]) -> None:
    for key in states:
        norm = data.get(key).detach().float().flatten(1).norm(dim=-1)
        panel.plot(norm.cpu(), label=_name(key))
    panel.set_ylabel("norm of the state")
    panel.set_ylim(bottom=0)


def _draw_starts(panel: Axes, starts: Tensor) -> None:
    for number, step in enumerate(starts.nonzero().flatten().tolist()):
        panel.axvline(
            step, color="0.6", linewidth=1, linestyle=":", label="start" if not number else None
        )


def _name(key: Any) -> str:
    return key if isinstance(key, str) else ".".join(key)


def _draw_saturation(
    panel: Axes, policy: nn.Module, data: TensorDictBase, recurrent: list[Recurrent]
) -> None:
    for one in recurrent:
        prefix = f"{_name(one.state_keys[0])}: " if len(recurrent) > 1 else ""
        for gate, share in gate_saturation(policy, data, one).items():
            panel.plot(share.cpu(), label=f"{prefix}{gate}")
    panel.set_ylabel("share of saturated gates")
    panel.set_ylim(-0.02, 1.02)


def gate_saturation(
    policy: nn.Module, data: TensorDictBase, recurrent: Recurrent
) -> dict[str, Tensor]:
    """Return for each gate of the first layer the share of saturated units at every step, ``[T]``.

    Args:
        policy: what the module is a part of.
        data: one row of steps ``[T]``.
        recurrent: the module.

    Returns:
        ``i, f, o`` for an LSTM and ``r, z`` for a GRU; nothing for other cells.
    """
    module: Any = recurrent.module
    gates = _GATES.get(module.cell.name, {})
    if not gates:
        return {}
    with quietly(policy):
        whole = run_sequences(policy, data, find_recurrent(policy))
        before = _states_before(data, whole, recurrent)
        weights = module._layers.weights(0)
        x = whole.get(module.in_keys[0])
        from_x = module.cell.project_input(weights, x)
        summed = from_x + module.cell.project_state(weights, before)
        parts = summed.sigmoid().chunk(module.cell.num_gates, -1)
    off = {gate: (parts[i] < _SATURATED) | (parts[i] > 1 - _SATURATED) for gate, i in gates.items()}
    return {gate: share.float().flatten(1).mean(-1) for gate, share in off.items()}


def _states_before(data: TensorDictBase, whole: TensorDictBase, recurrent: Recurrent) -> Tensor:
    """Return what the first layer's ``h`` was when each step began, ``[T, ..., H]``."""
    key = recurrent.state_keys[0]
    after = whole.get(next_key(key))
    carried = torch.cat([torch.zeros_like(after[:1]), after[:-1]])
    stored = data.get(key, None)
    starts = find_segment_starts(data, recurrent.init_key).clone()
    starts[0] = True
    starts = starts.reshape(*starts.shape[:-1], *[1] * (after.ndim - starts.ndim + 1))
    stored = torch.zeros_like(after) if stored is None else stored
    return torch.where(starts, stored, carried)[..., 0, :]


def _draw_reach(
    panel: Axes,
    policy: nn.Module,
    data: TensorDictBase,
    recurrent: list[Recurrent],
    starts: Tensor,
) -> None:
    key, reach = memory_reach(policy, data, recurrent[0], starts)
    panel.semilogy(reach.cpu(), marker=".", label=f"d {_name(key)} / d input")
    panel.set_xlabel("age of the observation (steps)")
    panel.set_ylabel("gradient, age 0 = 1")
    _count_in_steps(panel)
    _add_legend(panel)


def memory_reach(
    policy: nn.Module, data: TensorDictBase, recurrent: Recurrent, starts: Tensor
) -> tuple[Any, Tensor]:
    """Measure how much an output depends on what was seen some steps ago.

    Args:
        policy: what the module is a part of.
        data: one row of steps ``[T]``.
        recurrent: the module whose input is looked at.
        starts: where segments start, bool ``[T]``.

    Returns:
        The output's key, and for every age the mean norm of the gradient of the output's sum with
        respect to the module's input, relative to age 0; NaN where no segment is that old.
    """
    age = ages(starts)
    longest = min(int(age.max()), _REACH)
    # Steps that look back furthest, spread over the rollout.
    deep = (age >= longest).nonzero().flatten()
    anchors = deep[:: max(len(deep) // _ANCHORS, 1)].tolist()
    total = torch.zeros(longest + 1)
    with quietly(policy), torch.enable_grad(), set_recurrent_mode(True):
        module: Any = recurrent.module
        handle = module.register_forward_pre_hook(_require_grad, prepend=True)
        try:
            whole = run_sequences(policy, data, find_recurrent(policy))
        finally:
            handle.remove()
        key = _last_output(policy, whole, recurrent)
        x, y = whole.get(module.in_keys[0]), whole.get(key)
        for step in anchors:
            [grad] = torch.autograd.grad(y[step].sum(), x, retain_graph=True)
            total += grad[step - longest : step + 1].flatten(1).norm(dim=-1).flip(0).cpu()
    return key, total / total[0].clamp_min(1e-30)


def _require_grad(module: Any, args: tuple[Any, ...]) -> None:
    tensordict = args[0]
    key = module.in_keys[0]
    tensordict.set(key, tensordict.get(key).detach().clone().requires_grad_())


def _last_output(policy: Any, whole: TensorDictBase, recurrent: Recurrent) -> Any:
    """Choose the last number that the policy writes and that depends on the memory."""
    skipped = {next_key(key) for key in recurrent.state_keys}
    keys = [unravel_key(key) for key in policy.out_keys]
    telling = [
        key
        for key in keys
        if key not in skipped and (v := whole.get(key, None)) is not None and v.requires_grad
    ]
    if not telling:
        raise ValueError(f"No output of the policy depends on its memory: {keys}.")
    return telling[-1]


def plot_state_staleness(
    policy: nn.Module, batches: TensorDictBase | Mapping[str, TensorDictBase]
) -> Figure:
    """Draw how stale the states stored in batches are for a policy as it is now.

    One line for each batch: over the steps since the start of a sequence, the mean difference
    between what the policy makes of the stored state and of the state that today's weights make
    (see :func:`rnnkeys.doctor.staleness_by_step`); the band holds the middle 80 % of sequences. A
    line that rises says that the states were stored by other weights; where it levels off, the
    sequence has forgotten the state that it started from: a burn-in of that length helps.

    Args:
        policy: with today's weights.
        batches: sequences with their stored states, or several by name.

    Returns:
        A figure: ``figure.savefig("staleness.png")``.

    Raises:
        ImportError: if matplotlib is not installed.
        KeyError: if states are not there.
        ValueError: if there are no batches.
    """
    named = {"stored states": batches} if isinstance(batches, TensorDictBase) else batches
    if not named:
        raise ValueError("batches={} holds nothing to draw: pass a batch, or several by name.")
    figure, [panel] = _new_figure(1)
    figure.set_size_inches(8, 4)
    keys = []
    for name, batch in named.items():
        found = staleness_by_step(policy, batch)
        keys.append(found.key)
        _draw_staleness(panel, name, found)
    panel.set_xlabel("steps since the start of the sequence")
    _count_in_steps(panel)
    panel.set_ylabel(f"difference of {_name(keys[0])},\nshare of its largest value")
    panel.set_ylim(bottom=0)
    _add_legend(panel)
    return figure


def _draw_staleness(panel: Axes, name: str, found: Staleness) -> None:
    by_age = [found.difference[found.age == age] for age in range(int(found.age.max()) + 1)]
    mean = torch.stack([one.mean() for one in by_age])
    low, high = (torch.stack([one.float().quantile(q) for one in by_age]).cpu() for q in (0.1, 0.9))
    [line] = panel.plot(mean.cpu(), marker=".", label=name)
    panel.fill_between(range(len(by_age)), low, high, alpha=0.15, color=line.get_color())
