"""Prioritized samplers without TorchRL's compiled extension."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import prioritized

from rnnkeys import replay

priorities = st.lists(st.floats(0.0625, 8.0), min_size=1, max_size=40)


@pytest.fixture(autouse=True)
def _no_extension(monkeypatch):
    """NumPy's trees are what is tested, whether or not the extension loads here."""
    monkeypatch.setattr(replay, "HAS_EXTENSION", False)
    monkeypatch.setattr(prioritized, "SumSegmentTreeFp32", object)
    monkeypatch.setattr("torchrl._utils.RL_WARNINGS", False)


def _filled(values, kind: Any = replay._SumTree):
    tree = kind(len(values), torch.float64)
    tree[torch.arange(len(values))] = torch.tensor(values, dtype=torch.float64)
    return tree


@given(priorities, st.data())
def test_tree_ranges_reduce_as_slices_do(values, data):
    left = data.draw(st.integers(0, len(values) - 1))
    right = data.draw(st.integers(left + 1, len(values)))
    assert _filled(values).query(left, right) == pytest.approx(sum(values[left:right]), rel=1e-12)
    assert _filled(values, replay._MinTree).query(left, right) == min(values[left:right])


@given(priorities, st.data())
def test_tree_updates_reach_the_root(values, data):
    tree, smallest = _filled(values), _filled(values, replay._MinTree)
    index = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, unique=True))
    new = torch.arange(1.0, len(index) + 1, dtype=torch.float64)
    tree[torch.tensor(index)] = smallest[torch.tensor(index)] = new
    expected = np.array(values)
    expected[index] = new
    assert tree.query(0, len(values)) == pytest.approx(expected.sum(), rel=1e-12)
    assert smallest.query(0, len(values)) == expected.min()
    assert tree[torch.tensor(index)].tolist() == new.tolist()


@given(priorities, st.floats(0, 0.999))
def test_tree_mass_finds_its_share_of_the_running_sum(values, part):
    mass = part * sum(values)
    found = int(_filled(values).scan_lower_bound([mass]))
    edges = np.concatenate([[0], np.cumsum(values)])
    assert edges[found] - 1e-9 <= mass <= edges[found + 1] + 1e-9


def test_sampler_never_draws_entries_that_were_never_written():
    tree = replay._SumTree(8, torch.float32)
    tree[torch.tensor([2, 5])] = torch.tensor([1.0, 1.0])
    assert set(tree.scan_lower_bound(np.linspace(0, 1.999, 50)).tolist()) == {2, 5}


def test_sampler_draws_by_priorities_and_weights_undo_them():
    torch.manual_seed(0)
    np.random.seed(0)
    sampler = replay.PrioritizedSampler(4, alpha=1.0, beta=1.0, eps=0.0)
    rb = ReplayBuffer(storage=LazyTensorStorage(4), sampler=sampler, batch_size=20_000)
    index = rb.extend(torch.arange(4))  # pyright: ignore[reportArgumentType]
    sampler.update_priority(index, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    drawn, info = rb.sample(return_info=True)
    share = torch.bincount(drawn, minlength=4) / drawn.numel()
    # Standard deviations of the shares are at most .0035.
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.015, rtol=0)
    torch.testing.assert_close(info["priority_weight"], 1 / (drawn + 1.0))
    assert info["priority_weight"].dtype == torch.float32


def test_sampler_with_a_generator_draws_by_it():
    drawn = []
    for seed in (3, 3, 4):
        buffer = ReplayBuffer(
            storage=LazyTensorStorage(50),
            sampler=replay.PrioritizedSampler(50, alpha=0.5, beta=0.5),
            batch_size=20,
            generator=torch.Generator().manual_seed(seed),
        )
        buffer.extend(cast(Any, torch.arange(50)))
        drawn.append(buffer.sample().tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_sampler_state_is_saved_and_loaded(tmp_path):
    sampler, other, third = (replay.PrioritizedSampler(5, 0.7, 0.9) for _ in range(3))
    sampler.update_priority(torch.arange(5), torch.arange(1.0, 6))
    other.load_state_dict(sampler.state_dict())
    sampler.dumps(tmp_path)
    third.update_priority(torch.arange(5), torch.ones(5))
    third.loads(tmp_path)
    index = torch.arange(5)
    for loaded in (other, third):
        torch.testing.assert_close(loaded._sum_tree[index], sampler._sum_tree[index])
        assert loaded._min_tree.query(0, 5) == pytest.approx(sampler._min_tree.query(0, 5))


def test_tree_of_other_dtypes_raises():
    with pytest.raises(NotImplementedError, match=r"dtype=torch\.int64.*torch\.float32"):
        replay.PrioritizedSampler(4, 0.7, 0.9, dtype=torch.int64)


@given(priorities, st.sampled_from([0.0, 0.6, 1.0]))
def test_sampler_get_priorities_returns_what_update_priority_took(values, alpha):
    sampler = replay.PrioritizedSampler(40, alpha, 0.4)
    index = torch.arange(len(values))
    sampler.extend(index)
    sampler.update_priority(index, torch.tensor(values))
    got = sampler.get_priorities(index.flip(0)).flip(0)
    expected = torch.tensor(values).double() if alpha else torch.ones(len(values)).double()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_sampler_get_priorities_of_one_item_has_the_shape_of_the_index(monkeypatch):
    """Trees of the extension return a number for an index of one item."""
    sampler = replay.PrioritizedSampler(4, 1.0, 0.4, eps=0.0)
    monkeypatch.setattr(sampler, "_sum_tree", defaultdict(lambda: 2.0))
    assert sampler.get_priorities(torch.tensor([0])).tolist() == [2.0]
