"""Statistics over valid steps."""

from __future__ import annotations

import pytest
import torch

from rnnkeys.objectives.valid_steps import standardize


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 300.0])
def test_standardize_of_half_precision_is_that_of_float32(dtype: torch.dtype, size: float) -> None:
    x = (size * torch.randn(6)).to(dtype)
    mask = torch.arange(6) < 5
    expected = standardize(x.float(), mask, min_std=1e-8)
    actual = standardize(x, mask, min_std=1e-8)
    assert actual.dtype == dtype and torch.equal(actual, expected.to(dtype))
