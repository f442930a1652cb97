"""The ids of environments or clients, in the forms in which callers give them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from types import NoneType
from typing import Any

import numpy as np
from torch import Tensor

Ids = Sequence[Hashable] | np.ndarray | Tensor | int | str | None


def as_ids(argument: str, ids: Ids, num_envs: int) -> list[Hashable]:
    """Return ids as a list.

    Args:
        argument: name of the argument, for messages.
        ids: one id or several of them; a bool mask ``[num_envs]``; None for all environments.
        num_envs: number of environments, whose ids are ``0`` to ``num_envs - 1``.

    Raises:
        ValueError: if a mask has another length, or if an id is given twice, is a negative int, or
            is neither an int nor a name.

    Examples:
        >>> as_ids("ids", [True, False, True], 3), as_ids("ids", "left", 3)
        ([0, 2], ['left'])
    """
    if ids is None:
        return list(range(num_envs))
    listed = _as_list(ids)
    if listed and all(isinstance(one, bool) for one in listed):
        if len(listed) != num_envs:
            raise ValueError(
                f"{argument} is a mask of {len(listed)}; expected one entry for each of {num_envs} "
                "environments."
            )
        return [i for i, chosen in enumerate(listed) if chosen]
    wrong = [one for one in listed if not _is_id(one)]
    if wrong:
        raise ValueError(
            f"{argument} must be ints of at least 0, names, or a mask of bools. Got {wrong}."
        )
    if len(set(listed)) < len(listed):
        raise ValueError(f"{argument} must name each environment once. Got {listed}.")
    return listed


def _as_list(ids: Any) -> list[Any]:
    if isinstance(ids, (np.ndarray, Tensor)):
        # Tensors and arrays do not compare by value; their numbers do.
        return ids.reshape(-1).tolist()
    if isinstance(ids, (int, np.integer, str, bytes)):
        return [ids]
    if not isinstance(ids, Iterable):
        return [ids]
    return [one.item() if _is_scalar(one) else one for one in ids]


def _is_scalar(one: Any) -> bool:
    return isinstance(one, (np.generic, np.ndarray, Tensor)) and one.ndim == 0


def _is_id(one: Any) -> bool:
    if isinstance(one, (bool, float, Tensor, NoneType)) or not isinstance(one, Hashable):
        return False
    return not isinstance(one, int) or one >= 0
