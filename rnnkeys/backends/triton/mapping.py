"""Vmap rule of the operators: fold the mapped dimension into the batch, or loop over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import map_by_loop
from .ordering import order_segments

Rule = Callable[..., tuple[tuple[Tensor, ...], tuple[int, ...]]]


def map_rows(
    op: Callable[..., tuple[Tensor, ...]],
    parameters: Sequence[int],
    is_init: int,
    per_element: int | None = None,
) -> Rule:
    """Make a rule that folds the mapped dimension into the batch.

    The rule calls the operator once per element if the parameters differ between elements (an
    ensemble of critics), or if it returns gradients of parameters, which a fold would sum.

    Args:
        op: takes and returns tensors with the batch first, except for parameters.
        parameters: positions of its parameters.
        is_init: position of ``is_init``; the order of segments is at the next position.
        per_element: position of the flag that requests gradients of parameters.
    """
    one_by_one = map_by_loop(op)

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any):
        mapped = any(in_dims[i] is not None for i in parameters)
        if mapped or (per_element is not None and args[per_element]):
            return one_by_one(info, in_dims, *args)
        size = info.batch_size
        folded = [
            _fold(a, d, size) if isinstance(a, Tensor) and i not in parameters else a
            for i, (a, d) in enumerate(zip(args, in_dims, strict=True))
        ]
        folded[is_init + 1] = order_segments(folded[is_init])
        outputs = tuple(_unfold(out, size) for out in op(*folded))
        return outputs, (0,) * len(outputs)

    return rule


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    if tensor.dim() == 1:  # empty: a result that is not wanted
        return torch.stack([tensor] * size)
    return tensor.unflatten(0, (size, tensor.shape[0] // size))
