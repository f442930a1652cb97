"""Reading is_init flags."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from rnnkeys.sequences.segment_starts import read_is_init


@pytest.mark.parametrize(
    ("flags", "error", "text"),
    [
        (None, KeyError, "is_init"),
        (torch.zeros(2, 5, 1), TypeError, "bool"),
        (torch.zeros(2, 5, dtype=torch.bool), ValueError, "shape"),
    ],
)
def test_read_is_init_of_bad_flags_raises(flags: Any, error: Any, text: str) -> None:
    entries = {} if flags is None else {"is_init": flags}
    with pytest.raises(error, match=text):
        read_is_init(TensorDict(entries, [2, 5]), "is_init")
