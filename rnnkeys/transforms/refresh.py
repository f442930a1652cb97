"""Recompute the recurrent states that a replay buffer stores."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import ListStorage, TensorStorage

from ..checks import as_int
from ..keys import MASK_KEY, next_key
from ..modules.network import RecurrentNetwork
from .base import prepare_sequences
from .windows import EPISODE_KEY, FIRST_KEY


class RefreshStates:
    """Recompute stored recurrent states with the current weights of a network.

    A call takes sequences ``[*, T]`` that hold a state for every step. :meth:`refresh_buffer` takes
    a replay buffer of ``Windows``, and runs the windows of each episode in their order.

    Args:
        network: the network that computes the states, with recurrent modules inside.
        chunk_size: number of windows that run at once.

    Raises:
        ValueError: if the network contains no recurrent module, or ``chunk_size`` is not positive.

    Examples:
        >>> from tensordict import TensorDict
        >>> from rnnkeys import GRUModule
        >>> gru = GRUModule(3, 5, in_key="observation", out_key="embed")
        >>> batch = TensorDict({"observation": torch.zeros(2, 7, 3)}, [2, 7])
        >>> batch["is_init"] = torch.zeros(2, 7, 1, dtype=torch.bool)
        >>> RefreshStates(gru)(batch)["recurrent_state"].shape
        torch.Size([2, 7, 1, 5])
    """

    def __init__(self, network: TensorDictModuleBase, chunk_size: int = 256) -> None:
        self._network = RecurrentNetwork(network)
        self._network.check_is_recurrent()
        self.chunk_size = as_int("chunk_size", chunk_size)

    @torch.no_grad()
    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return a shallow copy with recomputed states, at the root and in ``next``.

        Each segment starts from the state that is stored at its first step, or from zeros.

        Args:
            tensordict: sequences ``[*, T]``; it stays as it is.

        Raises:
            KeyError: if ``is_init`` flags or an input are missing.
            ValueError: if there is no time dimension, or time is not contiguous.
        """
        flagged = prepare_sequences(tensordict, self._network.pairs, "RefreshStates")
        refreshed = self._network.recompute_states(flagged)
        for key in self._network.init_keys:
            refreshed.set(key, tensordict.get(key))
        return refreshed

    def refresh_buffer(self, buffer: Any) -> int:
        """Recompute the states of all windows in a replay buffer, in place.

        The first window of an episode starts from the state that is stored there; each later one
        from the state that the windows before it lead to. Where the buffer has dropped these, the
        oldest window that is left keeps its state.

        Args:
            buffer: a replay buffer whose transform is ``Windows``. Batches that share its memory,
                such as ``buffer[:]``, change with it: clone them to compare.

        Returns:
            The number of windows whose initial state was recomputed.

        Raises:
            KeyError: if the buffer does not hold windows.
            TypeError: if the kind of storage is not supported.
        """
        stored = read_windows(buffer)
        number = self.refresh_windows(stored)
        if isinstance(buffer.storage, ListStorage):
            buffer.storage.set(range(len(stored)), list(stored.unbind(0)))
        return number

    @torch.no_grad()
    def refresh_windows(self, stored: TensorDictBase) -> int:
        """Recompute the states of windows as a buffer stores them, in place.

        Args:
            stored: windows ``[N]`` in any order: whole episodes, or those windows of them that are
                left. :meth:`refresh_buffer` passes all windows of a buffer.

        Returns:
            The number of windows whose initial state was recomputed.

        Raises:
            KeyError: if the items are not windows, or hold no state.
            RuntimeError: if they hold a state for every step, and not one for each window.
        """
        self._check_windows(stored)
        followers = _find_followers(stored)
        level = followers.find_first_windows()
        refreshed = 0
        while level.numel():
            for chunk in level.split(self.chunk_size):
                self._run_windows(stored, chunk, followers)
            level = followers.window[level]
            level = level[level >= 0]
            refreshed += level.numel()
        return refreshed

    def _check_windows(self, stored: TensorDictBase) -> None:
        if stored.get(EPISODE_KEY, None) is None:
            raise KeyError(
                f"There is no {EPISODE_KEY!r} in the buffer, so its items are not windows. Make it "
                "with transform=Windows(...), or call RefreshStates on sequences."
            )
        for key in self._network.state_keys:
            state = stored.get(key, None)
            if state is None:
                raise KeyError(
                    f"There is no state {key!r} in the windows. Collect with the network, and with "
                    "its primers in the environment."
                )

    def _run_windows(self, stored: TensorDictBase, index: Tensor, followers: _Followers) -> None:
        """Run windows, and write the initial states of the windows that follow them."""
        steps = stored.get(MASK_KEY).shape[1]
        windows = cast(TensorDictBase, stored[index])
        rows = windows.select(*self._network.input_keys, *self._network.init_keys)
        rows.batch_size = [len(index), steps]
        for key in self._network.state_keys:
            state = windows.get(key)
            rows.set(key, state.unsqueeze(1).expand(-1, steps, *state.shape[1:]))
        out = self._network.run_sequences(rows)
        following = followers.window[index]
        row = (following >= 0).nonzero().squeeze(-1)
        for key in self._network.state_keys:
            after = out.get(next_key(key))
            stored.get(key)[following[row]] = after[row, followers.gap[index][row] - 1]
            after_first = stored.get(next_key(key), None)
            if after_first is not None:
                after_first[index] = after[:, 0]


def read_windows(buffer: Any) -> TensorDictBase:
    """Return all windows of a replay buffer, as :class:`rnnkeys.transforms.Windows` stores them.

    Args:
        buffer: a replay buffer whose transform is ``Windows``.

    Returns:
        ``[N]``. The tensors are those of the storage, or copies if the storage is a list.

    Raises:
        TypeError: if the kind of storage is not supported.
    """
    storage = buffer.storage
    if isinstance(storage, TensorStorage):
        return storage[:]
    if isinstance(storage, ListStorage):
        items: Any = [storage[index] for index in range(len(storage))]
        return cast(TensorDictBase, torch.stack(items))
    raise TypeError(
        "Windows are read from storages of tensors (LazyTensorStorage, LazyMemmapStorage) and of "
        "lists (ListStorage, CompressedListStorage, LazyStackStorage). Got a "
        f"{type(storage).__name__}."
    )


class _Followers(NamedTuple):
    """Which window continues which.

    Attributes:
        window: for each window the index of the one that continues its episode, or -1, int64
            ``[N]``.
        gap: how many steps later that window starts, int64 ``[N]``.
    """

    window: Tensor
    gap: Tensor

    def find_first_windows(self) -> Tensor:
        """Return the indices of the windows that follow no other one."""
        is_first = torch.ones_like(self.window, dtype=torch.bool)
        is_first[self.window[self.window >= 0]] = False
        return is_first.nonzero().squeeze(-1)


def _find_followers(stored: TensorDictBase) -> _Followers:
    episode, first = stored.get(EPISODE_KEY).cpu(), stored.get(FIRST_KEY).cpu()
    real = stored.get(MASK_KEY).sum(-1).cpu()
    order = torch.argsort(first, stable=True)
    order = order[torch.argsort(episode[order], stable=True)]
    one, two = order[:-1], order[1:]
    step = first[two] - first[one]
    joins = (episode[one] == episode[two]) & (step > 0) & (step <= real[one])
    followers = _Followers(torch.full_like(first, -1), torch.zeros_like(first))
    followers.window[one[joins]], followers.gap[one[joins]] = two[joins], step[joins]
    return followers
