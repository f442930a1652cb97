"""The forms in which callers give ids, and what is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rnnkeys.deploy.ids import as_ids


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (None, [0, 1, 2]),
        (2, [2]),
        (np.int64(2), [2]),
        ("left", ["left"]),
        (b"left", [b"left"]),
        (("left", 1), ["left", 1]),
        ([], []),
        (np.array([2, 0]), [2, 0]),
        (torch.tensor(2), [2]),
        ([torch.tensor(2), np.int64(0), np.array(1)], [2, 0, 1]),
        ([True, False, True], [0, 2]),
        (torch.tensor([False, True, False]), [1]),
    ],
)
def test_as_ids_returns_a_list_of_them(ids: Any, expected: list[Any]) -> None:
    assert as_ids("ids", ids, 3) == expected


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([True, False], "valid_ids is a mask of 2; expected one entry for each of 3"),
        ([0, 1, 0], r"valid_ids must name each environment once. Got \[0, 1, 0\]"),
        ([0, -1], r"ints of at least 0, names, or a mask of bools. Got \[-1\]"),
        ([True, 2], r"Got \[True\]"),
        (1.0, r"Got \[1.0\]"),
        ([None, "left"], r"Got \[None\]"),
        ([[0], 1], r"Got \[\[0\]\]"),
        ([torch.tensor([0, 1])], r"Got \[tensor\(\[0, 1\]\)\]"),
    ],
)
def test_as_ids_of_something_else_raises(ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_ids("valid_ids", ids, 3)
