"""What is read from the workspace of torch's LSTM kernel on the CPU."""

from __future__ import annotations

import numpy as np

from rnnkeys.backends.onednn import _agree


def test_agree_with_values_that_are_not_finite_is_false_and_silent() -> None:
    gates, before = np.full((1, 16), np.inf), np.zeros((1, 4))
    assert not _agree(gates, before, np.zeros((1, 4)))
    assert _agree(np.zeros((1, 16)), before, np.zeros((1, 4)))
