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
