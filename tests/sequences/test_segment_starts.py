"""Reading is_init flags."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from rnnkeys.sequences.segment_starts import (
    find_done_key,
    find_segment_starts,
    read_is_init,
    set_next_flags,
)


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


def test_find_done_key_prefers_the_group_of_the_flags() -> None:
    flags = torch.zeros(5, 1, dtype=torch.bool)
    batch = TensorDict({"next": {"done": flags}}, [5])
    init_key = ("team", "agents", "is_init")
    assert find_done_key(batch, init_key) == ("next", "done")
    assert find_done_key(batch, init_key, "terminated") is None
    batch["next", "team", "done"] = flags
    assert find_done_key(batch, init_key) == ("next", "team", "done")
    batch["next", "team", "agents", "done"] = flags
    assert find_done_key(batch, init_key) == ("next", "team", "agents", "done")
    assert find_done_key(batch, "is_init") == ("next", "done")


def test_set_next_flags_without_next_raises() -> None:
    batch = TensorDict({"is_init": torch.zeros(5, 1, dtype=torch.bool)}, [5])
    with pytest.raises(KeyError, match="no 'next' tensordict"):
        set_next_flags(batch, ["is_init"])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_find_segment_starts_of_short_rows_follow_every_done(steps: int) -> None:
    done = torch.ones(2, steps, 1, dtype=torch.bool)
    batch = TensorDict({"is_init": ~done, "next": {"done": done}}, [2, steps])
    assert find_segment_starts(batch, "is_init")[0].flatten().tolist() == [
        False,
        *[True] * (steps - 1),
    ]
