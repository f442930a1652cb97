"""Recurrent states by id, held in the rows of one tensor for each state key."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ..modules.network import RecurrentNetwork


class StateTable:
    """Holds a recurrent state for each id. Ids may join and leave.

    Args:
        network: names the states and makes the initial ones.
        device: of the states.

    Examples:
        >>> from rnnkeys import GRUModule
        >>> network = RecurrentNetwork(GRUModule(3, 5, in_key="observation", out_key="embed"))
        >>> table = StateTable(network, torch.device("cpu"))
        >>> with table.join(["left", "right"]) as rows:
        ...     table.read(rows).shape
        torch.Size([2])
    """

    def __init__(self, network: RecurrentNetwork, device: torch.device) -> None:
        self.network = network
        self.device = device
        self._rows: dict[Hashable, int] = {}
        self._free: list[int] = []
        self._states = network.initial_states([0]).to(device)
        self._is_init = torch.ones(0, dtype=torch.bool, device=device)
        self.has_written = False  # whether a row holds another state than the initial one

    @property
    def ids(self) -> list[Hashable]:
        """The ids, in the order in which they joined."""
        return list(self._rows)

    def find_rows(self, ids: Iterable[Hashable]) -> Tensor:
        """Return the row of each id.

        Raises:
            ValueError: if an id is unknown.
        """
        ids = list(ids)
        unknown = [one for one in ids if one not in self._rows]
        if unknown:
            raise ValueError(
                f"ids {unknown} are unknown. Known: {self.ids}. An id joins with its first call, "
                "or with reset()."
            )
        return torch.tensor([self._rows[one] for one in ids], dtype=torch.long, device=self.device)

    @contextmanager
    def join(self, ids: Iterable[Hashable]) -> Iterator[Tensor]:
        """Give an initial state to the ids that have none; they leave if the block raises.

        Args:
            ids: distinct ids, known or new.

        Yields:
            The row of each id.
        """
        ids = list(ids)
        new = [one for one in ids if one not in self._rows]
        for one in new:
            if not self._free:
                self._grow()
            self._rows[one] = self._free.pop()
        try:
            yield self.find_rows(ids)
        except BaseException:
            self.remove(new)
            raise

    def _grow(self) -> None:
        old = len(self._is_init)
        new = max(2 * old, 8)
        states = self._states.new_zeros(new)
        states[:old] = self._states
        self._states = cast(TensorDict, states)
        flags = torch.ones(new - old, dtype=torch.bool, device=self.device)
        self._is_init = torch.cat([self._is_init, flags])
        self._free.extend(reversed(range(old, new)))

    def remove(self, ids: Iterable[Hashable]) -> None:
        """Remove ids and their states.

        Raises:
            ValueError: if an id is unknown.
        """
        ids = list(ids)
        self.restart(self.find_rows(ids))
        self._free.extend(self._rows.pop(one) for one in ids)

    def read(self, rows: Tensor) -> TensorDict:
        """Return a copy of the states of some rows, ``[n]``."""
        return cast(TensorDict, self._states[rows])

    def read_flags(self, rows: Tensor) -> Tensor:
        """Return the ``is_init`` flags of some rows, bool ``[n, 1]``."""
        return self._is_init[rows].unsqueeze(-1)

    def write(self, rows: Tensor, states: TensorDictBase) -> None:
        """Replace the states of some rows.

        Where no row has been written since the last restart, the shapes may change: only a call
        shows the number of agents.

        Args:
            rows: ``[n]``.
            states: an entry ``[n, *agents, L, H]`` for each state key.
        """
        for key in self.network.state_keys:
            new = states.get(key).detach()
            held: Any = self._states.get(key)
            if not self.has_written and held.shape[1:] != new.shape[1:]:
                held = held.new_zeros(len(held), *new.shape[1:])
                self._states.set(key, held)
            held[rows] = new.to(held)
        self.has_written = True
        self._is_init[rows] = False

    def restart(self, rows: Tensor, agents: Tensor | None = None) -> None:
        """Set the states of some rows to the initial ones.

        Args:
            rows: ``[n]``.
            agents: bool ``[n, *agents]``: restart these agents only, where a state has agents.
        """
        for key in self.network.state_keys:
            held: Any = self._states.get(key)
            if agents is None:
                held[rows] = 0
            elif held.shape[1:-2] == agents.shape[1:]:
                held[rows] = held[rows].masked_fill(agents[..., None, None], 0)
        if agents is None:
            self._is_init[rows] = True
            # Without a state that counts, another number of agents may come.
            self.has_written = not bool(self._is_init.all())
