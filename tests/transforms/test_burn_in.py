"""The steps after a burn-in start from the state that the network has there now."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from rnnkeys import LSTMModule, recurrent_module, set_recurrent_mode
from rnnkeys.keys import as_tuple
from rnnkeys.sequences import find_sequence_problems
from rnnkeys.transforms import BurnIn, RefreshStates, Windows
from tests.support.recurrent import F64, batch, by_hand, chain, recurrently
from tests.support.tolerances import assert_equal
from tests.support.windows import episode

KINDS = ("lstm", "gru", "lstm_ln")
AGENTS: Any = {
    "in_keys": [("agents", "observation"), ("agents", "h"), ("agents", "c"), "is_init"],
    "out_keys": [
        ("agents", "embed"),
        ("next", "agents", "h"),
        ("next", "agents", "c"),
    ],
}


def _module(kind: str = "gru", **arguments: Any) -> Any:
    keys = {} if "in_keys" in arguments else {"in_key": "observation", "out_key": "embed"}
    return recurrent_module(kind, 3, 5, num_layers=2, dtype=F64, **keys, **arguments)


def _with_next(module: Any, data: TensorDictBase) -> TensorDictBase:
    """Add next states, as an older network would have written them: they arrive one step later."""
    for key in module.state_keys:
        after = data.get(key).roll(-1, 1)
        after[:, -1] = torch.randn_like(after[:, -1])
        data.set(("next", *as_tuple(key)), after)
    return data


@pytest.mark.parametrize("flag_rate", [0.0, 0.4])
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_burn_in_remaining_steps_equal_the_whole_sequence_by_hand(kind, states, flag_rate):
    """With resets anywhere, step K included."""
    module = _module(kind)
    data = batch(module, (6, 9), states=states, flag_rate=flag_rate)
    if flag_rate:
        data["is_init"][0, 4] = data["is_init"][1, 2] = True
    zeros = {key: torch.zeros(6, 9, 2, 5, dtype=F64) for key in module.state_keys}
    expected = by_hand(module, data if states else data.copy().update(zeros))
    left = BurnIn(module, 4)(data)
    assert left.shape == (6, 5)
    actual = recurrently(module, left)
    for key in module.out_keys:
        assert_equal(actual.get(key), expected.get(key)[:, 4:], F64, str(key))


def test_burn_in_updates_the_first_next_state():
    module = _module()
    data = _with_next(module, batch(module, (3, 9), flag_rate=0.0))
    expected = by_hand(module, data)["next", "recurrent_state"]
    left = BurnIn(module, 4)(data)
    assert_equal(left["next", "recurrent_state"][:, 0], expected[:, 4], F64)
    later = data["next", "recurrent_state"][:, 5:]
    assert torch.equal(left["next", "recurrent_state"][:, 1:], later)


def test_burn_in_leaves_batch_unchanged_and_passes_no_gradient():
    module = _module()
    data = batch(module, (3, 9))
    before = data.clone()
    left = BurnIn(module, 4)(data)
    assert (data == before).all() and not left["recurrent_state"].requires_grad
    recurrently(module, left)["embed"].sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    fixed = left.clone()
    recurrently(module, fixed)["embed"].sum().backward()
    for name, p in module.named_parameters():
        assert torch.equal(p.grad, grads[name])


def test_burn_in_of_zero_steps_is_the_identity():
    module = _module()
    data = batch(module)
    assert BurnIn(module, 0)(data) is data


def test_burn_in_nested_keys_of_agents_and_two_networks():
    one = LSTMModule(3, 5, dtype=F64, **AGENTS)
    two = recurrent_module("gru", 3, 5, dtype=F64, in_key="observation", out_key="embed")
    data = batch(one, (4, 8), agents=(2,))
    data.update(batch(two, (4, 8)).exclude("is_init"))
    left = BurnIn([one, two], 3)(data)
    for module in (one, two):
        expected = by_hand(module, data)
        actual = recurrently(module, left)
        for key in module.out_keys:
            assert_equal(actual.get(key), expected.get(key)[:, 3:], F64, str(key))


@pytest.mark.parametrize("run", [lambda m: BurnIn(m, 2), RefreshStates], ids=["burn-in", "refresh"])
def test_sequences_done_without_a_flag_ends_an_episode(run):
    """TorchRL's PrioritizedSliceSampler sets no flags."""
    module = _module()
    data = _with_next(module, batch(module, (2, 20), flag_rate=0.0))
    data["is_init"][:, [0, 5, 10, 15]] = True
    data["next", "done"] = data["is_init"].roll(-1, 1)
    data["recurrent_state"][:, [5, 10, 15]] = 0
    bare = data.clone()
    bare["is_init"][:, 1:] = False
    expected, actual = run(module)(data), run(module)(bare)
    assert expected.shape == actual.shape
    for key in ("recurrent_state", ("next", "recurrent_state")):
        assert torch.equal(actual[key], expected[key])


