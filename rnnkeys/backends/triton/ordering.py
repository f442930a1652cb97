"""Order of the segments of a batch, computed on the device.

Each row of a resident kernel's product is one segment: longest first, ``BLOCK_B`` at a time, from
anywhere in the batch. The number of steps is then that of the longest episode, not of the batch,
and no data is gathered or scattered.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def order_segments(is_init: Tensor) -> Tensor:
    """List the segments of a batch by descending length.

    Args:
        is_init: bool ``[B, T]``, True where a segment starts; the first column counts as True.

    Returns:
        int32 ``[2 * B * T + 1]``: the flat positions ``b * T + t`` of the segments' first steps,
        from ``B * T`` on their lengths, and last their number. Unused entries come after all
        segments and have length 0.

    Examples:
        >>> order_segments(torch.tensor([[True, False, True, False, False]])).tolist()
        [2, 0, 1, 3, 4, 3, 2, 0, 0, 0, 2]
    """
    steps = is_init.shape[1]
    t = torch.arange(steps, dtype=torch.int32, device=is_init.device)
    first = is_init | (t == 0)
    # For every position: the first segment start at or after it.
    start = torch.where(first, t, steps).flip(1).cummin(1).values.flip(1)
    end = F.pad(start[:, 1:], (0, 1), value=steps)
    lengths, positions = torch.where(first, end - t, 0).flatten().sort(descending=True, stable=True)
    number = (lengths > 0).sum(dtype=torch.int32)
    return torch.cat([positions.to(torch.int32), lengths, number.view(1)])
