"""What is left after a burn-in runs from the state that today's network has there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from rnnkeys import LSTMModule, recurrent_module, set_recurrent_mode
from rnnkeys.keys import as_tuple
from rnnkeys.transforms import BurnIn, RefreshStates, Windows
from tests.support.recurrent import F64, batch, by_hand, chain, recurrently
from tests.support.tolerances import assert_equal
from tests.transforms.test_windows import episode

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
    """States beside the ones stored, as an older network would have left them."""
    for key in module.state_keys:
        data.set(("next", *as_tuple(key)), torch.randn_like(data.get(key)))
    return data


@pytest.mark.parametrize("marks", [0.0, 0.4])
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_of_rows_equals_the_whole_by_hand(kind, states, marks):
    """Resets anywhere, the cut included: outputs behind it are those of the whole sequence."""
    module = _module(kind)
    data = batch(module, (6, 9), states=states, marks=marks)
    if marks:
        data["is_init"][0, 4] = data["is_init"][1, 2] = True
    zeros = {key: torch.zeros(6, 9, 2, 5, dtype=F64) for key in module.state_keys}
    expected = by_hand(module, data if states else data.copy().update(zeros))
    left = BurnIn(module, 4)(data)
    assert left.shape == (6, 5)
    actual = recurrently(module, left)
    for key in module.out_keys:
        assert_equal(actual.get(key), expected.get(key)[:, 4:], F64, str(key))


def test_next_states_at_the_cut_are_of_today():
    module = _module()
    data = _with_next(module, batch(module, (3, 9), marks=0.0))
    expected = by_hand(module, data)["next", "recurrent_state"]
    left = BurnIn(module, 4)(data)
    assert_equal(left["next", "recurrent_state"][:, 0], expected[:, 4], F64)
    later = data["next", "recurrent_state"][:, 5:]
    assert torch.equal(left["next", "recurrent_state"][:, 1:], later)


def test_the_batch_stays_as_it_was_and_no_gradient_passes():
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


def test_no_burn_in_is_the_identity():
    module = _module()
    data = batch(module)
    assert BurnIn(module, 0)(data) is data


def test_nested_keys_with_agents_and_two_networks():
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


@pytest.mark.parametrize("inner", [False, True])
def test_flat_slices_of_one_length(inner):
    """With their length given, slices may go on into other episodes."""
    module = _module()
    data = batch(module, (4, 8), marks=0.3 if inner else 0.0)
    expected = by_hand(module, data)["embed"][:, 3:]
    data["is_init"][:, 0] = True
    left = BurnIn(module, 3, slice_len=8)(data.reshape(-1))
    assert left.shape == (20,)
    actual = recurrently(module, left)["embed"]
    assert_equal(actual.view(4, 5, -1), expected, F64)


def test_flat_slices_of_any_length():
    module = _module()
    data = _with_next(module, batch(module, (20,), marks=0.0))
    starts = [0, 6, 8, 15]  # of lengths 6, 2, 7, 5
    data["is_init"][starts] = True
    expected = by_hand(module, data)
    kept = [3, 4, 5, 11, 12, 13, 14, 18, 19]
    left = BurnIn(module, 3)(data)
    assert left["is_init"].squeeze(-1).nonzero().flatten().tolist() == [0, 3, 7]
    assert_equal(recurrently(module, left)["embed"], expected["embed"][kept], F64)
    cuts = left["next", "recurrent_state"][[0, 3, 7]]
    assert_equal(cuts, expected["next", "recurrent_state"][[3, 11, 18]], F64)


def test_a_done_that_no_mark_follows_ends_a_slice():
    """TorchRL's PrioritizedSliceSampler marks no starts."""
    module = _module()
    data = _with_next(module, batch(module, (20,), marks=0.0))
    data["is_init"][[0, 5, 10, 15]] = True
    data["next", "done"] = data["is_init"].roll(-1, 0)
    bare = data.clone()
    bare["is_init"][1:] = False
    for run in (BurnIn(module, 2), RefreshStates(module)):
        expected, actual = run(data), run(bare)
        assert expected.shape == actual.shape
        for key in ("recurrent_state", ("next", "recurrent_state")):
            assert torch.equal(actual[key], expected[key])


def test_in_a_buffer_of_windows_it_runs_on_what_is_sampled():
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


def test_in_a_buffer_of_steps_it_is_refused():
    module = _module()
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(100), transform=BurnIn(module, 2), batch_size=4
    )
    buffer.extend(batch(module, (20,)))
    with pytest.raises(RuntimeError, match="too early"):
        buffer.sample()


def test_it_sets_the_mode_and_restores_it():
    module = _module()
    data = batch(module)
    with set_recurrent_mode(False):
        inside = BurnIn(module, 2)(data)
    assert torch.equal(inside["recurrent_state"], BurnIn(module, 2)(data)["recurrent_state"])


def test_networks_are_neither_owned_nor_copied():
    module = chain(_module())
    transform = BurnIn(module, 2)
    assert not list(transform.parameters())


def test_what_leaves_nothing_is_refused():
    module = _module()
    for burn_in in (7, 8):
        for data in (batch(module), batch(module, (7,), marks=0.0)):
            with pytest.raises(ValueError, match=f"burn_in={burn_in} leaves nothing.*7 steps"):
                BurnIn(module, burn_in)(data)
    for wrong in (-1, 2.0):
        with pytest.raises(ValueError, match="burn_in must be an int"):
            BurnIn(module, wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(KeyError, match="is_init"):
        BurnIn(module, 2)(batch(module).exclude("is_init"))


def test_a_network_that_stores_no_states_within_sequences_is_refused():
    with pytest.raises(ValueError, match="store_states='all'"):
        BurnIn(_module(store_states="starts"), 2)


def test_a_network_without_memory_is_refused():
    with pytest.raises(ValueError, match="no recurrent module inside TensorDictModule"):
        BurnIn(TensorDictModule(nn.Linear(3, 3), ["a"], ["b"]), 2)