@pytest.mark.parametrize("run", [lambda m: BurnIn(m, 2), RefreshStates], ids=["burn-in", "refresh"])
def test_sequences_unflagged_trajectory_change_raises(run):
    module = _module()
    data = batch(module, (2, 8), flag_rate=0.0)
    data["collector", "traj_ids"] = torch.tensor([[1] * 4 + [2] * 4] * 2)
    with pytest.raises(ValueError, match="not contiguous"):
        run(module)(data)
    data["is_init"][:, 4] = True
    run(module)(data)


def test_burn_in_in_buffer_of_windows_runs_on_samples():
    module = recurrent_module("gru", 1, 1, in_key="observation", out_key="embed")
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10), transform=Windows(5, "drop"), batch_size=4
    )
    buffer.append_transform(BurnIn(module, 2))
    data = episode(10)
    data["observation"] = data["x"].unsqueeze(-1).float()
    buffer.extend(data)
    sample = buffer.sample()
    assert sample.shape == (4, 3)
    row: Any
    for row in sample:
        window = data[int(row["x"][0]) - 3 :][:5]
        expected = by_hand(module, window)["embed"][2:]
        assert_equal(recurrently(module, row)["embed"], expected, torch.float32)


def test_burn_in_in_buffer_of_steps_raises():
    module = _module()
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(100), transform=BurnIn(module, 2), batch_size=4
    )
    buffer.extend(batch(module, (20,)))
    with pytest.raises(ValueError, match=r"windows \[\*, T\].*reshape\(-1, slice_len\)"):
        buffer.sample()


def test_burn_in_enters_recurrent_mode_by_itself():
    module = _module()
    data = batch(module)
    with set_recurrent_mode(False):
        inside = BurnIn(module, 2)(data)
    assert torch.equal(inside["recurrent_state"], BurnIn(module, 2)(data)["recurrent_state"])


def test_burn_in_does_not_own_its_networks():
    module = chain(_module())
    transform = BurnIn(module, 2)
    assert not list(transform.parameters())


def test_burn_in_invalid_length_raises():
    module = _module()
    for burn_in in (7, 8):
        with pytest.raises(ValueError, match=f"burn_in={burn_in} leaves no step.*7 steps"):
            BurnIn(module, burn_in)(batch(module))
    steps: Any = np.int64(6)
    assert BurnIn(module, steps)(batch(module)).shape == (2, 1)
    for wrong in (-1, 2.0, True):
        with pytest.raises(ValueError, match="burn_in must be an int"):
            BurnIn(module, wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(KeyError, match="is_init"):
        BurnIn(module, 2)(batch(module).exclude("is_init"))


def test_burn_in_feed_forward_network_raises():
    with pytest.raises(ValueError, match="no recurrent module inside TensorDictModule"):
        BurnIn(TensorDictModule(nn.Linear(3, 3), ["a"], ["b"]), 2)


def test_burn_in_nan_in_later_padding_changes_nothing():
    module = recurrent_module("gru", 3, 5, in_key="observation", out_key="embed")
    data = batch(module, (2, 7), flag_rate=0.0)
    dirty = data.clone()
    dirty["observation"][:, 5:] = float("nan")
    clean, left = BurnIn(module, 2)(data), BurnIn(module, 2)(dirty)
    assert torch.equal(left["recurrent_state"][:, 0], clean["recurrent_state"][:, 0])
    actual, expected = (recurrently(module, one)["embed"][:, :3] for one in (left, clean))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("layout", ["stepwise", "one state", "one state copied"])
def test_burn_in_of_a_batch_leaves_a_sequence_without_problems(layout):
    module = _module()
    data = _with_next(module, batch(module, (3, 9), flag_rate=0.0))
    if layout != "stepwise":
        for key in ("recurrent_state", ("next", "recurrent_state")):
            data[key] = data[key][:, :1].expand(3, 9, 2, 5)
    if layout == "one state copied":
        data = data.clone()
        data["next", "recurrent_state"] = data["next", "recurrent_state"].contiguous()
        data["recurrent_state"] = data["recurrent_state"].contiguous()
    learned = BurnIn(module, 2)(data)
    assert not [*find_sequence_problems(learned, ["is_init"], [("recurrent_state", "is_init")])]
    assert torch.equal(learned["is_init"], data["is_init"][:, 2:])


def test_burn_in_without_networks_raises():
    with pytest.raises(ValueError, match="networks must name at least one network"):
        BurnIn([], 2)
