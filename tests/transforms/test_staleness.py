"""State staleness is the measure of the R2D2 paper."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torchrl.data import LazyTensorStorage, ListStorage, TensorDictReplayBuffer

from rnnkeys import recurrent_module
from rnnkeys.transforms import BurnIn, RefreshStates, Windows, measure_staleness, state_staleness
from rnnkeys.transforms.staleness import value_discrepancy
from tests.support.recurrent import batch, recurrently
from tests.support.tolerances import assert_equal
from tests.support.windows import collect_episodes, disturb, make_policy


def test_compute_staleness_equals_the_papers_measure(float64: None):
    policy = make_policy("gru")
    data: Any = collect_episodes(policy, [[24]])
    disturb(policy)
    stored = cast(Any, Windows(8, "null")(data))
    true = Windows(8, "null")(RefreshStates(policy)(data))
    found = state_staleness(policy, stored, true, burn_in=2)
    q, q_true = (recurrently(policy, w)["action_value"] for w in (stored, true))
    top = q_true[:, 2:].flatten(1).max(-1).values.abs()  # of the learned steps
    for name, t in (("first", 2), ("last", 7)):
        expected = ((q[:, t] - q_true[:, t]) ** 2).sum(-1).sqrt() / top
        assert_equal(found[name], expected, torch.float64, name)
    assert found["first"][0] == 0  # the first window starts with its episode
    left = recurrently(policy, BurnIn(policy, 2)(stored))["action_value"]
    assert_equal(left, q[:, 2:], torch.float64)


def test_compute_staleness_padding_is_not_measured():
    policy = make_policy("gru")
    data: Any = collect_episodes(policy, [[10]])
    stored = cast(Any, Windows(8, "null")(data))
    other = stored.clone()
    other["recurrent_state"] = other["recurrent_state"] + 1
    whole = state_staleness(policy, stored, other, burn_in=1)
    assert (whole["first"] > 0).all() and (whole["last"] > 0).all()
    assert torch.equal(whole["first"][1], whole["last"][1])  # one valid step after the burn-in
    nothing = state_staleness(policy, stored, other, burn_in=3)
    assert nothing["first"][0] > 0 and nothing["first"][1].isnan() and nothing["last"][1].isnan()


def test_value_discrepancy_scale_is_the_greatest_value_of_valid_steps():
    true = torch.tensor([[[1.0, 0.0], [2.0, -4.0], [9.0, 0.0]]])
    mask = torch.tensor([[True, True, False]])
    found = value_discrepancy(true + torch.tensor([3.0, 4.0]), true, mask)
    assert found.tolist() == [[2.5, 2.5, 2.5]]
    assert value_discrepancy(true + torch.tensor([3.0, 4.0]), true)[0, 0] == pytest.approx(5 / 9)


def test_compute_staleness_invalid_windows_raise():
    policy = make_policy("gru")
    data: Any = collect_episodes(policy, [[8], [8]])
    wrong: Any = data.to_dict()
    for pair in ((wrong, data), (data, wrong)):
        with pytest.raises(TypeError, match="state_staleness expects a TensorDict. Got dict"):
            state_staleness(policy, *pair)
    with pytest.raises(ValueError, match="must be the same windows"):
        state_staleness(policy, data, data[:, :3])
    with pytest.raises(ValueError, match="burn_in=8 leaves no step"):
        state_staleness(policy, data, data, burn_in=8)
    module = recurrent_module("gru", 3, 5, in_key="observation", out_key="embed")
    mixed = batch(module, flag_rate=0.0)
    mixed["collector", "traj_ids"] = torch.tensor([[1] * 4 + [2] * 3] * 2)
    with pytest.raises(ValueError, match="not contiguous"):
        state_staleness(module, mixed, mixed, value_key="embed")


@pytest.mark.parametrize("storage", [LazyTensorStorage, ListStorage])
def test_measure_staleness_of_a_buffer_is_the_mean_over_its_windows(storage):
    policy = make_policy("gru")
    data: Any = collect_episodes(policy, [[24], [24]])
    buffer = TensorDictReplayBuffer(
        storage=storage(100), transform=Windows(8, "null"), batch_size=4
    )
    assert math.isnan(measure_staleness(policy, buffer)["first"])
    buffer.extend(data)
    before = [buffer.storage[i]["recurrent_state"].clone() for i in range(len(buffer))]
    assert measure_staleness(policy, buffer)["last"] < 1e-5
    assert measure_staleness(policy, buffer, zero_states=True)["first"] > 1e-4
    disturb(policy)
    inside: Any = Windows(8, "null")(data)
    inside = inside[inside["window", "first"][:, 0] > 0]
    true: Any = Windows(8, "null")(RefreshStates(policy)(data))
    expected = state_staleness(policy, inside, true[true["window", "first"][:, 0] > 0], 2)
    found = measure_staleness(policy, buffer, 2)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.mean().item(), rel=1e-4) and value.mean() > 1e-4
    after = [buffer.storage[i]["recurrent_state"] for i in range(len(buffer))]
    assert all(map(torch.equal, before, after))
    one = measure_staleness(policy, buffer, 2, max_episodes=1)
    assert one["first"] != found["first"]
