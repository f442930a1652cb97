"""Matrix products of rows and weights on the CPU, by the faster of torch's two libraries.

``torch.nn.functional.linear`` calls a BLAS for float32. A call of oneDNN costs about ten
microseconds more, but on many CPUs it needs half the time for a large product.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from .._compat import has_onednn_linear, onednn_linear

# Number of multiplications from which oneDNN is faster.
_LARGE = 1 << 20


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``, which autograd does not track.

    Args:
        x: ``[N, K]``.
        weight: ``[M, K]``, any strides.
        bias: ``[M]``.

    Returns:
        ``[N, M]``, contiguous.

    Examples:
        >>> linear(torch.ones(1, 2), torch.ones(3, 2))
        tensor([[2., 2., 2.]])
    """
    is_large = x.shape[0] * weight.numel() >= _LARGE
    if is_large and x.dtype == torch.float32 and x.device.type == "cpu" and _has_onednn():
        return onednn_linear(x, _make_dense(weight), bias)
    return F.linear(x, weight, bias)


def _make_dense(weight: Tensor) -> Tensor:
    """Copy weights with gaps between rows, for which oneDNN is a thousand times slower."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


_has_onednn = functools.cache(has_onednn_linear)
