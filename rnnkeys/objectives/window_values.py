"""Action values over a window, computed by one network from the stored state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from ..keys import next_key
from ..modules.network import RecurrentNetwork
from ..sequences import append_dims, read_is_init
from ..transforms.burn_in import cut_burn_in, write_initial_states


class WindowValues(NamedTuple):
    """Action values of one network.

    Attributes:
        q: values of the observations of a window, ``[B, T, A]``.
        q_end: values of the observation after each end, ``[E, A]``, in the order of the ends.
    """

    q: Tensor
    q_end: Tensor

    def of_next_observations(self, ends: Tensor) -> Tensor:
        """Return the values of the observation after each step, ``[B, T, A]``, without gradient.

        Args:
            ends: bool ``[B, T]``, steps whose next observation is not that of the next step.
        """
        q = self.q.detach()
        values = torch.cat([q[:, 1:], q[:, :1]], 1)
        values[ends] = self.q_end.to(q.dtype)
        return values


def compute_values(
    network: RecurrentNetwork,
    windows: TensorDictBase,
    ends: Tensor,
    value_key: NestedKey,
    burn_in: int,
    learn_starts: bool,
) -> WindowValues:
    """Burn a network in, and run it over the learned steps and the observations after ends.

    Args:
        network: computes the values, with the parameters that it has now.
        windows: ``[B, T]`` with stored states; missing states are zeros.
        ends: bool ``[B, T']``, steps whose next observation is not that of the next learned step.
        value_key: key of the values.
        burn_in: ``K``, steps that only update the state.
        learn_starts: whether all ``T`` steps are learned steps (``T' = T``), and not only those
            from ``K`` on (``T' = T - K``).
    """
    learned = cut_burn_in(windows, burn_in)
    if burn_in:
        write_initial_states(network, windows, learned, burn_in)
    if learn_starts:
        learned = _prepend_burn_in(network, windows, learned, burn_in)
    out = network.run_sequences(learned)
    with torch.no_grad():
        after = network.run_step(_select_steps_after(network, learned, out, ends))
    value, value_after = out.get(value_key), after.get(value_key)
    return WindowValues(value, value_after)


def find_steps_after_starts(
    network: RecurrentNetwork, windows: TensorDictBase, steps: int
) -> Tensor:
    """Return which of the first steps follow an episode start in their window.

    Their states do not depend on the stored state, so they are never stale. Of a network without
    flags, a feed-forward one, that holds for all steps.

    Args:
        network: whose ``is_init`` flags are read.
        windows: ``[B, T]``.
        steps: number of first steps.

    Returns:
        Bool ``[B, steps]``.
    """
    read = windows.get(network.input_keys[0])
    found = read.new_ones(windows.shape[0], steps, dtype=torch.bool)
    for key in network.init_keys:
        flags = read_is_init(windows, key)[:, :steps]
        found = found & (flags.flatten(2).cumsum(1) > 0).all(-1)
    return found


def _prepend_burn_in(
    network: RecurrentNetwork, windows: TensorDictBase, learned: TensorDictBase, burn_in: int
) -> TensorDictBase:
    """Return all steps; the learned part starts from its own initial state at step ``burn_in``.

    A window with an episode start inside the burn-in runs through: its states carry gradient from
    that start on.
    """
    joined = windows.copy()
    restarts = ~find_steps_after_starts(network, windows, burn_in)[:, -1]
    for key in network.state_keys:
        state = learned.get(key)
        stored = windows.get(key, None)
        if stored is None:
            stored = state.new_zeros(*windows.shape, *state.shape[2:])
        joined.set(key, torch.cat([stored[:, :burn_in], state], 1))
    for key in network.init_keys:
        flags = read_is_init(windows, key).clone()
        flags[:, burn_in] |= append_dims(restarts, flags.ndim - 1)
        joined.set(key, flags)
    return joined


def _select_steps_after(
    network: RecurrentNetwork, learned: TensorDictBase, out: TensorDictBase, ends: Tensor
) -> TensorDictBase:
    """Return single steps ``[E]``: the observation after each end, and the state there."""
    step = TensorDict({}, batch_size=[int(ends.sum())], device=learned.device)
    for key in network.input_keys:
        step.set(key, learned.get(next_key(key))[ends])
    for key in network.state_keys:
        step.set(key, out.get(next_key(key))[ends].detach())
    for key in network.init_keys:
        step.set(key, torch.zeros_like(learned.get(key)[ends]))
    return step
