"""Where segments start in a batch of sequences: marks read, checked, carried to the next view."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from ..keys import MASK_KEY, entry_names, next_key


def set_next_is_init(
    tensordict: TensorDictBase, init_keys: Iterable[NestedKey], *, check: bool = True
) -> TensorDictBase:
    """Return a shallow copy whose next view is marked wherever the root starts a segment.

    The next view is the root shifted by one step. Run as a sequence it would go on from one slice
    or episode to the following one; marked, each of its segments starts from the state that is
    stored at ``("next", state)``.

    Args:
        tensordict: ``[*, T]``, time last, with a ``"next"`` sub-TensorDict.
        init_keys: keys of the marks.
        check: whether to check that time is contiguous, which reads values on the host.

    Returns:
        A shallow copy: tensors are shared, the marks are new.

    Raises:
        KeyError: if a mark or ``"next"`` is missing.
        TypeError: if a mark is not bool.
        ValueError: if a mark has a wrong shape, or if time is missing or not contiguous.

    Examples:
        >>> from tensordict import TensorDict
        >>> marks = torch.tensor([[True], [False], [True]])
        >>> batch = TensorDict({"is_init": marks, "next": {"is_init": marks & False}}, [3])
        >>> set_next_is_init(batch, ["is_init"])["next", "is_init"].flatten()
        tensor([ True, False,  True])
    """
    marked = tensordict.copy()
    if tensordict.get("next", None) is None:
        raise KeyError(
            "There is no 'next' entry, so there is no next view to mark. Pass transitions as "
            f"collectors and replay buffers give them. Entries here: {entry_names(tensordict)}."
        )
    for key in init_keys:
        starts = find_segment_starts(tensordict, key)
        if check:
            check_contiguous_time(tensordict, key, starts)
        marked.set(key, starts)
        marked.set(next_key(key), _next_marks(tensordict, key, starts))
    return marked


def find_segment_starts(tensordict: TensorDictBase, init_key: NestedKey) -> Tensor:
    """Return the marks ``[*, T, ..., 1]`` of the root, and of the steps that follow a ``done``.

    A step that follows a ``done`` in its row starts a segment whoever forgot to say so: TorchRL
    0.14.1's ``PrioritizedSliceSampler`` sets ``done`` at the end of every slice and marks no start.

    Raises:
        KeyError: if the mark is missing.
        TypeError: if it is not bool.
        ValueError: if it has a wrong shape, or if there is no time dimension.
    """
    marks = read_is_init(tensordict, init_key)
    done = _done_of(tensordict, init_key, marks)
    if done is None or marks.shape[tensordict.ndim - 1] < 2:
        return marks
    time = tensordict.ndim - 1
    follows = done.narrow(time, 0, done.shape[time] - 1)
    return marks | torch.cat([torch.zeros_like(done.narrow(time, 0, 1)), follows], time)


def set_segment_starts(
    tensordict: TensorDictBase, init_keys: Iterable[NestedKey]
) -> TensorDictBase:
    """Return a shallow copy whose flags are those of :func:`find_segment_starts`.

    Raises:
        KeyError: as :func:`find_segment_starts`, which raises its other errors too.
    """
    marked = tensordict.copy()
    for key in init_keys:
        marked.set(key, find_segment_starts(tensordict, key))
    return marked


def check_mask(mask: Tensor | None) -> None:
    """Raise TypeError if there is a mask that is not bool."""
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(
            f"The mask {MASK_KEY!r} must be bool. Got {mask.dtype}: convert it with .bool()."
        )


def read_is_init(tensordict: TensorDictBase, init_key: NestedKey) -> Tensor:
    """Return the marks stored at ``init_key``, checked.

    Raises:
        KeyError: if there are none.
        TypeError: if they are not bool.
        ValueError: if their shape is not ``[*batch, ..., 1]``, or if there is no time dimension.
    """
    if not tensordict.ndim:
        raise ValueError(
            "A batch of sequences needs a time dimension, the last one of its batch size. Got "
            "batch size []."
        )
    marks = tensordict.get(init_key, None)
    if marks is None:
        raise KeyError(
            f"There is no init key {init_key!r} in this batch, so nothing says where episodes "
            "and slices start. Append InitTracker() to the environment, or all that a policy "
            "needs with env = env.append_transform(get_env_transforms_from_module(policy)); if the "
            f"flags have another name, pass it as init_key=. Entries: {entry_names(tensordict)}."
        )
    _check_marks(init_key, marks, tensordict)
    return marks


def _check_marks(key: NestedKey, marks: Tensor, tensordict: TensorDictBase) -> None:
    if marks.dtype is not torch.bool:
        raise TypeError(
            f"The init key {key!r} must be bool. Got {marks.dtype}: convert it with "
            f"batch.set({key!r}, batch.get({key!r}).bool())."
        )
    if marks.ndim <= tensordict.ndim or marks.shape[-1] != 1:
        raise ValueError(
            f"The init key {key!r} must have the shape [*batch, 1] or, per agent, [*batch, "
            f"agents, 1], with batch {list(tensordict.batch_size)}. Got {list(marks.shape)}: add "
            "the last dimension with .unsqueeze(-1)."
        )


def _next_marks(tensordict: TensorDictBase, key: NestedKey, starts: Tensor) -> Tensor:
    time = tensordict.ndim - 1
    first = torch.ones_like(starts.narrow(time, 0, 1))
    # A loss may lay rows end to end (CrossQ does, SAC does to skip done states), so rows' starts
    # are marked too.
    marks = torch.cat([first, starts.narrow(time, 1, starts.shape[time] - 1)], time)
    stored = tensordict.get(next_key(key), None)
    if stored is None:
        return marks
    _check_marks(next_key(key), stored, tensordict)
    if stored.shape != marks.shape:
        raise ValueError(
            f"The init key {next_key(key)!r} must have the shape of {key!r}, {list(marks.shape)}. "
            f"Got {list(stored.shape)}."
        )
    return marks | stored


def _done_of(tensordict: TensorDictBase, init_key: NestedKey, marks: Tensor) -> Tensor | None:
    """Find the ``done`` beside a mark, or else nearer to the root, in the mark's shape."""
    path = () if isinstance(init_key, str) else init_key[:-1]
    for depth in range(len(path), -1, -1):
        done = tensordict.get(("next", *path[:depth], "done"), None)
        if done is None or done.dtype is not torch.bool or done.shape[-1:] != (1,):
            continue
        if done.shape == marks.shape:
            return done
        if done.ndim == tensordict.ndim + 1 < marks.ndim:
            wide = done.reshape(*tensordict.batch_size, *[1] * (marks.ndim - tensordict.ndim))
            return wide.expand_as(marks)
    return None


