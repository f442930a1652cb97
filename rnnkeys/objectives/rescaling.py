"""Values on a compressed scale, so that one network can learn small and large ones."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import Tensor


def value_rescale(x: Tensor, eps: float = 1e-3) -> Tensor:
    r"""Compress returns so that one network can learn values of very different size.

    .. math:: h(x) = \operatorname{sgn}(x)\,(\sqrt{|x| + 1} - 1) + \varepsilon x

    computed as :math:`x / (\sqrt{|x| + 1} + 1) + \varepsilon x`, which does not cancel near zero.
    See "Observe and Look Further: Achieving Consistent Performance on Atari", Pohlen et al., 2018
    (arXiv:1805.11593).

    Args:
        x: values in reward units, any shape, floating dtype.
        eps: slope at infinity, > 0; keeps the inverse Lipschitz. 1e-3 is R2D2's.

    Returns:
        Rescaled values, same shape and dtype; ``value_rescale_inverse`` undoes it.

    Raises:
        ValueError: if ``eps <= 0``.

    Examples:
        >>> import torch
        >>> value_rescale(torch.tensor([0.0, 100.0]))
        tensor([0.0000, 9.1499])
    """
    eps = as_eps(eps)
    return x / ((x.abs() + 1).sqrt() + 1) + eps * x


def value_rescale_inverse(y: Tensor, eps: float = 1e-3) -> Tensor:
    r"""Undo :func:`value_rescale`.

    .. math::
        h^{-1}(y) = \operatorname{sgn}(y)\, s (s + 2), \quad
        s = \frac{2 |y|}{b + \sqrt{b^2 + 4 \varepsilon |y|}}, \quad b = 1 + 2 \varepsilon

    The textbook form subtracts two numbers that are nearly equal; this one does not.

    Args:
        y: rescaled values, any shape, floating dtype.
        eps: as for ``value_rescale``.

    Returns:
        Values in reward units, same shape and dtype.

    Raises:
        ValueError: if ``eps <= 0``.

    Examples:
        >>> import torch
        >>> value_rescale_inverse(torch.tensor([9.149876]))
        tensor([100.0000])
    """
    eps = as_eps(eps)
    b = 1 + 2 * eps
    s = 2 * y.abs() / (b + (b * b + 4 * eps * y.abs()).sqrt())
    return y.sign() * s * (s + 2)


def as_eps(eps: Any) -> float:
    """Return the slope of the rescaling as a float.

    Raises:
        ValueError: if it is not a number, or not greater than 0.
    """
    is_number = isinstance(eps, Real) and not isinstance(eps, bool)
    if not is_number or not 0 < float(eps) < float("inf"):
        raise ValueError(
            "eps must be a number > 0: without it the inverse is not Lipschitz. Got "
            f"eps={eps!r}; R2D2 takes 1e-3. [argument]"
        )
    return float(eps)
