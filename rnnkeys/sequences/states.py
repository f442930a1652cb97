"""Flags and states side by side."""

from __future__ import annotations

from torch import Tensor


def expand_flags(flags: Tensor, state: Tensor) -> Tensor:
    """Give flags the dimensions of a state, so that one selects the other.

    Args:
        flags: bool ``[*, T, 1]``, or per agent ``[*, T, agents, 1]``.
        state: ``[*, T, L, H]`` or ``[*, T, agents, L, H]``.

    Returns:
        The flags with dimensions of size 1 at the end, which broadcast with the state.

    Examples:
        >>> import torch
        >>> expand_flags(torch.zeros(2, 7, 1).bool(), torch.zeros(2, 7, 3, 1, 5)).shape
        torch.Size([2, 7, 1, 1, 1])
    """
    return flags.reshape(*flags.shape[:-1], *[1] * (state.ndim - flags.ndim + 1))