def check_contiguous_time(tensordict: TensorDictBase, init_key: NestedKey, starts: Tensor) -> None:
    """Check that every step follows the one before it in its row, unless it is marked as a start.

    What the batch says about time is believed: trajectory ids and step counts, or else the index in
    a replay buffer.

    Raises:
        ValueError: if a step follows one that is not the step before it.
    """
    if tensordict.batch_size[-1] < 2:
        return
    for key, breaks in _time_breaks(tensordict):
        unmarked = breaks & ~starts.flatten(tensordict.ndim).any(-1)[..., 1:]
        mask = tensordict.get(MASK_KEY, None)
        if mask is not None:
            unmarked &= mask.reshape(tensordict.batch_size)[..., 1:]
        if unmarked.any():
            where = (
                unmarked.nonzero()[0]
                + torch.eye(tensordict.ndim, dtype=torch.long)[-1].to(unmarked.device)
            ).tolist()
            raise ValueError(
                f"Time is not contiguous in this batch: {int(unmarked.sum())} of "
                f"{unmarked.numel()} steps do not follow the step before them (see {key!r}; the "
                f"first is at {where}), and {init_key!r} marks no start there. A recurrent "
                "network in recurrent mode needs runs of consecutive steps, each start marked. "
                "Sample slices: SliceSampler, or a sampler of rnnkeys.transforms; to run single "
                "transitions, use set_recurrent_mode(False)."
            )


def _time_breaks(tensordict: TensorDictBase) -> Iterable[tuple[NestedKey, Tensor]]:
    """Yield for each clock where ``[*, T - 1]`` the following step is not the next in time."""
    shape = tensordict.batch_size
    known = False
    ids = tensordict.get(("collector", "traj_ids"), None)
    if ids is not None and ids.numel() == shape.numel():
        known = True
        yield ("collector", "traj_ids"), ids.reshape(shape).diff(dim=-1) != 0
    count = tensordict.get("step_count", None)
    if count is not None and count.numel() == shape.numel():
        known = True
        yield "step_count", count.reshape(shape).diff(dim=-1) != 1
    index = tensordict.get("index", None)
    if index is not None and not known:
        yield from _index_breaks(index, len(shape))


def _index_breaks(index: Tensor, ndim: int) -> Iterable[tuple[NestedKey, Tensor]]:
    if not isinstance(index, Tensor) or index.ndim not in (ndim, ndim + 1):
        return
    index = index.unsqueeze(-1) if index.ndim == ndim else index
    step = index.diff(dim=ndim - 1)
    if not step.any():
        # A buffer of whole windows repeats the window's index along time, which tells nothing.
        return
    # A full buffer goes on at its first place.
    wraps = index.narrow(ndim - 1, 1, index.shape[ndim - 1] - 1)[..., 0] == 0
    follows = ((step[..., 0] == 1) | wraps) & (step[..., 1:] == 0).all(-1)
    yield "index", ~follows
