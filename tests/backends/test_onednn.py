"""What is read from the workspace of torch's LSTM kernel on the CPU."""

from __future__ import annotations

import numpy as np
import torch

from rnnkeys.backends.onednn import _agree, can_run


def test_agree_with_values_that_are_not_finite_is_false_and_silent() -> None:
    gates, before = np.full((1, 16), np.inf), np.zeros((1, 4))
    assert not _agree(gates, before, np.zeros((1, 4)))
    assert _agree(np.zeros((1, 16)), before, np.zeros((1, 4)))


def test_can_run_takes_float32_in_cpu_memory_alone() -> None:
    assert can_run(torch.zeros(1)) == torch.backends.mkldnn.is_available()
    assert not can_run(torch.zeros(1, dtype=torch.float64))
    assert not can_run(torch.zeros(1, device="meta"))
