"""Flags in the ``next`` tensordict, for losses that people write themselves."""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from ..checks import raise_first
from ..keys import as_keys
from .check_sequences import find_sequence_problems
from .segment_starts import set_next_flags


def set_next_is_init(
    batch: TensorDictBase, init_key: NestedKey | list[NestedKey] = "is_init"
) -> TensorDictBase:
    """Return a shallow copy of a batch with segment starts flagged at ``("next", "is_init")`` too.

    A loss that bootstraps runs its network on ``batch["next"]`` as on a sequence. InitTracker
    leaves ``("next", "is_init")`` False, so that sequence would run on across slices and episodes.
    With the flags each of its segments starts from the state stored at ``("next", state)``.
    ``rnnkeys.objectives.recurrent_loss`` does this by itself; call this function before a loss of
    your own.

    Args:
        batch: sequences ``[*, T]``, or slices laid end to end ``[N]``, with a ``next`` tensordict.
            It stays as it is.
        init_key: key of the flags, or a list of keys.

    Returns:
        A TensorDict that shares every other tensor with ``batch``.

    Raises:
        KeyError: if flags or ``next`` are missing.
        TypeError: if flags, ``done`` or the mask are not bool.
        ValueError: if a shape is wrong, or if time is not contiguous.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> flags = torch.tensor([[True], [False], [True]])
        >>> batch = TensorDict({"is_init": flags, "next": {"is_init": flags & False}}, [3])
        >>> set_next_is_init(batch)["next", "is_init"].flatten()
        tensor([ True, False,  True])
    """
    keys = as_keys(init_key)
    raise_first(find_sequence_problems(batch, keys, reader="set_next_is_init"))
    return set_next_flags(batch, keys)
