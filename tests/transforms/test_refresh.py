"""Recomputed states are those of the network's current weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.data import (
    CompressedListStorage,
    LazyMemmapStorage,
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    TensorDictReplayBuffer,
)

from rnnkeys import recurrent_module
from rnnkeys.keys import as_tuple
from rnnkeys.transforms import RefreshStates, Windows
from tests.support.recurrent import F64, batch, by_hand
from tests.support.tolerances import assert_equal
from tests.support.windows import collect_episodes, disturb, make_policy

NAMES: Any = {"in_key": "observation", "out_key": "embed"}


@pytest.mark.parametrize("kind", ["lstm", "gru", "lstm_ln"])
def test_refresh_sequences_hold_the_states_of_single_steps(kind):
    module = recurrent_module(kind, 3, 5, num_layers=2, dtype=F64, **NAMES)
    data = batch(module, (3, 9))
    before = data.clone()
    refreshed = RefreshStates(module)(data)
    assert (data == before).all()
    expected = by_hand(module, data)
    for key in module.state_keys:
        after = expected.get(("next", *as_tuple(key)))
        assert_equal(refreshed.get(("next", *as_tuple(key))), after, F64)
        continues = ~data["is_init"][:, 1:, 0]
        entering = refreshed.get(key)
        assert_equal(entering[:, 1:][continues], after[:, :-1][continues], F64)
        assert torch.equal(entering[:, 1:][~continues], data.get(key)[:, 1:][~continues])
        assert torch.equal(entering[:, 0], data.get(key)[:, 0])


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("window", [(5, "last"), (5, "null"), (6, "overlap", 2), (4, "drop")])
def test_refresh_buffer_holds_the_states_of_a_new_collection(window, storage):
    """Episodes arrive in pieces, so that their windows are not stored in order."""
    policy = make_policy()
    data: Any = collect_episodes(policy, [[13, 4, 9], [2, 24]])
    buffers: list[Any] = []
    for _ in range(2):
        buffer = TensorDictReplayBuffer(
            storage=storage(100), transform=Windows(*window), batch_size=4
        )
        for start, end in ((0, 7), (7, 19), (19, 26)):
            buffer.extend(data[:, start:end])
        buffers.append(buffer)
        disturb(policy)
        data = cast(Any, RefreshStates(policy)(data))
        assert (data["next", "done"].sum(1) == torch.tensor([[3], [2]])).all()
    old = buffers[0]
    copied = cast(Any, old.storage[:]).clone()
    moved = RefreshStates(policy, chunk_size=3).refresh_buffer(old)
    assert 0 < moved < len(old)
    assert RefreshStates(policy, chunk_size=3).refresh_windows(copied) == moved
    assert all((copied[k] == old.storage[:][k]).all() for k in policy[1].state_keys)
    # What the second buffer holds is one disturbance old; a third has today's states.
    fresh = Windows(*window)
    pieces = cast(Any, [fresh.cut(data[:, a:b]) for a, b in ((0, 7), (7, 19), (19, 26))])
    expected = cast(Any, torch.cat(pieces))
    for key in policy[1].state_keys:
        for view in (key, ("next", key)):
            assert_equal(old.storage[:][view], expected[view], torch.float32, str(view))
            before = buffers[1].storage[:][view]
            assert not torch.allclose(before, expected[view], atol=1e-3)


def test_refresh_buffer_window_without_predecessor_keeps_its_state():
    policy = make_policy("gru")
    data: Any = collect_episodes(policy, [[20]])
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(3), transform=Windows(4, "drop"), batch_size=4
    )
    buffer.extend(data[:, :16])
    buffer.extend(data[:, 16:])  # five windows in a buffer of three
    before = buffer.storage[:].clone()
    disturb(policy)
    assert RefreshStates(policy).refresh_buffer(buffer) == 2
    after = buffer.storage[:]
    oldest = before["window", "first"].argmin()
    same = (before["recurrent_state"] == after["recurrent_state"]).flatten(1).all(1)
    assert same.nonzero().flatten().tolist() == [oldest]


@pytest.mark.parametrize("storage", [ListStorage, CompressedListStorage, LazyStackStorage])
def test_refresh_buffer_of_a_list_storage_equals_that_of_a_tensor_storage(storage):
    policy = make_policy("gru")
    data: Any = collect_episodes(policy, [[13, 4, 9]])
    buffers = [
        TensorDictReplayBuffer(storage=kind(100), transform=Windows(5, "null"), batch_size=4)
        for kind in (storage, LazyTensorStorage)
    ]
    disturb(policy)
    moved = []
    for buffer in buffers:
        buffer.extend(data)
        moved.append(RefreshStates(policy).refresh_buffer(buffer))
        buffer.sample()
    assert moved[0] == moved[1] > 0
    actual, expected = ([b.storage[i]["recurrent_state"] for i in range(len(b))] for b in buffers)
    assert torch.equal(torch.stack(actual), torch.stack(expected))
    assert any(state.any() for state in actual)


def test_refresh_buffer_of_two_windows_keeps_their_episodes_apart():
    """Two workers with a Windows each write episodes without trajectory ids into one buffer."""
    policy = make_policy("gru")
    data: Any = collect_episodes(policy, [[13, 11], [10, 14]])
    disturb(policy)
    expected = Windows(5, "null").cut(cast(Any, RefreshStates(policy)(data)))
    workers = [Windows(5, "null"), Windows(5, "null")]
    stored = cast(Any, torch.cat([one.cut(row) for one, row in zip(workers, data, strict=True)]))
    RefreshStates(policy).refresh_windows(stored)
    assert_equal(stored["recurrent_state"], expected["recurrent_state"], torch.float32)


def test_refresh_windows_in_another_order_refreshes_the_same_ones():
    policy = make_policy("gru")
    data: Any = collect_episodes(policy, [[13, 11]])
    windows = Windows(4, "null").cut(data)
    disturb(policy)
    other = cast(Any, torch.cat([windows[1:], windows[:1]]))  # the first one follows the last one
    moved = RefreshStates(policy).refresh_windows(windows)
    assert RefreshStates(policy).refresh_windows(other) == moved == len(windows) - 2
    moved_back = other["recurrent_state"].roll(1, 0)
    assert_equal(moved_back, windows["recurrent_state"], torch.float32)


def test_refresh_of_a_feed_forward_network_raises():
    network = TensorDictModule(torch.nn.Linear(3, 5), ["observation"], ["embed"])
    with pytest.raises(ValueError, match="no recurrent module"):
        RefreshStates(network)


def test_refresh_window_stored_twice_follows_itself_nowhere():
    policy = make_policy("gru")
    data: Any = collect_episodes(policy, [[7, 2]])
    window: Any = Windows(7, "null").cut(data)[:1]
    disturb(policy)
    stored = cast(Any, torch.cat([window, window]))
    assert RefreshStates(policy).refresh_windows(stored) == 0
    assert torch.equal(stored["recurrent_state"], window["recurrent_state"].expand(2, -1, -1))


def test_refresh_invalid_buffer_raises():
    module = recurrent_module("gru", 3, 5, **NAMES)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10), batch_size=2)
    buffer.extend(batch(module))
    with pytest.raises(KeyError, match="its items are not windows"):
        RefreshStates(module).refresh_buffer(buffer)
    ensemble: Any = SimpleNamespace(storage=object())
    with pytest.raises(TypeError, match="read from storages of tensors.*Got a object"):
        RefreshStates(module).refresh_buffer(ensemble)
    windows: Any = Windows(3)(batch(module).exclude("recurrent_state"))
    with pytest.raises(KeyError, match="no state 'recurrent_state'.*primers"):
        RefreshStates(module).refresh_windows(windows)
    with pytest.raises(ValueError, match="chunk_size must be an int"):
        RefreshStates(module, chunk_size=0)


def test_refresh_buffer_empty_raises():
    module = recurrent_module("gru", 3, 5, in_key="observation", out_key="embed")
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10), transform=Windows(4), batch_size=2
    )
    with pytest.raises((KeyError, RuntimeError), match=r"buffer|storage"):
        RefreshStates(module).refresh_buffer(buffer)


def test_refresh_of_a_batch_without_flags_after_done_keeps_its_flags():
    policy = make_policy("gru")
    data: Any = collect_episodes(policy, [[3, 5]])
    data["is_init"][:, 1:] = False
    refreshed = RefreshStates(policy)(data)
    assert torch.equal(refreshed["is_init"], data["is_init"])
