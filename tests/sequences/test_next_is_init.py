"""Flags in the next tensordict: where they are set, and batches that are rejected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torchrl.data import SliceSampler

from rnnkeys.sequences import set_next_is_init
from tests.support.sequence_data import (
    AGENT_KEY,
    assert_untouched,
    buffer,
    collect,
    tensors,
    with_agents,
)


def test_set_next_is_init_on_flat_slices_flags_slice_starts_and_leaves_the_batch() -> None:
    batch: Any = buffer(collect(), SliceSampler(slice_len=4), batch_size=24).sample()
    before = tensors(batch)
    flagged = set_next_is_init(batch)
    assert_untouched(batch, before)
    expected = batch["is_init"].clone()
    expected[::4] = True
    assert not batch["next", "is_init"].any() and not expected.all()
    assert torch.equal(flagged["next", "is_init"], expected)
    assert torch.equal(flagged["is_init"], expected)
    assert flagged["observation"] is batch["observation"]


def test_set_next_is_init_on_rows_flags_first_steps_in_next_only() -> None:
    data = collect(batch=(3,))
    flagged = set_next_is_init(data)
    expected = data["is_init"].clone()
    expected[:, 0] = True
    assert torch.equal(flagged["next", "is_init"], expected)
    assert torch.equal(flagged["is_init"], data["is_init"])


def test_set_next_is_init_without_flags_after_done_sets_them() -> None:
    data = collect()
    truth = data["is_init"].clone()
    data["is_init"] = torch.zeros_like(truth)
    data["is_init"][0] = True
    flagged = set_next_is_init(data)
    assert truth.sum() > 5
    assert torch.equal(flagged["is_init"], truth)
    assert torch.equal(flagged["next", "is_init"], truth)


def test_set_next_is_init_with_several_keys_flags_each() -> None:
    data = with_agents(collect(batch=(2,)))
    flagged = set_next_is_init(data, ["is_init", AGENT_KEY])
    assert flagged["next", "is_init"].sum() > 4
    agents = flagged["next", "is_init"].unsqueeze(-2).expand(*data.shape, 2, 1)
    assert torch.equal(flagged.get(("next", *AGENT_KEY)), agents)


def test_set_next_is_init_with_flags_per_agent_keeps_agents_apart() -> None:
    data = with_agents(collect())
    alone = torch.rand(60, 2, 1) < 0.2
    data.set(AGENT_KEY, alone)
    batch = data.exclude(("next", "done"), "step_count", "collector")
    flagged = set_next_is_init(batch, AGENT_KEY)
    expected = alone.clone()
    expected[0] = True
    assert torch.equal(flagged.get(("next", *AGENT_KEY)), expected)
    assert not flagged["next", "is_init"].any()


def test_set_next_is_init_twice_equals_once_and_keeps_flags_in_next() -> None:
    data = collect()
    data["next", "is_init"][7] = True
    assert not data["is_init"][7]
    flagged = set_next_is_init(data)
    assert flagged["next", "is_init"][7]
    again = set_next_is_init(flagged)
    assert torch.equal(again["next", "is_init"], flagged["next", "is_init"])


def test_set_next_is_init_without_flags_in_next_adds_them() -> None:
    data = collect().exclude(("next", "is_init"))
    flagged = set_next_is_init(data)
    assert torch.equal(flagged["next", "is_init"], data["is_init"])
    assert ("next", "is_init") not in data.keys(True)


def changed(**entries: Any) -> TensorDictBase:
    return collect(12).update(entries)


BAD: dict[str, tuple[Any, Any, str]] = {
    "no flags": (
        lambda: collect(12).exclude("is_init"),
        KeyError,
        r"'is_init'.*is missing.*observation.*InitTracker.*\[init-key\]",
    ),
    "no next": (
        lambda: collect(12).exclude("next"),
        KeyError,
        r"no 'next' tensordict.*\[next\]",
    ),
    "float flags": (
        lambda: changed(is_init=torch.zeros(12, 1)),
        TypeError,
        r"'is_init' must be bool. Got torch.float32.*\.bool\(\).*\[init-dtype\]",
    ),
    "flags without their last dimension": (
        lambda: changed(is_init=torch.zeros(12, dtype=torch.bool)),
        ValueError,
        r"'is_init' must have the shape.*Got \[12\].*unsqueeze\(-1\).*\[init-shape\]",
    ),
    "flags in next of another shape": (
        lambda: changed(next={"is_init": torch.zeros(12, 1, 1, dtype=torch.bool)}),
        ValueError,
        r"'next', 'is_init'\) must have the shape of 'is_init', \[12, 1\].*\[init-shape\]",
    ),
    "one step": (lambda: collect(12)[0], ValueError, r"Got batch size \[\].*\[no-time\]"),
    "no step": (lambda: collect(12)[:0], ValueError, r"Got batch size \[0\].*\[no-steps\]"),
    "done of bytes": (
        lambda: changed(next={"done": torch.zeros(12, 1, dtype=torch.uint8)}),
        TypeError,
        r"'next', 'done'\) must be bool. Got torch.uint8.*\[done-dtype\]",
    ),
    "done without its last dimension": (
        lambda: changed(next={"done": torch.zeros(12, dtype=torch.bool)}),
        ValueError,
        r"'next', 'done'\) must have the shape.*\[done-shape\]",
    ),
    "single transitions": (
        lambda: collect(12)[torch.tensor([7, 0, 9, 3])],
        ValueError,
        r"Time is not contiguous.*SliceSampler.*set_recurrent_mode.*\[continuity\]",
    ),
    "time first": (
        lambda: collect(12, batch=(2,)).transpose(0, 1).contiguous(),
        ValueError,
        r"\[continuity\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_set_next_is_init_on_a_bad_batch_raises_and_leaves_it(name: str) -> None:
    make, error, text = BAD[name]
    batch = make()
    before = tensors(batch)
    with pytest.raises(error, match=text):
        set_next_is_init(batch)
    assert_untouched(batch, before)


@pytest.mark.parametrize(
    "key, error, text",
    [([], ValueError, "names no key"), (3, TypeError, "must be a key"), ([3], TypeError, "Got 3")],
)
def test_set_next_is_init_with_a_bad_key_raises(key: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        set_next_is_init(collect(12), key)
