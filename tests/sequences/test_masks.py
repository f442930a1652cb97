"""Valid masks of padded sequences."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, UnbatchedTensor

from rnnkeys.sequences import sequence_mask, zero_masked


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


def test_sequence_mask_is_on_the_device_of_the_lengths():
    lengths = torch.tensor([1, 3])
    with torch.device("meta"):  # where new tensors are, unless a device is named
        mask = sequence_mask(lengths, 4)
    assert mask.sum(-1).tolist() == [1, 3]


def test_sequence_mask_is_true_before_each_length():
    lengths = torch.tensor([[0, 2], [3, 1]])
    mask = sequence_mask(lengths, 4)
    assert mask.shape == (2, 2, 4) and torch.equal(mask.sum(-1), lengths)
    assert mask[1, 0].tolist() == [True, True, True, False]
    assert sequence_mask(torch.zeros(0, dtype=torch.long)).shape == (0, 0)
    for wrong in ([5], [-1]):
        with pytest.raises(ValueError, match=r"between 0 and max_len=4"):
            sequence_mask(torch.tensor(wrong), 4)
