"""What stands at masked steps is nobody's: no loss may see it."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.compiler import is_compiling


def sequence_mask(lengths: Tensor, max_len: int | None = None) -> Tensor:
    """Return the valid mask of padded sequences.

    Args:
        lengths: integers ``[*]``.
        max_len: ``T``; by default the longest length.

    Returns:
        Bool ``[*, T]``, True before each length.

    Raises:
        ValueError: if a length is negative or more than ``max_len``.

    Examples:
        >>> sequence_mask(torch.tensor([1, 3]))
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    longest = int(lengths.max()) if lengths.numel() else 0
    if max_len is None:
        max_len = longest
    if longest > max_len or (lengths < 0).any():
        raise ValueError(
            f"lengths must be between 0 and max_len={max_len}. Got {lengths.tolist()}: raise "
            "max_len, or clamp the lengths."
        )
    return torch.arange(max_len, device=lengths.device) < lengths.unsqueeze(-1)


def zero_masked(
    batch: TensorDictBase, mask: Tensor, *, integers: bool = False, finite: bool = True
) -> TensorDictBase:
    """Put zeros where steps are masked: a NaN there, times zero, would be NaN in the gradient.

    Args:
        batch: ``[*, T]``; it stays as it was.
        mask: bool ``[*, T]``, False where steps are masked.
        integers: put zeros in place of integers too, such as actions that there are not.
        finite: put zeros in place of finite floats too, not only of NaN and infinities.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"reward": torch.tensor([1.0, float("nan")])}, [2])
        >>> zero_masked(batch, torch.tensor([True, False]))["reward"]
        tensor([1., 0.])
    """
    # Elsewhere than on the CPU a look at values waits for the device.
    if not is_compiling() and mask.device.type == "cpu" and bool(mask.all()):
        return batch

    def fill(entry: Tensor) -> Tensor:
        if not (entry.is_floating_point() or (integers and entry.dtype.is_signed)):
            return entry
        where = ~mask.reshape(*mask.shape, *[1] * (entry.ndim - mask.ndim))
        return entry.masked_fill(where if finite else where & ~entry.isfinite(), 0)

    return batch.apply(fill)  # pyright: ignore[reportReturnType]
