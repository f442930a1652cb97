"""Stored states brought up to date are those of the network as it is now."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    OneHot,
    TensorDictReplayBuffer,
)

from rnnkeys import drqn_policy, recurrent_module
from rnnkeys.keys import as_tuple
from rnnkeys.transforms import BurnIn, RefreshStates, Windows, state_staleness
from tests.support.recurrent import F64, batch, by_hand, recurrently
from tests.support.tolerances import assert_equal

NAMES: Any = {"in_key": "observation", "out_key": "embed"}


@pytest.mark.parametrize("kind", ["lstm", "gru", "lstm_ln"])
def test_sequences_hold_the_states_of_single_steps(kind):
    module = recurrent_module(kind, 3, 5, num_layers=2, dtype=F64, **NAMES)
    data = batch(module, (3, 9))
    before = data.clone()
    refreshed = RefreshStates(module)(data)
    assert (data == before).all()
    expected = by_hand(module, data)
    for key in module.state_keys:
        after = expected.get(("next", *as_tuple(key)))
        assert_equal(refreshed.get(("next", *as_tuple(key))), after, F64)
        goes_on = ~data["is_init"][:, 1:, 0]
        entering = refreshed.get(key)
        assert_equal(entering[:, 1:][goes_on], after[:, :-1][goes_on], F64)
        assert torch.equal(entering[:, 1:][~goes_on], data.get(key)[:, 1:][~goes_on])
        assert torch.equal(entering[:, 0], data.get(key)[:, 0])


def make_policy(cell: str = "lstm") -> Any:
    return drqn_policy(OneHot(2), (4,), cell=cell, hidden_size=6, encoder_sizes=())


def _collected(policy: Any, lengths: list[list[int]]) -> Any:
    """Two rows of whole episodes, with the states that single steps had."""
    rows: list[Any] = []
    for row in lengths:
        number = sum(row)
        marks = torch.zeros(number, 1, dtype=torch.bool)
        ends = torch.zeros(number, 1, dtype=torch.bool)
        step = 0
        for length in row:
            marks[step] = ends[step + length - 1] = True
            step += length
        data = cast(
            Any, TensorDict({"observation": torch.randn(number, 4), "is_init": marks}, [number])
        )
        for key in policy[1].state_keys:
            data[key] = torch.zeros(number, 1, 6)
        data = cast(Any, RefreshStates(policy)(data))
        data["next", "done"] = ends
        rows.append(data)
    return torch.stack(rows)


def _disturb(policy: Any) -> None:
    for p in policy.parameters():
        p.data.add_(0.3 * torch.randn_like(p))


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("window", [(5, "last"), (5, "null"), (6, "overlap", 2), (4, "drop")])
def test_a_buffer_holds_what_a_fresh_collection_would(window, storage):
    """Windows arrive in pieces, out of the order of their episodes."""
    policy = make_policy()
    data: Any = _collected(policy, [[13, 4, 9], [2, 24]])
    buffers: list[Any] = []
    for _ in range(2):
        buffer = TensorDictReplayBuffer(
            storage=storage(100), transform=Windows(*window), batch_size=4
        )
        for start, end in ((0, 7), (7, 19), (19, 26)):
            buffer.extend(data[:, start:end])
        buffers.append(buffer)
        _disturb(policy)
        data = cast(Any, RefreshStates(policy)(data))
        assert (data["next", "done"].sum(1) == torch.tensor([[3], [2]])).all()
    old = buffers[0]
    copied = cast(Any, old.storage[:]).clone()
    moved = RefreshStates(policy, rows=3).refresh_buffer(old)
    assert 0 < moved < len(old)
    assert RefreshStates(policy, rows=3).refresh_windows(copied) == moved
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


def test_windows_whose_past_is_gone_keep_their_state():
    policy = make_policy("gru")
    data: Any = _collected(policy, [[20]])
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(3), transform=Windows(4, "drop"), batch_size=4
    )
    buffer.extend(data[:, :16])
    buffer.extend(data[:, 16:])  # five windows in a buffer of three
    before = buffer.storage[:].clone()
    _disturb(policy)
    assert RefreshStates(policy).refresh_buffer(buffer) == 2
    after = buffer.storage[:]
    oldest = before["window", "first"].argmin()
    same = (before["recurrent_state"] == after["recurrent_state"]).flatten(1).all(1)
    assert same.nonzero().flatten().tolist() == [oldest]


def test_staleness_is_the_papers_measure():
    policy = make_policy("gru")
    data: Any = _collected(policy, [[24]])
    _disturb(policy)
    stored = cast(Any, Windows(8, "null")(data))
    true = Windows(8, "null")(RefreshStates(policy)(data))
    found = state_staleness(policy, stored, true, burn_in=2)
    q, q_true = (recurrently(policy, w)["action_value"] for w in (stored, true))
    for name, t in (("first", 2), ("last", 7)):
        top = q_true[:, t].max(-1).values.abs()
        expected = ((q[:, t] - q_true[:, t]) ** 2).sum(-1).sqrt() / top
        assert_equal(found[name], expected, torch.float32, name)
    assert found["first"][0] == 0  # the first window starts with its episode
    # A burn-in forgets: staleness falls, and it is what BurnIn's states lead to.
    left = recurrently(policy, BurnIn(policy, 2)(stored))["action_value"]
    assert_equal(left, q[:, 2:], torch.float32)


def test_staleness_of_masked_windows():
    policy = make_policy("gru")
    data: Any = _collected(policy, [[10]])
    stored = cast(Any, Windows(8, "null")(data))
    other = stored.clone()
    other["recurrent_state"] = other["recurrent_state"] + 1
    whole = state_staleness(policy, stored, other, burn_in=1)
    assert (whole["first"] > 0).all() and (whole["last"] > 0).all()
    assert torch.equal(whole["first"][1], whole["last"][1])  # one real step behind the burn-in
    nothing = state_staleness(policy, stored, other, burn_in=3)
    assert nothing["first"][0] > 0 and nothing["first"][1].isnan() and nothing["last"][1].isnan()


def test_what_cannot_be_refreshed_is_refused():
    module = recurrent_module("gru", 3, 5, **NAMES)
    data = batch(module)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10), batch_size=2)
    buffer.extend(data)
    with pytest.raises(KeyError, match="its items are no windows"):
        RefreshStates(module).refresh_buffer(buffer)
    with pytest.raises(ValueError, match="must be the same windows"):
        state_staleness(module, data, cast(Any, data[:, :3]))
    with pytest.raises(ValueError, match="burn_in=7 leaves nothing"):
        state_staleness(module, data, data, burn_in=7)
