"""The comparison that all numbers go through must itself be able to fail."""

from __future__ import annotations

import pytest
import torch

from tests.support.tolerances import TOLERANCE, assert_equal, relative_error


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_assert_equal_holds_up_to_the_tolerance_of_the_dtype_and_no_further(dtype):
    expected = torch.randn(5, 4, dtype=torch.float64)
    assert_equal(expected * (1 + 0.9 * TOLERANCE[dtype]), expected, dtype)
    with pytest.raises(AssertionError, match="y: relative error"):
        assert_equal(expected * (1 + 1.1 * TOLERANCE[dtype]), expected, dtype, "y")


def test_relative_error_is_relative_to_the_whole_tensor():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)


def test_assert_equal_with_zero_raises():
    with pytest.raises(AssertionError, match="zero everywhere"):
        assert_equal(torch.zeros(3), torch.zeros(3), torch.float32)


def test_assert_equal_broadcasts_no_shapes():
    with pytest.raises(AssertionError, match=r"\(3, 1\) and \(3,\)"):
        assert_equal(torch.ones(3, 1), torch.ones(3), torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_assert_equal_of_values_that_are_not_finite_raises(value):
    bad = torch.tensor([1.0, value])
    for a, b in ((bad, torch.ones(2)), (torch.ones(2), bad), (bad, bad)):
        with pytest.raises(AssertionError):
            assert_equal(a, b, torch.bfloat16)
