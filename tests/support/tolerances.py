"""How far two results may be apart: one table, and the one comparison that uses it."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to the whole tensor: ||a - b|| / ||b||. A CPU test in float32 never uses a GPU's "tf32".
TOLERANCE: dict[torch.dtype | str, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    "tf32": 5e-3,
    torch.bfloat16: 5e-2,
}


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return ``||a - b|| / ||b||`` in float64, with ``b`` the trusted one.

    Raises:
        AssertionError: if the shapes differ, or if ``b`` is zero, where a comparison says nothing.
    """
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    a, b = a.detach().double(), b.detach().double()
    norm = b.norm().item()
    assert norm > 0, "the expected tensor is zero everywhere: nothing is compared"
    return (a - b).norm().item() / norm


def assert_equal(a: Tensor, b: Tensor, dtype: torch.dtype | str, what: str = "tensors") -> None:
    """Assert that ``a`` equals the trusted ``b`` within the tolerance of ``dtype``.

    Args:
        a: result under test, any shape.
        b: expected result, of the same shape, not zero everywhere.
        dtype: precision that ``a`` was computed in, a key of ``TOLERANCE``.
        what: name of the compared thing, for the message.

    Raises:
        AssertionError: if the two differ by more, or if one of them is not finite.
    """
    error = relative_error(a, b)
    tolerance = TOLERANCE[dtype]
    # Written so that a NaN fails.
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e} ({dtype})"
