"""Stored states brought up to date, and how far they were from it."""

from __future__ import annotations

from typing import Any, cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from ..keys import MASK_KEY, next_key
from ..sequences.segment_starts import set_segment_starts
from .burn_in import StateKeys, check_burn_in, split
from .windows import EPISODE_KEY, FIRST_KEY


class RefreshStates:
    """Recomputes stored states with today's weights.

    Called with sequences ``[*, T]`` that hold a state for every step, it writes the states that the
    network has now, each segment from the state stored at its first step. :meth:`refresh_buffer`
    does so for a replay buffer of ``Windows``, over windows of one episode in their order.

    Args:
        network: what computes the states; recurrent modules inside.
        rows: windows that are run at once.

    Raises:
        ValueError: if nothing inside is recurrent.

    Examples:
        >>> from tensordict import TensorDict
        >>> from rnnkeys import GRUModule
        >>> gru = GRUModule(3, 5, in_key="observation", out_key="embed")
        >>> batch = TensorDict({"observation": torch.zeros(2, 7, 3)}, [2, 7])
        >>> batch["is_init"] = torch.zeros(2, 7, 1, dtype=torch.bool)
        >>> RefreshStates(gru)(batch)["recurrent_state"].shape
        torch.Size([2, 7, 1, 5])
    """

    def __init__(self, network: TensorDictModuleBase, rows: int = 256) -> None:
        self._states = StateKeys(network)
        self.rows = rows

    @torch.no_grad()
    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return a shallow copy with today's states, at the root and in the next view.

        Args:
            tensordict: ``[*, T]``; states may be missing (segments then start from zeros).

        Raises:
            KeyError: if the marks or an input are missing.
            ValueError: if there is no time dimension.
        """
        marked = set_segment_starts(tensordict, self._states.init_keys)
        out = self._states.run(marked)
        time = tensordict.ndim - 1
        refreshed = tensordict.copy()
        for key, init_key in self._states.pairs:
            after = out.get(next_key(key))
            stored = tensordict.get(key, None)
            stored = torch.zeros_like(after) if stored is None else stored
            marks = marked.get(init_key)
            marks = marks.reshape(*marks.shape[:-1], *[1] * (after.ndim - marks.ndim + 1)).clone()
            marks.select(time, 0).fill_(True)
            refreshed.set(key, torch.where(marks, stored, after.roll(1, time)))
            refreshed.set(next_key(key), after)
        return refreshed

    def refresh_buffer(self, buffer: Any) -> int:
        """Bring the states of all windows in a replay buffer up to date, in place.

        An episode's first window starts from the state stored there; each later one from the state
        that the windows before it lead to. Where those are gone from the buffer, the oldest one
        that is left keeps its state.

        Args:
            buffer: a replay buffer that has ``Windows`` as its transform. Batches that share its
                memory, such as ``buffer[:]``, change with it: clone what is compared.

        Returns:
            How many windows start from a state that was recomputed.

        Raises:
            KeyError: if the buffer does not hold windows.
        """
        return self.refresh_windows(buffer.storage[:])

    @torch.no_grad()
    def refresh_windows(self, stored: TensorDictBase) -> int:
        """Bring windows ``[N]`` as a buffer stores them up to date, in place.

        As :meth:`refresh_buffer`, for a part of a buffer or a copy of it.

        Args:
            stored: whole episodes, or those windows of them that are left, in any order.

        Returns:
            How many windows start from a state that was recomputed.

        Raises:
            KeyError: if these are no windows.
        """
        if stored.get(EPISODE_KEY, None) is None:
            raise KeyError(
                f"There is no {EPISODE_KEY!r} in the buffer: its items are no windows. Give it "
                "Windows(...) as its transform, or call RefreshStates on sequences."
            )
        follower, gap = _followers(stored)
        heads = torch.ones(stored.shape[0], dtype=torch.bool)
        heads[follower[follower >= 0]] = False
        level, refreshed = heads.nonzero().squeeze(-1), 0
        while level.numel():
            for chunk in level.split(self.rows):
                self._advance(stored, chunk, follower, gap)
            level = follower[level]
            level = level[level >= 0]
            refreshed += level.numel()
        return refreshed

    def _advance(
        self, stored: TensorDictBase, index: Tensor, follower: Tensor, gap: Tensor
    ) -> None:
        """Run windows, and write the states that their followers start from."""
        steps = stored.get(MASK_KEY).shape[1]
        windows = cast(TensorDictBase, stored[index])
        rows = windows.select(*self._states.inputs, *self._states.init_keys)
        rows.batch_size = [len(index), steps]
        for key in self._states.states:
            state = windows.get(key)
            rows.set(key, state.unsqueeze(1).expand(-1, steps, *state.shape[1:]))
        out = self._states.run(rows)
        behind = follower[index]
        leads = behind >= 0
        at = leads.nonzero().squeeze(-1)
        for key in self._states.states:
            after = out.get(next_key(key))
            stored.get(key)[behind[leads]] = after[at, gap[index][leads] - 1]
            ahead = stored.get(next_key(key), None)
            if ahead is not None:
                ahead[index] = after[:, 0]


def _followers(stored: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Return for each window the one that goes on from it (or -1), and how many steps later."""
    episode, first = stored.get(EPISODE_KEY).cpu(), stored.get(FIRST_KEY).cpu()
    real = stored.get(MASK_KEY).sum(-1).cpu()
    order = torch.argsort(first, stable=True)
    order = order[torch.argsort(episode[order], stable=True)]
    one, two = order[:-1], order[1:]
    step = first[two] - first[one]
    joins = (episode[one] == episode[two]) & (step > 0) & (step <= real[one])
    follower = torch.full_like(first, -1)
    gap = torch.zeros_like(first)
    follower[one[joins]], gap[one[joins]] = two[joins], step[joins]
    return follower, gap


