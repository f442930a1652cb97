"""Invalid batches of windows have a defined result, or raise an error with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import rnnkeys
from rnnkeys.objectives import recurrent_loss
from tests.support import target_cases as cases
from tests.support.r2d2 import MASK

NAN = float("nan")
Change = Callable[[Any], None]


@pytest.mark.parametrize("name", ["DQN double delayed TD0", "DDPG"])
def test_recurrent_loss_padding_has_no_effect(name):
    case = next(one for one in cases.CASES if one.name == name)
    setup = case.make(rnnkeys, "gru")
    loss = recurrent_loss(setup.loss)
    clean = cases.windows(case, setup.policy)
    mask = torch.ones(clean.shape, dtype=torch.bool)
    mask[::2, 2:] = False
    clean[MASK] = mask
    spoiled = clean.clone()
    for entry in spoiled.values(True, True):
        if entry.is_floating_point():
            entry[~mask] = NAN
    results = []
    for data in (clean, spoiled):
        loss.zero_grad()
        losses = [value for key, value in loss(data).items() if key.startswith("loss_")]
        losses = losses or [loss(data)["loss"]]
        torch.stack(losses).sum().backward()
        grads = [p.grad.clone() for p in loss.parameters() if p.grad is not None]
        results.append([torch.stack(losses).detach(), *grads])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected) and actual.isfinite().all()
    assert spoiled["observation"][~mask].isnan().all()
    clean[MASK] = torch.zeros_like(mask)
    with pytest.raises(ValueError, match="False everywhere"):
        loss(clean)
