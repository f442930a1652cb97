"""Windows: runs of consecutive steps cut out of rows, padded to one length."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from ..keys import MASK_KEY
from .masks import append_dims, sequence_mask


class Spans(NamedTuple):
    """Runs of consecutive steps in rows ``[B, T]``.

    Attributes:
        row: row of each run, int64 ``[N]``.
        first: its first step, int64 ``[N]``.
        length: its number of steps, int64 ``[N]``, at least 1.
    """

    row: Tensor
    first: Tensor
    length: Tensor

    def take(self, index: Any) -> Spans:
        """Return some of the runs: ``index`` as for a tensor."""
        return Spans(self.row[index], self.first[index], self.length[index])


def find_spans(cuts: Tensor, max_length: int | None = None, mask: Tensor | None = None) -> Spans:
    """Cut rows into runs of consecutive steps.

    Args:
        cuts: bool ``[B, T]``, True where a run starts. Every row starts one.
        max_length: longer runs are cut into pieces of this length, counted from their first step.
        mask: bool ``[B, T]``; runs without a True step are left out.

    Returns:
        The runs, in the order of rows and steps.

    Examples:
        >>> find_spans(torch.tensor([[False, False, False, True]]), max_length=2)
        Spans(row=tensor([0, 0, 0]), first=tensor([0, 2, 3]), length=tensor([2, 1, 1]))
    """
    steps = cuts.shape[1]
    cuts = cuts.clone()
    cuts[:, :1] = True
    if max_length is not None:
        step = torch.arange(steps, device=cuts.device)
        start = torch.where(cuts, step, 0).cummax(1).values
        cuts |= (step - start) % max_length == 0
    row, first = cuts.nonzero(as_tuple=True)
    place = row * steps + first
    length = torch.diff(place, append=place.new_tensor([cuts.numel()]))
    spans = Spans(row, first, length)
    if mask is None:
        return spans
    # Number of valid steps before each place.
    valid = nn.functional.pad(mask.flatten().long().cumsum(0), (1, 0))
    return spans.take(valid[place + length] > valid[place])


def cut_windows(
    rows: TensorDictBase, spans: Spans, length: int | None = None
) -> tuple[TensorDictBase, Tensor]:
    """Copy runs of steps into windows of one length; the last step pads those that are shorter.

    Args:
        rows: steps ``[B, T]``.
        spans: the runs, none longer than ``length``.
        length: ``L``; by default that of the longest run.

    Returns:
        Windows ``[N, L]``, and their valid mask, bool ``[N, L]``: False at padding, and where
        ``("collector", "mask")`` of ``rows`` is False.

    Examples:
        >>> from tensordict import TensorDict
        >>> rows = TensorDict({"x": torch.arange(5).unsqueeze(0)}, [1, 5])
        >>> windows, mask = cut_windows(rows, find_spans(torch.zeros(1, 5, dtype=torch.bool), 3))
        >>> windows["x"]
        tensor([[0, 1, 2],
                [3, 4, 4]])
        >>> mask[1]
        tensor([ True,  True, False])
    """
    valid = sequence_mask(spans.length, length)
    # The count of valid steps stays as it is at padding: the last step again.
    step = spans.first.unsqueeze(-1) + valid.cumsum(1) - 1
    # A single index: entries that are not tensors cannot be indexed by several.
    windows: Any = rows.reshape(rows.batch_size.numel())[
        spans.row.unsqueeze(-1) * rows.shape[1] + step
    ]
    mask = rows.get(MASK_KEY, None)
    if mask is not None:
        valid = valid & mask.reshape(rows.batch_size)[spans.row.unsqueeze(-1), step]
    return windows, valid


def flag_padding(windows: TensorDictBase, init_key: NestedKey, lengths: Tensor) -> None:
    """Flag every padding step as a segment start, in place.

    A copy of a step then gives the output that the step itself gives, from the same state.

    Args:
        windows: ``[N, L]``.
        init_key: key of the flags.
        lengths: number of steps before the padding, int64 ``[N]``.

    Examples:
        >>> from tensordict import TensorDict
        >>> windows = TensorDict({"is_init": torch.zeros(1, 3, 1, dtype=torch.bool)}, [1, 3])
        >>> flag_padding(windows, "is_init", torch.tensor([2]))
        >>> windows["is_init"].flatten()
        tensor([False, False,  True])
    """
    flags = windows.get(init_key)
    padding = ~sequence_mask(lengths, flags.shape[1])
    windows.set(init_key, flags | append_dims(padding, flags.ndim))
