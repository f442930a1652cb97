"""Valid masks of padded sequences."""

from __future__ import annotations

import torch
from tensordict import TensorDict, UnbatchedTensor

from rnnkeys.sequences import zero_masked


def test_zero_masked_leaves_entries_without_steps_alone():
    batch = TensorDict({"x": torch.ones(2, 3)}, [2, 3])
    batch["table"] = UnbatchedTensor(torch.arange(7.0))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    masked = zero_masked(batch, mask)
    assert torch.equal(masked["x"], mask.float())
    assert torch.equal(torch.as_tensor(masked["table"].data), torch.arange(7.0))


def test_zero_masked_zeroes_integers_only_if_asked_and_flags_never():
    entries = {"reward": torch.ones(3), "action": torch.ones(3).long(), "done": torch.ones(3) > 0}
    batch, mask = TensorDict(entries, [3]), torch.tensor([True, True, False])
    valid = mask.float().tolist()
    for integers in (False, True):
        masked = zero_masked(batch, mask, integers=integers)
        assert masked["reward"].tolist() == valid
        assert masked["action"].tolist() == (valid if integers else [1, 1, 1])
        assert masked["done"].all()


def test_zero_masked_without_padding_returns_the_batch_itself():
    batch = TensorDict({"reward": torch.ones(3)}, [3])
    assert zero_masked(batch, torch.ones(3, dtype=torch.bool)) is batch
