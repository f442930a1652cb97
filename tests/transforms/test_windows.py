"""Windows of episodes, whatever batches the episodes arrive in."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import (
    MetaData,
    NonTensorData,
    NonTensorStack,
    UnbatchedTensor,
)
from torchrl.collectors import Collector
from torchrl.data import (
    LazyTensorStorage,
    TensorDictReplayBuffer,
)
from torchrl.envs import Compose, GymEnv, SerialEnv, TransformedEnv

from rnnkeys import GRUModule, drqn_policy, get_env_transforms_from_module
from rnnkeys.checks import set_value_checks
from rnnkeys.replay import PrioritizedSampler
from rnnkeys.transforms import BurnIn, Windows, sequence_mask
from tests.support.recurrent import recurrently
from tests.support.tolerances import assert_equal
from tests.support.windows import episode

MASK = ("collector", "mask")
# Steps of an episode are numbered from 1, so that 0 is a null step.
NULL = 0


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
def test_windows_residual_policy_gives_its_windows(steps, length, residual, expected):
    assert cut(Windows(length, residual), episode(steps)) == expected


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (8, [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8]]),
        (9, [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8], [7, 8, 9, NULL]]),
        (3, [[1, 2, 3, NULL]]),
    ],
)
def test_windows_overlap_starts_every_period(steps, expected):
    assert cut(Windows(4, "overlap", 2), episode(steps)) == expected


def test_windows_null_steps_are_zero_done_and_masked():
    windows = Windows(4, "null")(episode(10, done=False))
    assert len(windows) == 2  # the episode has not ended: two steps wait
    transform = Windows(4, "null")
    transform(episode(10, done=False))
    rest = transform.flush()
    assert rest is not None and transform.flush() is None
    rest = transform.to_sequences(rest)
    assert rest["next", "done"].squeeze(-1).tolist() == [[False, False, True, True]]
    assert rest[MASK].tolist() == [[True, True, False, False]]
    assert not rest["next", "reward"][0, 2:].any()
    (one,) = Windows(11, "last")(episode(10)).unbind(0)
    assert one["next", "done"][-1] and not one[MASK][-1] and one[MASK][:-1].all()
    repeated = Windows(4, "repeat")(episode(6))
    assert repeated["next", "reward"][1].squeeze(-1).tolist() == [5, 6, 6, 6]
    assert repeated[MASK][1].tolist() == [True, True, False, False]


def test_windows_null_steps_are_done_for_every_agent():
    data = episode(3)
    data["next", "agents", "done"] = data["next", "done"].clone()
    data["agents", "done"] = data["next", "done"].clone()
    windows = Windows(4, "null")
    sequences = windows.to_sequences(windows(data))
    assert sequences["next", "agents", "done"].flatten().tolist() == [False, False, True, True]
    assert sequences["agents", "done"].flatten().tolist() == [False, False, True, False]


@pytest.mark.parametrize("residual", ["last", "null", "repeat"])
def test_windows_state_is_the_one_entering_the_first_step(residual):
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
    """Rows of episodes of the given lengths, cut to one length; no step occurs twice."""
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
def test_windows_batch_boundaries_change_no_window(residual, data):
    """Windows of several rows at once are those of each episode alone."""
    lengths, cuts, length, period, only_flags = data.draw(_cuts(residual))
    rows = _rows(lengths, 24)
    expected = []
    for row in rows:
        starts = [*row["is_init"].squeeze(-1).nonzero().flatten().tolist(), 24]
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            alone = row[start:end].clone()
            alone["next", "done"][-1] = True
            expected += cut(Windows(length, residual, period), alone)
    batch: Any = torch.stack(rows)
    if only_flags:  # an episode may end without done, where a collector resets
        batch["next", "done"][:] = False
    transform, actual = Windows(length, residual, period), []
    bounds = [0, *cuts, 24]
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        actual += cut(transform, batch[:, start:end])
    rest = transform.flush()
    actual += [] if rest is None else rest["x"].tolist()
    assert transform.waiting == 0
    assert sorted(actual) == sorted(expected)


def test_windows_waiting_steps_are_fewer_than_a_window():
    transform = Windows(8, "last")
    transform(episode(1000, done=False))
    assert transform.waiting == 0
    assert transform._waiting is not None and len(transform._waiting) == 7


def test_windows_padding_in_a_batch_is_left_out():
    batch: Any = torch.stack([episode(6), torch.cat([episode(3), episode(3)])])
    batch[MASK] = sequence_mask(torch.tensor([6, 3]), 6)
    assert cut(Windows(3, "drop"), batch) == [[1, 2, 3], [4, 5, 6], [1, 2, 3]]


@pytest.mark.parametrize("prioritized", [False, True])
def test_windows_in_buffer_store_one_state_per_window(prioritized):
    sampler = PrioritizedSampler(100, alpha=0.9, beta=0.4) if prioritized else None
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
    if prioritized:
        assert sample["priority_weight"].shape == (6, 4)
        sample["td_error"] = torch.rand(6, 1).expand(6, 4)
        buffer.update_tensordict_priority(sample)


def test_windows_of_a_collector_equal_what_was_collected():
    """Two environments that end and reset: each window, run from its state, gives its values."""
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


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0,), "length must be an int of at least 1"),
        ((4, "pad"), "residual must be one of .*'pad'"),
        ((4, "overlap"), "period belongs to residual='overlap'"),
        ((4, "last", 2), "period belongs to residual='overlap'"),
        ((4, "overlap", 5), "period must be from 1 to length=4. Got 5"),
        ((4, "overlap", 0), "period must be an int of at least 1"),
    ],
)
def test_windows_invalid_argument_raises(arguments, text):
    with pytest.raises(ValueError, match=text):
        Windows(*arguments)


def test_windows_state_keys_of_a_wrong_type_are_named():
    wrong: Any = 3
    with pytest.raises(TypeError, match="state_keys must be a key"):
        Windows(4, state_keys=wrong)


def test_windows_invalid_batch_raises():
    transform = Windows(2)
    transform(episode(3))
    two: Any = torch.stack([episode(3), episode(3)])
    with pytest.raises(ValueError, match="2 rows and the one before had 1"):
        transform(two)
    transform.clear()
    transform(two)
    with pytest.raises(KeyError, match="where episodes end.*InitTracker"):
        Windows(2)(episode(3).select("x"))
    with pytest.raises(ValueError, match=r"\[B, T\] or \[T\]"):
        Windows(2)(two.unsqueeze(0))
    with pytest.raises(KeyError, match="these are not windows"):
        Windows(2).to_sequences(episode(3))
    masked = episode(3).set(MASK, torch.ones(3, dtype=torch.long))
    with pytest.raises(TypeError, match=r"mask .* must be bool. Got torch.int64.*\.bool\(\)"):
        Windows(2)(masked)
    done = episode(3)
    done["next", "done"] = done["next", "done"].to(torch.uint8)
    with pytest.raises(TypeError, match=r"'done'.* must be bool. Got torch.uint8"):
        Windows(2)(done)


def test_windows_of_a_batch_without_data_raises():
    with pytest.raises(ValueError, match=r"Windows reads the values .* is on the meta device"):
        Windows(2)(episode(3).to("meta"))


def test_windows_drop_without_a_window_warns_once():
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


def test_windows_without_a_whole_window_are_empty():
    empty = Windows(8, "drop")(episode(5))
    assert empty.batch_size == (0, 8) and empty["recurrent_state"].shape == (0, 8, 1, 1)


def with_ids(ids: list[int], first: list[int]) -> Any:
    """A row of unfinished pieces of three steps: of each trajectory, from step ``first`` on."""
    pieces = []
    for number, start in zip(ids, first, strict=True):
        piece = episode(3, done=False, first=100 * number + start)
        piece["is_init"][0] = start == 1
        piece["collector", "traj_ids"] = torch.full((3,), number)
        pieces.append(piece)
    joined: Any = torch.cat(pieces)
    return joined


def test_windows_trajectory_ids_keep_mixed_streams_apart():
    """Rows mix two workers' trajectories, without a flag where one follows the other."""
    transform = Windows(4, "null")
    assert not len(transform(with_ids([1, 2], [1, 1])))
    assert transform.waiting == 6
    windows = transform(with_ids([2, 1], [4, 4]))
    assert windows["x"].tolist() == [[201, 202, 203, 204], [101, 102, 103, 104]]
    assert len(set(windows["window", "episode"][:, 0].tolist())) == 2
    rest = transform.flush()
    assert rest is not None
    assert rest["x"].tolist() == [[205, 206, 0, 0], [105, 106, 0, 0]]
    assert rest["window", "first"].tolist() == [4, 4]


