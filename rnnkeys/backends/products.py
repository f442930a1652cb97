"""Products of rows with weights on the CPU, by the faster of torch's two libraries.

``torch.nn.functional.linear`` runs float32 by a BLAS, which is quick to call. oneDNN takes some ten
microseconds longer to call and, on many CPUs, half the time for a large product.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from .._compat import has_onednn_linear, onednn_linear

# Multiplications from which oneDNN's product pays for its call.
_LARGE = 1 << 20


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``; not seen by autograd.

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
        return onednn_linear(x, _without_gaps(weight), bias)
    return F.linear(x, weight, bias)


def _without_gaps(weight: Tensor) -> Tensor:
    """Return a copy if there are gaps between rows: oneDNN then takes a thousand times as long."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


_has_onednn = functools.cache(has_onednn_linear)
