"""Batches of windows that no one should make have a defined result, or an error that says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

import rnnkeys
from rnnkeys import recurrent_module
from rnnkeys.objectives import recurrent_loss
from rnnkeys.transforms import BurnIn, RefreshStates, Windows
from tests.objectives.test_r2d2 import MASK, make_loss, make_network, make_windows
from tests.support import target_cases as cases
from tests.support.recurrent import batch, recurrently

NAN = float("nan")
Change = Callable[[Any], None]


def learn(windows: Any, **arguments: Any) -> list[Tensor]:
    """Return the loss of windows, their priorities, and the gradients."""
    loss = make_loss(make_network(0), make_network(1), **arguments)
    value = loss(windows)["loss"]
    value.backward()
    grads = [p.grad for p in loss.parameters() if p.grad is not None]
    return [value.detach(), windows["td_error"], *grads]


def spoil_masked(key: Any, value: float) -> Change:
    """Return a change of an entry at every masked step, or in the window where all are masked."""

    def change(windows: Any) -> None:
        entry = windows.get(key).clone(memory_format=torch.contiguous_format)
        gone = ~windows[MASK]
        entry[gone if key != "priority_weight" else gone.all(1)] = value
        windows.set(key, entry)

    return change


SPOILED: dict[str, Change] = {
    "observations": spoil_masked("observation", NAN),
    "observations behind": spoil_masked(("next", "observation"), NAN),
    "rewards": spoil_masked(("next", "reward"), NAN),
    "states": spoil_masked("recurrent_state", NAN),
    "infinite states": spoil_masked("recurrent_state", float("inf")),
    "weights": spoil_masked("priority_weight", NAN),
    "actions that there are not": spoil_masked("action", -1),
}


@pytest.mark.parametrize("burn_in", [0, 4])
@pytest.mark.parametrize("case", SPOILED)
def test_whatever_stands_at_masked_steps_changes_nothing(case, burn_in):
    clean, spoiled = make_windows(one_hot=False), make_windows(one_hot=False)
    assert torch.equal(clean["observation"], spoiled["observation"])
    SPOILED[case](spoiled)
    for expected, actual in zip(
        learn(clean, burn_in=burn_in), learn(spoiled, burn_in=burn_in), strict=True
    ):
        assert torch.equal(actual, expected) and expected.any()


def test_an_observation_behind_a_terminal_step_is_not_looked_at():
    """Environments that reset themselves leave anything there."""
    clean, spoiled = make_windows(), make_windows()
    terminated = spoiled["next", "terminated"].squeeze(-1)
    assert (terminated & spoiled[MASK]).any()
    spoiled["next", "observation"][terminated] = NAN
    for expected, actual in zip(learn(clean), learn(spoiled), strict=True):
        assert torch.equal(actual, expected)


def test_no_windows_at_all_have_a_loss_of_zero_and_say_so():
    with pytest.warns(UserWarning, match="leaves no step"):
        value, priorities, *grads = learn(make_windows()[:0].clone())
    assert value == 0 and priorities.shape == (0, 11)
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize(
    "mask", [torch.ones(7, 11), torch.ones(7, 11).long(), torch.ones(7, 11, 2).bool()]
)
def test_a_mask_that_is_none_is_refused(mask):
    windows = make_windows()
    windows[MASK] = mask
    with pytest.raises(ValueError, match=r"mask \('collector', 'mask'\) must be bool.*\[7, 11\]"):
        learn(windows)


def test_a_mask_may_have_a_last_dimension():
    windows = make_windows()
    expected = learn(windows.clone())
    windows[MASK] = windows[MASK].unsqueeze(-1)
    for one, other in zip(learn(windows), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["DQN double delayed TD0", "DDPG"])
def test_what_is_masked_reaches_nothing_in_losses_of_torchrl(name):
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


def test_burn_in_leaves_masked_nans_behind_what_is_read():
    module = recurrent_module("gru", 3, 5, in_key="observation", out_key="embed")
    data = batch(module, (2, 7), marks=0.0)
    dirty = data.clone()
    dirty["observation"][:, 5:] = NAN
    clean, left = BurnIn(module, 2)(data), BurnIn(module, 2)(dirty)
    assert torch.equal(left["recurrent_state"][:, 0], clean["recurrent_state"][:, 0])
    actual, expected = (recurrently(module, one)["embed"][:, :3] for one in (left, clean))
    assert torch.equal(actual, expected)


def test_slices_that_do_not_divide_the_batch_are_refused():
    module = recurrent_module("gru", 3, 5, in_key="observation", out_key="embed")
    with pytest.raises(ValueError, match="slice_len=4 does not divide a batch of 10 steps"):
        BurnIn(module, 2, slice_len=4)(batch(module, (10,), marks=0.0))
    with pytest.raises(ValueError, match="burn_in=4 leaves nothing of sequences of 4 steps"):
        BurnIn(module, 4, slice_len=4)(batch(module, (8,), marks=0.0))
    with pytest.raises(ValueError, match="slice_len must be a positive int. Got 0"):
        BurnIn(module, 2, slice_len=0)


def test_an_empty_buffer_is_named():
    module = recurrent_module("gru", 3, 5, in_key="observation", out_key="embed")
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10), transform=Windows(4), batch_size=2
    )
    with pytest.raises((KeyError, RuntimeError), match=r"buffer|storage"):
        RefreshStates(module).refresh_buffer(buffer)