@torch.no_grad()
def state_staleness(
    network: TensorDictModuleBase,
    stored: TensorDictBase,
    refreshed: TensorDictBase,
    burn_in: int = 0,
    value_key: NestedKey = "action_value",
) -> dict[str, Tensor]:
    r"""Tell how far values from stored states are from those of states that are up to date.

    .. math:: \Delta Q = \lVert q(\text{stored}) - q(\text{true}) \rVert_2 / |\max_a q(\text{true})|

    at the first and at the last step behind the burn-in. See "Recurrent Experience Replay in
    Distributed Reinforcement Learning", Kapturowski et al., 2019, section 3.

    Args:
        network: that writes the values.
        stored: windows ``[N, L]`` as they were stored.
        refreshed: the same windows, with states recomputed from their episodes' starts, such as by
            ``RefreshStates``.
        burn_in: ``K``, run from either state.
        value_key: of the values ``[N, L, A]``.

    Returns:
        ``"first"`` and ``"last"``, each ``[N]``: the last one is at the last unmasked step. NaN
        where a window has no unmasked step behind the burn-in.

    Raises:
        ValueError: if shapes differ, or if the burn-in leaves nothing.

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
    check_burn_in(burn_in)
    if stored.shape != refreshed.shape or stored.ndim != 2:
        raise ValueError(
            f"stored and refreshed must be the same windows [N, L]. Got {list(stored.shape)} and "
            f"{list(refreshed.shape)}."
        )
    split(stored, burn_in)
    states = StateKeys(network, in_sequences=False)
    stale, true = (states.run(w).get(value_key)[:, burn_in:] for w in (stored, refreshed))
    distance = (stale - true).norm(dim=-1) / true.amax(-1).abs()
    mask = stored.get(MASK_KEY, None)
    mask = torch.ones_like(distance, dtype=torch.bool) if mask is None else mask[:, burn_in:]
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)
    measured = distance.masked_fill(~mask, float("nan"))
    first = mask.int().argmax(-1)
    rows = torch.arange(len(distance), device=mask.device)
    return {"first": measured[rows, first], "last": measured[rows, last]}
