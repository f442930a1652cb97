"""Burn-in: the first steps of a sequence only update the state that the other steps start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from ..checks import as_int, find_type_problems, raise_first
from ..keys import next_key
from ..modules.network import RecurrentNetwork, as_networks
from ..sequences.segment_starts import expand_flags
from .base import SequenceTransform, prepare_sequences


class BurnIn(SequenceTransform):
    """Run the first steps of every sequence without gradient, and cut them off.

    The remaining steps, from step ``K`` on, start from the recurrent state that the networks have
    now after the first ``K`` steps from the stored state. An episode start inside the burn-in
    resets the state; an episode start at step ``K`` makes the remaining steps start from the state
    that is stored there. See "Recurrent Experience Replay in Distributed Reinforcement Learning",
    Kapturowski et al., 2019 (https://openreview.net/forum?id=r1lyTjAqYX).

    Call it on a batch of windows, or append it to a replay buffer of windows
    (:class:`rnnkeys.transforms.Windows`). For flat slices ``[N]`` of one length, reshape first:
    ``burn_in(buffer.sample().reshape(-1, slice_len))``. For target networks use
    :class:`rnnkeys.objectives.R2D2Loss`, which burns in every network with its own parameters.

    Args:
        networks: a network with recurrent modules inside, or several networks.
        burn_in: ``K``, in steps. 0 changes nothing.

    Raises:
        TypeError: if ``networks`` are not networks.
        ValueError: if ``burn_in`` is negative, if there is no network, or if one contains no
            recurrent module.

    Examples:
        >>> from tensordict import TensorDict
        >>> from rnnkeys import GRUModule
        >>> gru = GRUModule(3, 5, in_key="observation", out_key="embed")
        >>> batch = TensorDict(observation=torch.zeros(2, 7, 3), batch_size=[2, 7])
        >>> batch["is_init"] = torch.zeros(2, 7, 1, dtype=torch.bool)
        >>> BurnIn(gru, 4)(batch)["recurrent_state"].shape
        torch.Size([2, 3, 1, 5])
    """

    usage = "Call it on a batch of windows, or append it to a replay buffer of Windows."

    def __init__(
        self,
        networks: TensorDictModuleBase | Sequence[TensorDictModuleBase],
        burn_in: int,
    ) -> None:
        super().__init__()
        self.burn_in = as_int("burn_in", burn_in, minimum=0)
        # RecurrentNetwork is not an nn.Module: the transform neither owns nor copies the networks.
        self._networks = as_networks(networks)
        if not self._networks:
            raise ValueError("networks must name at least one network. Got []. [network]")
        for network in self._networks:
            network.check_is_recurrent()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the remaining steps with updated initial states; the batch stays as it is.

        Args:
            tensordict: windows ``[*, T]``.

        Returns:
            ``[*, T - K]``.

        Raises:
            KeyError: if ``is_init`` flags or an input are missing.
            ValueError: if the batch is flat, its time is not contiguous, or ``T <= K``.
        """
        raise_first(find_type_problems(tensordict, "BurnIn"))
        if not self.burn_in:
            return tensordict
        if tensordict.ndim < 2:
            raise ValueError(
                f"BurnIn takes windows [*, T]. Got batch size {list(tensordict.batch_size)}. "
                "Reshape slices of one length, burn_in(buffer.sample().reshape(-1, slice_len)); "
                "as a transform of a replay buffer it needs windows (Windows), because slices are "
                "cut after the transforms of a buffer have run."
            )
        pairs = [pair for network in self._networks for pair in network.pairs]
        windows = prepare_sequences(tensordict, pairs, "BurnIn")
        learned = cut_burn_in(windows, self.burn_in)
        for network in self._networks:
            write_initial_states(network, windows, learned, self.burn_in)
        return learned


def cut_burn_in(windows: TensorDictBase, burn_in: int) -> TensorDictBase:
    """Return the steps from ``burn_in`` on, a shallow copy.

    Args:
        windows: ``[*, T]``.
        burn_in: ``K``.

    Returns:
        ``[*, T - K]``.

    Raises:
        ValueError: if no step remains.
    """
    steps = windows.shape[-1]
    if steps <= burn_in:
        raise ValueError(
            f"burn_in={burn_in} leaves no step of windows of {steps} steps. Lower burn_in, or "
            "sample longer windows."
        )
    return cast(TensorDictBase, windows[..., burn_in:]).copy()


@torch.no_grad()
def write_initial_states(
    network: RecurrentNetwork, windows: TensorDictBase, learned: TensorDictBase, burn_in: int
) -> None:
    """Write the states that the remaining steps start from, as the network computes them now.

    Args:
        network: runs over the first steps, in recurrent mode.
        windows: ``[*, T]``, with the stored states (missing states are zeros).
        learned: its steps from ``burn_in`` on, ``[*, T - K]``. The states at its first step are
            written, into new tensors; if ``next`` holds states, so is the state after the first
            step, there and where the second step reads it.
        burn_in: ``K``, at least 1.
    """
    time = windows.ndim - 1
    # One step more than the burn-in, for the state after the first remaining step.
    out = network.run_sequences(cast(TensorDictBase, windows[..., : burn_in + 1]))
    for key, init_key in network.pairs:
        after = out.get(next_key(key))
        entering = after.select(time, burn_in - 1)
        is_start = expand_flags(learned.get(init_key), after).select(time, 0)
        state = learned.get(key, None)
        if state is None:
            state = entering.new_zeros((*learned.batch_size, *after.shape[learned.ndim :]))
        entering = torch.where(is_start, state.select(time, 0), entering)
        learned.set(key, _with_step(state, 0, entering, time))
        after_first = learned.get(next_key(key), None)
        if after_first is None:
            continue
        first = after.select(time, burn_in)
        learned.set(next_key(key), _with_step(after_first, 0, first, time))
        if learned.shape[time] > 1:
            state = learned.get(key)
            is_start = expand_flags(learned.get(init_key), after_first).select(time, 1)
            second = torch.where(is_start, state.select(time, 1), first)
            learned.set(key, _with_step(state, 1, second, time))


def _with_step(states: torch.Tensor, step: int, value: torch.Tensor, time: int) -> torch.Tensor:
    """Return a copy of states with the value of one step replaced."""
    if states.stride(time) == 0 and states.shape[time] > 1:
        # One state for a whole window: that of its first step.
        return states if step else value.unsqueeze(time).expand_as(states)
    states = states.clone(memory_format=torch.contiguous_format)
    states.select(time, step).copy_(value)
    return states
