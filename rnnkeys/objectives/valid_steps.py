"""Statistics over the valid steps of a padded batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..sequences import append_dims


def expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Bring a valid mask to the shape of an entry whose first dimensions it has.

    Args:
        mask: bool ``[*batch]``, ``[*batch, 1]`` or per agent ``[*batch, agents]``.
        like: ``[*batch, ...]``.

    Returns:
        Bool, in the shape of ``like``.

    Examples:
        >>> expand_mask(torch.ones(2, 5, 1, dtype=torch.bool), torch.zeros(2, 5)).shape
        torch.Size([2, 5])
    """
    while mask.ndim > like.ndim and mask.shape[-1] == 1:
        mask = mask.squeeze(-1)
    return append_dims(mask, like.ndim).expand_as(like)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Return the mean of the values whose mask is True; 0 if there is none.

    Args:
        x: values.
        mask: bool, in the shape of ``x``.
        dim: dimension to reduce; by default all.

    Examples:
        >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    kept = torch.where(mask, x, 0)
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Return the variance (divided by ``n``) of valid values along the first dimension.

    Examples:
        >>> masked_variance(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor(1.)
    """
    mean = masked_mean(x, mask, 0)
    return masked_mean((torch.where(mask, x, mean) - mean).square(), mask, 0)


def fill_with_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Replace masked values by the mean of the others, so that the mean of all is theirs.

    Examples:
        >>> fill_with_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor([1., 3., 2.])
    """
    return torch.where(mask, x, masked_mean(x.detach(), mask))


def standardize(
    x: Tensor, mask: Tensor, exclude_dims: Iterable[int] = (), min_std: float = 1e-6
) -> Tensor:
    """Bring valid values to mean 0 and standard deviation 1; the others become 0.

    The standard deviation is the unbiased one, as of ``Tensor.std``. A single value, which has
    none, is left as it is. float16 and bfloat16 are computed in float32, where ``min_std`` is not
    zero and a sum of squares does not overflow.

    Args:
        x: values.
        mask: bool, in the shape of ``x``.
        exclude_dims: dimensions, such as that of the agents, whose entries have statistics of
            their own.
        min_std: least standard deviation to divide by.

    Returns:
        In the shape of ``x``.

    Examples:
        >>> standardize(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    excluded = {dim % x.ndim for dim in exclude_dims}
    dims = [dim for dim in range(x.ndim) if dim not in excluded]
    if not dims:
        return torch.where(mask, x, 0)
    number = mask.sum(dims, keepdim=True)
    dtype, x = x.dtype, x.float() if x.dtype.itemsize < 4 else x
    kept = torch.where(mask, x, 0)
    mean = kept.sum(dims, keepdim=True) / number.clamp(min=1)
    centered = torch.where(mask, x - mean, 0)
    variance = centered.square().sum(dims, keepdim=True) / (number - 1).clamp(min=1)
    return torch.where(number > 1, centered / variance.sqrt().clamp(min=min_std), kept).to(dtype)


def effective_sample_size(log_weight: Tensor, mask: Tensor) -> Tensor:
    r"""Return the effective sample size of importance weights, relative to the number of samples.

    .. math:: \frac{1}{n} \frac{(\sum_i w_i)^2}{\sum_i w_i^2}

    Args:
        log_weight: ``log(w)``, ``[n, ...]``.
        mask: bool, in the shape of ``log_weight``; other samples have no weight.

    Returns:
        ``[...]``; 0 where there is no sample.

    Examples:
        >>> effective_sample_size(torch.zeros(3), torch.tensor([True, True, False]))
        tensor(1.)
    """
    weight = log_weight.masked_fill(~mask, -torch.inf)
    size = (2 * weight.logsumexp(0) - (2 * weight).logsumexp(0)).exp()
    number = mask.sum(0)
    return torch.where(number > 0, size / number.clamp(min=1), 0)
