"""The segments of a batch, computed once for all checks that read them."""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from ..keys import as_tuple, next_key
from .masks import append_dims, read_mask
from .segment_starts import find_steps_after_done, read_is_init

_FEATURES = 8


class Segments:
    """Where segments start by the flags at one key, and which steps are inside of them.

    Args:
        batch: sequences ``[*, T]`` whose entries are valid.
        init_key: key of the flags.

    Attributes:
        batch: the batch.
        init_key: key of the flags.
        time: index of the time dimension.
        flags: the flags, bool ``[*, T, 1]`` or per agent ``[*, T, agents, 1]``.
        after_done: steps that follow a ``done`` of the flags' group, in the flags' shape.
        starts: segment starts, in the flags' shape.
        mask: valid mask, bool ``[*, T]``, or None.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> flags = torch.tensor([[True], [False], [True]])
        >>> Segments(TensorDict({"is_init": flags}, [3]), "is_init").carried
        tensor([ True, False])
    """

    def __init__(self, batch: TensorDictBase, init_key: NestedKey) -> None:
        self.batch = batch
        self.init_key = init_key
        self.time = batch.ndim - 1
        self.flags = read_is_init(batch, init_key)
        self.after_done = find_steps_after_done(batch, init_key, self.flags)
        self.starts = self.flags | self.after_done
        self.mask = read_mask(batch)
        inside = self.clear_padding(~self.starts.squeeze(-1))
        # A step is carried if the state before it comes from the step before.
        self.carried = self.drop_first(inside)

    def clear_padding(self, flags: Tensor) -> Tensor:
        """Return bool ``[*, T, ...]`` with those at padding False."""
        if self.mask is None:
            return flags
        return flags & append_dims(self.mask, flags.ndim)

    def drop_first(self, entry: Tensor) -> Tensor:
        """Return the steps from the second one on."""
        return entry.narrow(self.time, 1, max(entry.shape[self.time] - 1, 0))

    def drop_last(self, entry: Tensor) -> Tensor:
        """Return the steps up to the last but one."""
        return entry.narrow(self.time, 0, max(entry.shape[self.time] - 1, 0))

    def read_state(self, key: NestedKey) -> Tensor | None:
        """Return a state that is stored for every step; None if there is none.

        Windows lay out the one state that they store for a window without a copy.
        """
        state = self.batch.get(key, None)
        if state is None or self.batch.shape[self.time] < 2 or state.stride(self.time) == 0:
            return None
        return state

    def read_next_state(self, key: NestedKey, like: Tensor) -> Tensor | None:
        """Return the state after every step; None if there is none of the same shape."""
        after = self.batch.get(next_key(as_tuple(key)), None)
        return None if after is None or after.shape != like.shape else after


def select_features(states: Tensor) -> Tensor:
    """Return a few features of the first layer, which nearly always differ where states do.

    To compare all of them would take several percent of a gradient step.

    Args:
        states: ``[*, L, H]``.

    Returns:
        A view ``[*, min(8, H)]``.

    Examples:
        >>> import torch
        >>> select_features(torch.zeros(2, 7, 1, 64)).shape
        torch.Size([2, 7, 8])
    """
    return states.select(-2, 0).narrow(-1, 0, min(_FEATURES, states.shape[-1]))
