"""What stands at masked steps is nobody's: no loss may see it."""

from __future__ import annotations

from tensordict import TensorDictBase
from torch import Tensor
from torch.compiler import is_compiling


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