def test_windows_trajectory_ids_allow_batches_with_other_numbers_of_rows():
    transform = Windows(6, "null")
    one, two = with_ids([1], [1]), with_ids([2], [1])
    transform(torch.stack([one, two]))
    assert cut(transform, with_ids([2], [4])) == [[201, 202, 203, 204, 205, 206]]
    assert cut(transform, with_ids([1], [4])) == [[101, 102, 103, 104, 105, 106]]


def test_windows_same_trajectory_id_in_two_rows_raises():
    rows: Any = torch.stack([with_ids([1], [1]), with_ids([1], [1])])
    with pytest.raises(ValueError, match="Two trajectories .* have the id 1.*one Windows for each"):
        Windows(4)(rows)


def test_windows_trajectory_that_never_continues_is_cut_as_ended():
    transform, windows = Windows(4, "null"), []
    transform(with_ids([1], [1]))
    for number in range(2, 103):
        windows += cut(transform, with_ids([number], [1]))
    assert windows == [[101, 102, 103, 0]]


def test_windows_copies_give_different_episodes_different_numbers():
    """Workers with a copy each, and a run that is resumed, write into one buffer."""
    transform = Windows(3)
    transform(episode(6))
    copies = [transform, copy.deepcopy(transform), pickle.loads(pickle.dumps(Windows(3)))]
    numbers = [one.cut(episode(6))["window", "episode"] for one in copies]
    assert [len(set(one.tolist())) for one in numbers] == [1, 1, 1]
    assert len(set(torch.cat(numbers).tolist())) == 3


