"""What the scan's Triton kernels do; run by ``tests/backends/test_triton_interpreted.py``.

There they run in Triton's interpreter on the CPU. ``make test-gpu`` runs this file on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rnnkeys.backends import gated_recurrence, linear_recurrence
from rnnkeys.backends.triton import linear_launch
from tests.support.tolerances import assert_equal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64
# Steps, rows, features: odd sizes, one chunk and several, more columns than a program has.
SHAPES = [(1, 1, 1), (13, 3, 50)]


@pytest.fixture(autouse=True)
def _chunks_of_five(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut time into several chunks; ``(1, 1, 1)`` stays one."""
    monkeypatch.setattr(linear_launch, "_chunk_length", lambda *_: 5)


def draw(shape: tuple[int, ...], dtype: torch.dtype, rate: float, constant: bool) -> Any:
    steps, rows, features = shape
    a = torch.rand((features,) if constant else shape, dtype=dtype, device=DEVICE)
    b, start, grad = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(3))
    reset = torch.rand(steps, rows, device=DEVICE) < rate
    # A start of other strides than the rest.
    return a, b, start.transpose(0, 2).contiguous().transpose(0, 2), reset, grad


@pytest.mark.parametrize("rate", [0.0, 0.15])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_kernels_equal_the_cpu(
    shape: tuple[int, ...], dtype: torch.dtype, constant: bool, rate: float
):
    a, b, start, reset, grad = draw(shape, dtype, rate, constant)
    paired = dtype.is_complex
    expected = linear_recurrence.scan(a, b, start, reset)
    wanted = linear_recurrence.scan_backward(grad, a, expected, start, reset, True)
    expected, *wanted, grad, a, b, start = (
        torch.view_as_real(x).flatten(-2) if paired else x
        for x in (expected, *wanted, grad, a, b, start)
    )
    h = linear_launch.scan(a, b, start, reset, paired)
    assert_equal(h, expected, F64)
    found = linear_launch.scan_backward(grad, a, h, start, reset, True, paired)
    for actual, gradient in zip(found, wanted, strict=True):
        assert_equal(actual, gradient, F64)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_linear_kernels_of_gates_equal_the_cpu(shape: tuple[int, ...]):
    _, _, start, reset, grad = draw(shape, F64, 0.15, False)
    p = torch.randn(*shape[:2], 2 * shape[2], dtype=F64, device=DEVICE)
    h = linear_launch.gated_scan(p, start, reset)
    assert_equal(h, gated_recurrence.forward(p, start, reset), F64)
    found = linear_launch.gated_scan_backward(grad, p, h, start, reset, True)
    wanted = gated_recurrence.backward(grad, p, h, start, reset, True)
    for actual, gradient in zip(found, wanted, strict=True):
        assert_equal(actual, gradient, F64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [6, 10])
def test_linear_kernels_value_that_is_not_finite_does_not_pass_a_reset(bad: float, position: int):
    a, b, start, reset, grad = draw((13, 2, 3), F64, 0.0, False)
    reset[position] = True
    clean = linear_launch.scan(a, b, start, reset)
    expected = linear_launch.scan_backward(grad, a, clean, start, reset, False)[1]
    b[3, 0] = bad
    assert_equal(linear_launch.scan(a, b, start, reset)[position:], clean[position:], F64)
    grad[11, 0] = bad
    actual = linear_launch.scan_backward(grad, a, clean, start, reset, False)[1]
    assert_equal(actual[:position], expected[:position], F64)


def test_linear_kernels_half_precision_scans_in_float32():
    a, b, start, reset, _ = draw((13, 2, 4), F64, 0.1, False)
    expected = linear_recurrence.scan(a, b, start, reset)
    h = linear_launch.scan(a.bfloat16(), b.bfloat16(), start.bfloat16(), reset)
    assert h.dtype == torch.bfloat16
    assert_equal(h.double(), expected, torch.bfloat16)
