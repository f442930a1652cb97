"""State staleness: the effect of stored states that other weights have computed."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from ..checks import as_int, find_type_problems, raise_first
from ..keys import MASK_KEY
from ..modules.network import RecurrentNetwork
from ..sequences import read_mask
from .base import prepare_sequences
from .burn_in import cut_burn_in
from .refresh import RefreshStates, read_windows
from .windows import EPISODE_KEY, FIRST_KEY, Windows


def value_discrepancy(stale: Tensor, true: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Compare values from stale states with values from states that are up to date.

    .. math:: \Delta Q_t = \lVert q_t(\text{stored}) - q_t(\text{true}) \rVert_2
        / |\max_{a, j} q_j(\text{true})_a|

    The greatest value of the whole sequence is the scale, because that of a single step may be
    close to zero. See "Recurrent Experience Replay in Distributed Reinforcement Learning",
    Kapturowski et al., 2019, section 3 (https://openreview.net/forum?id=r1lyTjAqYX).

    Args:
        stale: values ``[*, T, A]`` from stored states.
        true: values ``[*, T, A]`` from recomputed states.
        mask: bool ``[*, T]``, False at padding, whose values are not part of the scale.

    Returns:
        ``[*, T]``.

    Examples:
        >>> true = torch.tensor([[0.0, 0.1], [1.0, 4.0]])
        >>> value_discrepancy(torch.tensor([[0.0, 0.5], [1.0, 2.0]]), true)
        tensor([0.1000, 0.5000])
    """
    best = true.amax(-1)
    if mask is not None:
        best = best.masked_fill(~mask, -math.inf)
    scale = best.amax(-1, keepdim=True).abs().clamp_min(1e-12)
    return (stale - true).norm(dim=-1) / scale


@torch.no_grad()
def state_staleness(
    network: TensorDictModuleBase,
    stored: TensorDictBase,
    refreshed: TensorDictBase,
    burn_in: int = 0,
    value_key: NestedKey = "action_value",
) -> dict[str, Tensor]:
    """Measure how far stored states move the values of windows, at the first and last learned step.

    The measure is that of :func:`value_discrepancy`.

    Args:
        network: the network that computes the values, with its current weights.
        stored: windows ``[N, T]`` with the states that were stored.
        refreshed: the same windows with states recomputed from the starts of their episodes, for
            example by :class:`rnnkeys.transforms.RefreshStates`.
        burn_in: number of steps that update the state before the first learned step.
        value_key: key of the values ``[N, T, A]``.

    Returns:
        ``"first"`` and ``"last"``, each ``[N]``: the discrepancy at the first and at the last valid
        step from ``burn_in`` on; NaN for a window without such a step.

    Raises:
        ValueError: if shapes differ, if ``burn_in`` leaves no step, or if time is not contiguous.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import OneHot
        >>> from rnnkeys import drqn_policy
        >>> policy = drqn_policy(OneHot(2), (4,), hidden_size=8)
        >>> windows = TensorDict({"observation": torch.zeros(3, 6, 4)}, [3, 6])
        >>> windows["is_init"] = torch.zeros(3, 6, 1, dtype=torch.bool)
        >>> state_staleness(policy, windows, windows, burn_in=2)["first"]
        tensor([0., 0., 0.])
    """
    burn_in = as_int("burn_in", burn_in, minimum=0)
    for windows in (stored, refreshed):
        raise_first(find_type_problems(windows, "state_staleness"))
    if stored.shape != refreshed.shape or stored.ndim != 2:
        raise ValueError(
            "stored and refreshed must be the same windows [N, T]. Got "
            f"{list(stored.shape)} and {list(refreshed.shape)}."
        )
    cut_burn_in(stored, burn_in)
    recurrent = RecurrentNetwork(network)
    recurrent.check_is_recurrent()
    stale, true = (
        recurrent.run_sequences(prepare_sequences(windows, recurrent.pairs, "state_staleness"))
        for windows in (stored, refreshed)
    )
    q_stale, q_true = (run.get(value_key)[:, burn_in:] for run in (stale, true))
    mask = read_mask(stored, "state_staleness")
    mask = q_true.new_ones(q_true.shape[:2]).bool() if mask is None else mask[:, burn_in:]
    discrepancy = value_discrepancy(q_stale, q_true, mask)
    discrepancy = discrepancy.masked_fill(~mask, float("nan"))
    row = torch.arange(len(discrepancy), device=mask.device)
    first = mask.int().argmax(-1)
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)
    return {"first": discrepancy[row, first], "last": discrepancy[row, last]}


def measure_staleness(
    network: TensorDictModuleBase,
    buffer: Any,
    burn_in: int = 0,
    *,
    zero_states: bool = False,
    max_episodes: int = 8,
    value_key: NestedKey = "action_value",
) -> dict[str, float]:
    """Measure the staleness of the states in a replay buffer of windows.

    The states of some episodes are recomputed, on a copy, and compared with the stored ones.
    Windows at the start of an episode are left out: their states are never stale.

    Args:
        network: the network that computes the values, with its current weights.
        buffer: a replay buffer whose transform is :class:`rnnkeys.transforms.Windows`.
        burn_in: number of steps that update the state before the first learned step.
        zero_states: whether to compare zeros in place of the stored states, for learning that
            starts windows from zero states.
        max_episodes: number of episodes, evenly spaced over the buffer.
        value_key: key of the values.

    Returns:
        ``"first"`` and ``"last"``: means of :func:`state_staleness` over the windows; NaN while
        no episode has more than one window.

    Raises:
        KeyError: if the buffer does not hold windows.
        TypeError: if the kind of its storage is not supported.
    """
    stored = _select_episodes(read_windows(buffer), max_episodes) if len(buffer) else None
    if stored is None or not len(stored):
        return {"first": math.nan, "last": math.nan}
    true = stored.clone()
    RefreshStates(network).refresh_windows(true)
    if zero_states:
        stored = stored.clone()
        for key in RecurrentNetwork(network).state_keys:
            stored.set(key, torch.zeros_like(stored.get(key)))
    inside = stored.get(FIRST_KEY) > 0
    expand = Windows(stored.get(MASK_KEY).shape[1], state_keys=RecurrentNetwork(network).state_keys)
    used, true = (expand.to_sequences(windows[inside]) for windows in (stored, true))
    found = state_staleness(network, used, true, burn_in, value_key)
    return {step: values.nanmean().item() for step, values in found.items()}


def _select_episodes(stored: TensorDictBase, number: int) -> Any:
    """Return the windows of a few episodes that have more than one window."""
    episode, first = stored.get(EPISODE_KEY), stored.get(FIRST_KEY)
    episodes = torch.tensor(list(dict.fromkeys(episode[first > 0].tolist())), dtype=torch.long)
    step = max(len(episodes) // number, 1)
    return stored[torch.isin(episode, episodes[::step][:number].to(episode.device))]