def test_windows_rejected_batch_changes_nothing():
    transform, other = Windows(4, "null"), Windows(4, "null")
    for one in (transform, other):
        one(episode(7, done=False))
    bad = episode(5, first=8)
    bad["is_init"][:] = False
    for wrong in (bad.clone().set("new", torch.zeros(5)), bad.exclude("x")):
        before = wrong.clone()
        with pytest.raises(KeyError, match=r"must have the entries.*'(new|x)'.*flush\(\) or clear"):
            transform(wrong)
        assert (wrong == before).all()
    windows, expected = (one.cut(bad) for one in (transform, other))
    assert windows["x"].tolist() == expected["x"].tolist() == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert windows["window", "first"].tolist() == [4, 8]


# Its annotations make it abstract.
Stack: Any = NonTensorStack
TEXTS: dict[str, Callable[[int], Any]] = {
    "NonTensorData": lambda n: NonTensorData("left", batch_size=[n]),
    "NonTensorStack": lambda n: Stack(*map(str, range(n))),
    "MetaData": lambda n: MetaData("left"),
    "UnbatchedTensor": lambda n: UnbatchedTensor(torch.arange(7.0)),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_windows_keep_entries_that_are_no_tensors(kind):
    transform = Windows(4, "null")
    pieces = [episode(6, done=False), episode(5, first=7)]
    pieces[1]["is_init"][0] = False
    cuts = []
    for piece in pieces:
        piece["text"] = TEXTS[kind](len(piece))
        piece["next", "text"] = TEXTS[kind](len(piece))
        cuts.append(transform(piece))
    assert cuts[1]["x"].tolist() == [[5, 6, 7, 8], [9, 10, 11, 0]]
    for text in (cuts[1]["text"], cuts[1]["next", "text"]):
        if kind == "NonTensorStack":
            assert [list(row) for row in text] == [["4", "5", "0", "1"], ["2", "3", "4", "4"]]
        elif kind == "UnbatchedTensor":
            assert torch.equal(torch.as_tensor(text.data), torch.arange(7.0))
        else:
            assert text == "left" or [list(row) for row in text] == 2 * [4 * ["left"]]


@pytest.mark.parametrize("kind", ["NonTensorData", "MetaData", "UnbatchedTensor"])
def test_windows_of_no_rows_with_entries_that_are_no_tensors_are_none(kind):
    batch = episode(6).unsqueeze(0)[:0]
    batch["text"] = TEXTS[kind](0)
    assert Windows(4)(batch).shape == (0, 4)


def test_windows_with_text_are_stored_and_sampled():
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10), transform=Windows(3, "null"), batch_size=4
    )
    data = episode(5)
    data["text"] = Stack(*"abcde")
    buffer.extend(data)
    sample = buffer.sample()
    for x, text in zip(sample["x"].tolist(), sample["text"], strict=True):
        assert list(text) == (["a", "b", "c"] if x[0] == 1 else ["d", "e", "e"])


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: Compose(one)])
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Windows(4), "one time step at a time.*replay buffer.*postproc"),
        (lambda: BurnIn(GRUModule(3, 4, in_key="o", out_key="e"), 2), "replay buffer of Windows"),
    ],
)
def test_sequence_transform_in_environment_raises(make, text, wrap):
    with pytest.raises(RuntimeError, match=f"cannot be appended to an environment.*{text}"):
        TransformedEnv(GymEnv("CartPole-v1"), wrap(make()))


def test_windows_unflagged_break_raises_and_changes_nothing():
    """A batch of another collector without trajectory ids comes in between."""
    transform = Windows(4, "null")
    transform(episode(6, done=False))
    other = episode(6, done=False, first=107)
    other["is_init"][:] = False
    with pytest.raises(ValueError, match="1 of 7 steps do not.*Windows joins.*Windows of its own"):
        transform(other)
    mixed: Any = torch.cat([episode(3, done=False, first=7), other])
    mixed["is_init"][:] = False
    with pytest.raises(ValueError, match="'recurrent_state' is not the state at"):
        transform(mixed)
    with set_value_checks(False):
        assert len(copy.deepcopy(transform)(other)) == 2
    last = episode(3, first=7)
    last["is_init"][:] = False
    assert cut(transform, last) == [[5, 6, 7, 8], [9, NULL, NULL, NULL]]


def test_windows_empty_batch_gives_no_windows():
    transform = Windows(4, "null")
    assert transform(episode(3)[:0]).shape == (0, 4)
    data = episode(3, done=False)
    assert transform(data.set(MASK, torch.zeros(3, dtype=torch.bool))).shape == (0, 4)


def test_windows_without_flags_are_cut_at_done() -> None:
    data: Any = torch.cat([episode(3), episode(4, first=11)])
    assert cut(Windows(4, "null"), data.exclude("is_init")) == [[1, 2, 3, NULL], [11, 12, 13, 14]]


def test_windows_of_a_batch_with_a_device_have_it() -> None:
    windows = Windows(2, "drop")(episode(4).to("cpu"))
    assert windows.device == torch.device("cpu") and Windows(2, "drop")(episode(4)).device is None
