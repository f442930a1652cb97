"""Episodes are cut into windows exactly as said, whatever batches they come in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import (
    LazyTensorStorage,
    TensorDictReplayBuffer,
)
from torchrl.envs import GymEnv, SerialEnv, TransformedEnv

from rnnkeys import drqn_policy, get_env_transforms_from_module
from rnnkeys.replay import PrioritizedSampler
from rnnkeys.transforms import Windows, sequence_mask
from tests.support.recurrent import recurrently
from tests.support.tolerances import assert_equal

MASK = ("collector", "mask")
# Steps of an episode are numbered from 1, so that a null step, 0, is none of them.
NULL = 0


def episode(length: int, done: bool = True, first: int = 1) -> Any:
    """Steps ``first, first + 1, ...``; the state that enters step ``x`` is ``x - 1``."""
    x = torch.arange(first, first + length)
    ends = torch.zeros(length, 1, dtype=torch.bool)
    ends[-1] = done
    state = x[:, None, None] - 1.0
    return TensorDict(
        {
            "x": x,
            "is_init": (torch.arange(length) == 0)[:, None],
            "recurrent_state": state,
            "next": {
                "done": ends,
                "terminated": ends.clone(),
                "reward": x[:, None].float(),
                "recurrent_state": state + 1,
            },
        },
        [length],
    )


def cut(transform: Windows, data: Any) -> list[list[int]]:
    return transform(data)["x"].tolist()


A, B = list(range(1, 9)), list(range(9, 17))
VECTORS: list[tuple[int, int, str, list[list[int]]]] = [
    (5, 8, "null", [[1, 2, 3, 4, 5, NULL, NULL, NULL]]),
    (5, 8, "last", [[1, 2, 3, 4, 5, NULL, NULL, NULL]]),
    (5, 8, "repeat", [[1, 2, 3, 4, 5, 5, 5, 5]]),
    (5, 8, "drop", []),
    (19, 8, "last", [A, B, list(range(12, 20))]),
    (19, 8, "null", [A, B, [17, 18, 19, *[NULL] * 5]]),
    (19, 8, "repeat", [A, B, [17, 18, *[19] * 6]]),
    (19, 8, "drop", [A, B]),
    (16, 8, "last", [A, B]),
    (16, 8, "null", [A, B]),
    (6, 4, "repeat", [[1, 2, 3, 4], [5, 6, 6, 6]]),
    (10, 4, "drop", [[1, 2, 3, 4], [5, 6, 7, 8]]),
    (10, 4, "null", [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, NULL, NULL]]),
    (10, 4, "last", [[1, 2, 3, 4], [5, 6, 7, 8], [7, 8, 9, 10]]),
    (10, 11, "last", [[*range(1, 11), NULL]]),
]


@pytest.mark.parametrize(("steps", "length", "residual", "expected"), VECTORS)
def test_residuals(steps, length, residual, expected):
    assert cut(Windows(length, residual), episode(steps)) == expected


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (8, [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8]]),
        (9, [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8], [7, 8, 9, NULL]]),
        (3, [[1, 2, 3, NULL]]),
    ],
)
def test_overlapping_windows_start_every_period(steps, expected):
    assert cut(Windows(4, "overlap", 2), episode(steps)) == expected


def test_fillers_are_done_and_masked_and_nothing_else():
    windows = Windows(4, "null")(episode(10, done=False))
    assert len(windows) == 2  # the episode goes on: two steps wait
    transform = Windows(4, "null")
    transform(episode(10, done=False))
    rest = transform.flush()
    assert rest is not None
    rest = transform.lay_out(rest)
    assert rest["next", "done"].squeeze(-1).tolist() == [[False, False, True, True]]
    assert rest[MASK].tolist() == [[True, True, False, False]]
    assert not rest["next", "reward"][0, 2:].any()
    (one,) = Windows(11, "last")(episode(10)).unbind(0)
    assert one["next", "done"][-1] and not one[MASK][-1] and one[MASK][:-1].all()
    repeated = Windows(4, "repeat")(episode(6))
    assert repeated["next", "reward"][1].squeeze(-1).tolist() == [5, 6, 6, 6]
    assert repeated[MASK][1].tolist() == [True, True, False, False]


@pytest.mark.parametrize("residual", ["last", "null", "repeat"])
def test_the_state_is_the_one_that_enters_the_first_step(residual):
    windows = Windows(4, residual)(episode(10))
    first = windows["x"][:, 0].float()
    assert torch.equal(windows["recurrent_state"][:, 0, 0, 0], first - 1)
    assert torch.equal(windows["next", "recurrent_state"][:, 0, 0, 0], first)
    for key in ("recurrent_state", ("next", "recurrent_state")):
        assert windows.get(key).stride(1) == 0
    every = Windows(4, "drop", keep_states=True)(episode(8))
    assert torch.equal(every["recurrent_state"].reshape(-1), torch.arange(8.0))
    none = Windows(4, "drop", state_keys=[])(episode(8))
    assert none["recurrent_state"].stride(1) != 0


def _rows(lengths: list[list[int]], steps: int) -> list[Any]:
    """Rows of episodes, laid end to end and cut to one length; every episode is new steps."""
    rows, first = [], 1
    for row in lengths:
        parts: list[Any] = []
        for length in row:
            parts.append(episode(length, first=first))
            first += 1000
        rows.append(torch.cat(parts)[:steps])
    return rows


@st.composite
def _cuts(draw: st.DrawFn, residual: str) -> tuple[Any, ...]:
    steps = 24
    lengths = [
        [*draw(st.lists(st.integers(1, 11), max_size=8)), steps]
        for _ in range(draw(st.integers(1, 3)))
    ]
    cuts = sorted(draw(st.sets(st.integers(1, steps - 1), min_size=1, max_size=4)))
    length = draw(st.integers(1, 7))
    period = draw(st.integers(1, length)) if residual == "overlap" else None
    return lengths, cuts, length, period, draw(st.booleans())


@pytest.mark.parametrize("residual", ["drop", "last", "null", "repeat", "overlap"])
@settings(max_examples=12)
@given(data=st.data())
def test_batches_that_cut_episodes_change_no_window(residual, data):
    """Windows of rows at once are those of each episode alone, in whatever batches they come."""
    lengths, cuts, length, period, only_marks = data.draw(_cuts(residual))
    rows = _rows(lengths, 24)
    expected = []
    for row in rows:
        starts = [*row["is_init"].squeeze(-1).nonzero().flatten().tolist(), 24]
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            alone = row[start:end].clone()
            alone["next", "done"][-1] = True
            expected += cut(Windows(length, residual, period), alone)
    batch: Any = torch.stack(rows)
    if only_marks:  # an episode may end without done, where a collector resets
        batch["next", "done"][:] = False
    transform, actual = Windows(length, residual, period), []
    bounds = [0, *cuts, 24]
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        actual += cut(transform, batch[:, start:end])
    rest = transform.flush()
    actual += [] if rest is None else rest["x"].tolist()
    assert transform.waiting == 0
    assert sorted(actual) == sorted(expected)


def test_only_what_can_still_be_needed_waits():
    transform = Windows(8, "last")
    transform(episode(1000, done=False))
    assert transform.waiting == 0
    assert transform._waiting is not None and transform._waiting[0][0].shape[0] == 7


def test_masked_steps_of_padded_trajectories_are_left_out():
    batch: Any = torch.stack([episode(6), torch.cat([episode(3), episode(3)])])
    batch[MASK] = sequence_mask(torch.tensor([6, 3]), 6)
    assert cut(Windows(3, "drop"), batch) == [[1, 2, 3], [4, 5, 6], [1, 2, 3]]


@pytest.mark.parametrize("prioritised", [False, True])
def test_a_buffer_stores_one_state_a_window_and_samples_it_everywhere(prioritised):
    sampler = PrioritizedSampler(100, alpha=0.9, beta=0.4) if prioritised else None
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(100),
        sampler=sampler,
        transform=Windows(4, "last"),
        batch_size=6,
    )
    data = episode(10)
    assert buffer.extend(data[:3]).numel() == 0
    assert len(buffer) == 0
    assert buffer.extend(data[3:]).numel() == 3
    assert buffer.storage[:]["recurrent_state"].shape == (3, 1, 1)
    assert buffer[:]["recurrent_state"].shape == (3, 4, 1, 1)
    sample = buffer.sample()
    assert sample.batch_size == (6, 4) and sample["recurrent_state"].stride(1) == 0
    assert torch.equal(sample["recurrent_state"][:, 0, 0, 0], sample["x"][:, 0] - 1.0)
    if prioritised:
        assert sample["priority_weight"].shape == (6, 4)
        sample["td_error"] = torch.rand(6, 1).expand(6, 4)
        buffer.update_tensordict_priority(sample)


def test_a_collector_gives_windows_that_sequences_agree_with():
    """Real environments that end and reset, two at once: each window runs from its own state."""
    spec = GymEnv("CartPole-v1").action_spec
    policy = drqn_policy(spec, (4,), cell="gru", hidden_size=8, encoder_sizes=())
    make = SerialEnv(2, lambda: GymEnv("CartPole-v1"))
    env = TransformedEnv(make, get_env_transforms_from_module(policy))
    collector = Collector(
        env, policy, frames_per_batch=50, total_frames=150, postproc=Windows(6, "null")
    )
    windows: Any = torch.cat(list(collector))
    assert len(windows) > 10 and not windows[MASK].all()
    again = recurrently(policy, windows)
    mask = windows[MASK]
    assert_equal(again["action_value"][mask], windows["action_value"][mask], torch.float32)


def test_masks_of_lengths():
    lengths = torch.tensor([[0, 2], [3, 1]])
    mask = sequence_mask(lengths, 4)
    assert mask.shape == (2, 2, 4) and torch.equal(mask.sum(-1), lengths)
    assert mask[1, 0].tolist() == [True, True, True, False]
    assert sequence_mask(torch.zeros(0, dtype=torch.long)).shape == (0, 0)
    for wrong in ([5], [-1]):
        with pytest.raises(ValueError, match=r"between 0 and max_len=4"):
            sequence_mask(torch.tensor(wrong), 4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0,), "length must be a positive int"),
        ((4, "pad"), "residual must be one of .*'pad'"),
        ((4, "overlap"), "period goes with residual='overlap'"),
        ((4, "last", 2), "period goes with residual='overlap'"),
        ((4, "overlap", 5), "period must be from 1 to length=4. Got 5"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        Windows(*arguments)


def test_batches_that_do_not_fit_are_refused():
    transform = Windows(2)
    transform(episode(3))
    two: Any = torch.stack([episode(3), episode(3)])
    with pytest.raises(ValueError, match="2 rows and the one before had 1"):
        transform(two)
    transform.clear()
    transform(two)
    with pytest.raises(KeyError, match="where episodes end"):
        Windows(2)(episode(3).select("x"))
    with pytest.raises(ValueError, match=r"\[B, T\] or \[T\]"):
        Windows(2)(two.unsqueeze(0))
    with pytest.raises(KeyError, match="these are no windows"):
        Windows(2).lay_out(episode(3))
    masked = episode(3).set(MASK, torch.ones(3, dtype=torch.long))
    with pytest.raises(TypeError, match=r"mask .* must be bool. Got torch.int64.*\.bool\(\)"):
        Windows(2)(masked)


def test_episodes_of_a_checkpoint_are_numbered_on():
    before, after = Windows(3), Windows(3)
    old = before.cut(episode(6).unsqueeze(0))["window", "episode"]
    after.load_state_dict(before.state_dict())
    new = after.cut(episode(6).unsqueeze(0))["window", "episode"]
    assert not set(old.flatten().tolist()) & set(new.flatten().tolist())


def test_windows_that_are_longer_than_every_episode_are_reported_once():
    transform = Windows(8, "drop")
    for _ in range(9):
        transform(episode(5))
    with pytest.warns(UserWarning, match="10 episodes have ended and none had length=8 steps"):
        transform(episode(5))
    assert transform(episode(5)).shape == (0, 8)
    settled = Windows(5, "drop")
    settled(episode(5))
    for _ in range(12):
        settled(episode(3))


def test_a_batch_without_a_whole_window_is_empty_not_wrong():
    empty = Windows(8, "drop")(episode(5))
    assert empty.batch_size == (0, 8) and empty["recurrent_state"].shape == (0, 8, 1, 1)
