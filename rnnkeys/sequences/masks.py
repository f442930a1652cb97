"""Valid masks of padded sequences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase, UnbatchedTensor
from tensordict.utils import NestedKey
from torch import Tensor
from torch.compiler import is_compiling

from ..checks import as_int, find_mask_problems, find_type_problems, raise_first
from ..keys import MASK_KEY, next_key


def sequence_mask(lengths: Tensor, max_len: int | None = None) -> Tensor:
    """Return the valid mask of padded sequences.

    Args:
        lengths: integers ``[*]``.
        max_len: ``T``; by default the longest length.

    Returns:
        Bool ``[*, T]``, True before each length.

    Raises:
        TypeError: if ``lengths`` is not a tensor of integers.
        ValueError: if a length is negative or more than ``max_len``.

    Examples:
        >>> sequence_mask(torch.tensor([1, 3]))
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths must be a tensor of integers. Got {lengths!r}. [argument]")
    longest = int(lengths.max()) if lengths.numel() else 0
    max_len = longest if max_len is None else as_int("max_len", max_len, 0)
    if longest > max_len or (lengths < 0).any():
        raise ValueError(
            f"lengths must be between 0 and max_len={max_len}. Got {lengths.tolist()}: raise "
            "max_len, or clamp the lengths."
        )
    return torch.arange(max_len, device=lengths.device) < lengths.unsqueeze(-1)


def read_mask(batch: TensorDictBase, reader: str = "a loss") -> Tensor | None:
    """Return the valid mask of a batch in the shape of the batch, or None without one.

    Args:
        batch: sequences ``[*, T]``, with the mask, bool ``[*, T]`` or ``[*, T, 1]``, at
            ``("collector", "mask")``.
        reader: who reads the batch, for error messages.

    Returns:
        Bool ``[*, T]``, False at padding.

    Raises:
        TypeError: if the mask is not bool.
        ValueError: if there is not one value for each step.

    Examples:
        >>> from tensordict import TensorDict
        >>> mask = torch.ones(2, 5, 1, dtype=torch.bool)
        >>> read_mask(TensorDict({"collector": {"mask": mask}}, [2, 5])).shape
        torch.Size([2, 5])
    """
    raise_first(find_type_problems(batch, reader))
    mask = batch.get(MASK_KEY, None)
    if mask is None:
        return None
    raise_first(find_mask_problems(batch, reader))
    return mask.reshape(batch.batch_size)


def append_dims(mask: Tensor, ndim: int) -> Tensor:
    """Append dimensions of size 1 to a mask of steps, so that it broadcasts with an entry.

    Args:
        mask: ``[*batch]``.
        ndim: number of dimensions of the entry, ``[*batch, ...]``.

    Examples:
        >>> append_dims(torch.ones(2, 5), 4).shape
        torch.Size([2, 5, 1, 1])
    """
    return mask.reshape((*mask.shape, *[1] * (ndim - mask.ndim)))


def zero_masked(
    batch: TensorDictBase, mask: Tensor, *, integers: bool = False, finite: bool = True
) -> TensorDictBase:
    """Zero out entries at padding steps.

    A loss that multiplies padding by zero turns a NaN there into a NaN gradient; a zero it leaves
    alone.

    Args:
        batch: sequences ``[*, T]``; it stays as it is.
        mask: bool ``[*, T]``, False at padding.
        integers: whether to zero out integers too, such as actions out of range.
        finite: whether to zero out finite floats too, and not only NaN and infinities.

    Returns:
        A copy; the batch itself if it is in CPU memory and nothing is masked.

    Raises:
        TypeError: if ``batch`` is not a TensorDict.
        ValueError: if the mask has another shape.

    Examples:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"reward": torch.tensor([1.0, float("nan")])}, [2])
        >>> zero_masked(batch, torch.tensor([True, False]))["reward"]
        tensor([1., 0.])
    """
    raise_first(find_type_problems(batch, "zero_masked"))
    if mask.shape != batch.batch_size:
        raise ValueError(
            f"mask must have the shape of the batch, {list(batch.batch_size)}. Got "
            f"{list(mask.shape)}. [mask-shape]"
        )
    # Elsewhere than on the CPU a look at values waits for the device.
    if not is_compiling() and mask.device.type == "cpu" and bool(mask.all()):
        return batch

    def fill(entry: Tensor) -> Tensor:
        if isinstance(entry, UnbatchedTensor):
            return entry  # it has no steps
        if not (entry.is_floating_point() or (integers and entry.dtype.is_signed)):
            return entry
        padding = append_dims(~mask.to(entry.device), entry.ndim)
        return entry.masked_fill(padding if finite else padding & ~entry.isfinite(), 0)

    if isinstance(batch, LazyStackedTensorDict):
        batch = batch.contiguous()  # apply() would run on each of its parts
    filled: Any = batch.apply(fill)
    return filled


def allow_where_empty(batch: TensorDictBase, mask_keys: Iterable[NestedKey]) -> TensorDictBase:
    """Allow all actions at steps that allow none: at padding, and after terminal steps.

    No value of such a step counts. Without any allowed action it is infinite or NaN, which a
    multiplication by zero does not remove.

    Args:
        batch: sequences ``[*, T]``; it stays as it is.
        mask_keys: keys of action masks, bool ``[*, T, A]`` or per agent, in the root and the
            ``next`` tensordict; missing ones are left out.

    Returns:
        The batch, or a shallow copy with other masks.

    Examples:
        >>> from tensordict import TensorDict
        >>> allowed = torch.tensor([[True, False], [False, False]])
        >>> allow_where_empty(TensorDict(mask=allowed, batch_size=[2]), ["mask"])["mask"]
        tensor([[ True, False],
                [ True,  True]])
    """
    changed = batch
    for mask_key in mask_keys:
        for key in (mask_key, next_key(mask_key)):
            allowed = batch.get(key, None)
            if allowed is not None and allowed.dtype is torch.bool:
                changed = batch.copy() if changed is batch else changed
                changed.set(key, allowed | ~allowed.any(-1, keepdim=True))
    return changed
