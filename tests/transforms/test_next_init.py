"""Marks in the next view: the tracker in each of its uses, the samplers, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    SliceSampler,
    TensorDictReplayBuffer,
)
from torchrl.envs import Compose, InitTracker, StepCounter, TransformedEnv

from rnnkeys.transforms import (
    NextInitPrioritizedSliceSampler,
    NextInitSliceSampler,
    NextInitSliceSamplerWithoutReplacement,
    NextInitStreamingSliceSampler,
    NextInitTracker,
)
from tests.support.target_cases import ShortEpisodes

SAMPLERS: dict[str, Any] = {
    "slices": NextInitSliceSampler,
    "without replacement": NextInitSliceSamplerWithoutReplacement,
    "prioritised": lambda **kw: NextInitPrioritizedSliceSampler(60, 0.7, 0.9, **kw),
    "streaming": NextInitStreamingSliceSampler,
}
NESTED = ("agents", "fresh")


def make_env(batch: tuple[int, ...] = ()) -> Any:
    compose: Any = Compose
    wrap: Any = TransformedEnv
    return wrap(ShortEpisodes("discrete", batch), compose(InitTracker(), StepCounter()))


def collect(frames: int = 60, batch: tuple[int, ...] = (), **options: Any) -> TensorDictBase:
    make: Any = Collector
    collector = make(make_env(batch), None, frames_per_batch=frames, total_frames=-1, **options)
    data = next(iter(collector)).clone()
    collector.shutdown()
    return data


def buffer(data: TensorDictBase, sampler: Any, storage: Any = LazyTensorStorage, **options: Any):
    storing = options.pop("storing", {})
    size = data.numel() if storing else len(data)
    rb = TensorDictReplayBuffer(storage=storage(size, **storing), sampler=sampler, **options)
    rb.extend(data)
    return rb


def with_keys(data: TensorDictBase) -> TensorDictBase:
    """Add a nested key of marks, for two agents that start together."""
    marks = data["is_init"]
    agents = marks.unsqueeze(-2).expand(*data.shape, 2, 1)
    data.set(NESTED, agents.clone())
    return data.set(("next", *NESTED), torch.zeros_like(agents))


def hand_made(batch: TensorDictBase, starts: Tensor) -> Tensor:
    """Return what the next view has to be marked with, given where slices start."""
    marks = batch["is_init"].clone()
    marks[starts] = True
    return marks


def tensors(batch: TensorDictBase) -> dict[Any, Tensor]:
    return {key: batch.get(key).clone() for key in batch.keys(True, True)}


def assert_untouched(batch: TensorDictBase, before: dict[Any, Tensor]) -> None:
    assert set(batch.keys(True, True)) == set(before)
    for key, value in before.items():
        assert torch.equal(batch.get(key), value), key


# --- as a plain call ------------------------------------------------------------------------------


def test_marks_a_flat_sample_and_leaves_it_as_it_was() -> None:
    batch: Any = buffer(collect(), SliceSampler(slice_len=4), batch_size=24).sample()
    before = tensors(batch)
    marked = NextInitTracker()(batch)
    assert_untouched(batch, before)
    expected = hand_made(batch, torch.arange(0, 24, 4))
    assert not batch["next", "is_init"].any() and not expected.all()
    assert torch.equal(marked["next", "is_init"], expected)
    assert torch.equal(marked["is_init"], expected)
    assert marked["observation"] is batch["observation"]


def test_marks_rows_of_a_batch() -> None:
    data = collect(batch=(3,))
    assert not data["is_init"][1:, 0].all() or data["is_init"].any()
    marked = NextInitTracker()(data)
    expected = data["is_init"].clone()
    expected[:, 0] = True
    assert torch.equal(marked["next", "is_init"], expected)
    # The root is as it was: its rows start segments anyway.
    assert torch.equal(marked["is_init"], data["is_init"])


def test_a_step_behind_done_becomes_a_start() -> None:
    data = collect()
    truth = data["is_init"].clone()
    data["is_init"] = torch.zeros_like(truth)
    data["is_init"][0] = True
    marked = NextInitTracker()(data.exclude("step_count", ("collector", "traj_ids")))
    assert truth.sum() > 5
    assert torch.equal(marked["is_init"], truth)
    assert torch.equal(marked["next", "is_init"], truth)


def test_several_keys_nested_ones_among_them() -> None:
    data = with_keys(collect(batch=(2,)))
    marked = NextInitTracker(["is_init", NESTED])(data)
    assert marked["next", "is_init"].sum() > 4
    agents = marked["next", "is_init"].unsqueeze(-2).expand(*data.shape, 2, 1)
    assert torch.equal(marked.get(("next", *NESTED)), agents)


def test_agents_may_start_at_times_of_their_own() -> None:
    data = with_keys(collect())
    alone = torch.rand(60, 2, 1) < 0.2
    data.set(NESTED, alone)
    clocks = ("next", "done"), "step_count", "collector"
    marked = NextInitTracker(NESTED)(data.exclude(*clocks))
    expected = alone.clone()
    expected[0] = True
    assert torch.equal(marked.get(("next", *NESTED)), expected)
    assert not marked["next", "is_init"].any()


def test_marks_that_are_there_stay() -> None:
    data = collect()
    data["next", "is_init"][7] = True
    assert not data["is_init"][7]
    marked = NextInitTracker()(data)
    assert marked["next", "is_init"][7]
    # Twice is once.
    again = NextInitTracker()(marked)
    assert torch.equal(again["next", "is_init"], marked["next", "is_init"])


def test_a_next_view_without_marks_gets_them() -> None:
    data = collect().exclude(("next", "is_init"))
    marked = NextInitTracker()(data)
    assert torch.equal(marked["next", "is_init"], data["is_init"])
    assert ("next", "is_init") not in data.keys(True)


# --- as a collector's postproc, and as a transform of a replay buffer ----------------------------


@pytest.mark.parametrize("batch", [(), (2,)])
def test_as_a_collectors_postproc(batch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    data = collect(batch=batch, postproc=NextInitTracker())
    expected = data["is_init"].clone()
    expected[..., 0, :] = True
    assert expected.sum() > 3
    assert torch.equal(data["next", "is_init"], expected)


@pytest.mark.parametrize("prefetch", [None, 2])
def test_as_a_transform_of_a_buffer_of_windows(prefetch: int | None) -> None:
    data = collect(batch=(6,))
    rb = buffer(data, None, transform=NextInitTracker(), batch_size=4, prefetch=prefetch)
    for _ in range(3):
        batch: Any = rb.sample()
        assert batch.shape == (4, 10)
        expected = batch["is_init"].clone()
        expected[:, 0] = True
        assert torch.equal(batch["next", "is_init"], expected)
    rb.shutdown()
    assert not rb._storage[:]["next", "is_init"].any()


@pytest.mark.parametrize("storing", [{}, {"ndim": 2}])
def test_runs_too_early_where_a_sampler_cuts_slices(storing: dict[str, int]) -> None:
    data = collect(batch=(2,)) if storing else collect()
    rb = buffer(
        data, SliceSampler(slice_len=4), storing=storing, transform=NextInitTracker(), batch_size=8
    )
    with pytest.raises(RuntimeError, match=r"runs too early.*\.NextInitSliceSampler"):
        rb.sample()


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (NextInitTracker, r"InitTracker\(\)"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda transform: transform, Compose])
def test_is_no_transform_of_an_environment(make: Any, remedy: str, wrap: Any) -> None:
    with pytest.raises(RuntimeError, match=f"no transform of an environment.*{remedy}"):
        make_env().append_transform(wrap(make()))


# --- as a sampler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [None, 2])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_samplers_mark_both_views(kind: str, prefetch: int | None) -> None:
    data = collect()
    rb = buffer(data, SAMPLERS[kind](slice_len=4), batch_size=24, prefetch=prefetch)
    before = tensors(rb._storage[:])
    for _ in range(3):
        batch: Any = rb.sample()
        # The last batch without replacement is what is left.
        assert len(batch) == 24 or kind == "without replacement"
        index = batch["index"].flatten()
        expected = hand_made(batch, torch.arange(0, len(batch), 4))
        # Inside of slices, steps follow each other in the storage.
        assert (index.reshape(-1, 4).diff(dim=1) == 1).all()
        assert torch.equal(batch["is_init"], expected)
        assert torch.equal(batch["next", "is_init"], expected)
        assert (~expected).any()
    rb.shutdown()
    assert_untouched(rb._storage[:], before)


@pytest.mark.parametrize("kind", ["slices", "without replacement", "prioritised"])
def test_samplers_of_slices_shorter_than_asked(kind: str) -> None:
    rb = buffer(collect(), SAMPLERS[kind](slice_len=4, strict_length=False), batch_size=40)
    batch: Any = rb.sample()
    starts = torch.ones(len(batch), dtype=torch.bool)
    starts[1:] = batch["index"].flatten().diff() != 1
    lengths = starts.nonzero().flatten().diff()
    assert lengths.unique().numel() > 1
    # Slices of neighbouring episodes may be neighbours too: then the episode is marked.
    expected = hand_made(batch, starts)
    assert (batch["next", "is_init"] >= expected).all()
    ended = batch["next", "done"].flatten()
    assert torch.equal(batch["next", "is_init"].flatten()[1:], expected.flatten()[1:] | ended[:-1])


@pytest.mark.parametrize("kind", ["slices", "prioritised"])
def test_samplers_know_keys_by_other_names(kind: str) -> None:
    data = with_keys(collect())
    keys: Any = ["is_init", NESTED]
    rb = buffer(data, SAMPLERS[kind](slice_len=4, init_key=keys), batch_size=16)
    batch: Any = rb.sample()
    agents = batch.get(("next", *NESTED))
    assert agents[::4].all() and not agents.all()
    assert torch.equal(agents[:, 0], batch["next", "is_init"])
    assert torch.equal(agents, batch.get(NESTED))


def test_samplers_of_buffers_of_streams() -> None:
    """Slices through the ends of episodes, from a memory map with a dimension for streams."""
    data = collect(batch=(2,))
    data["stream"] = torch.arange(2).unsqueeze(-1).expand(2, 30)
    sampler = NextInitSliceSampler(slice_len=6, traj_key="stream")
    rb = buffer(data, sampler, LazyMemmapStorage, storing={"ndim": 2}, batch_size=24, prefetch=1)
    batch: Any = rb.sample()
    batch = batch.reshape(-1, 6)
    step, stream = batch["index"].unbind(-1)
    inside = data["is_init"][stream, step]
    assert inside[:, 1:].any()
    expected = inside.clone()
    expected[:, 0] = True
    assert torch.equal(batch["next", "is_init"], expected)


@pytest.mark.parametrize("kind", ["slices", "prioritised"])
def test_samplers_leave_ends_alone_that_nobody_asked_for(kind: str) -> None:
    data = collect()
    rb = buffer(data, SAMPLERS[kind](slice_len=4, truncated_key=None), batch_size=40)
    batch: Any = rb.sample()
    index = batch["index"].flatten()
    assert torch.equal(batch["next", "done"], data["next", "done"][index])
    assert batch["next", "is_init"][::4].all()


def test_samplers_can_be_copied_and_saved() -> None:
    data = collect()
    sampler = NextInitSliceSampler(slice_len=4, init_key=["is_init"])
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        batch: Any = buffer(data, other, batch_size=8).sample()
        assert batch["next", "is_init"][::4].all()


def test_trackers_can_be_copied_and_saved() -> None:
    data, tracker = collect(), NextInitTracker(["is_init"])
    for other in (copy.deepcopy(tracker), pickle.loads(pickle.dumps(tracker)), tracker.clone()):
        assert torch.equal(other(data)["next", "is_init"], tracker(data)["next", "is_init"])


# --- what is refused ------------------------------------------------------------------------------


def broken(**entries: Any) -> TensorDictBase:
    return collect(12).update(entries)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "no marks": (
        lambda: collect(12).exclude("is_init"),
        KeyError,
        r"no init key 'is_init'.*InitTracker\(\).*observation",
    ),
    "no next view": (lambda: collect(12).exclude("next"), KeyError, "no 'next' entry.*transitions"),
    "float marks": (
        lambda: broken(is_init=torch.zeros(12, 1)),
        TypeError,
        r"'is_init' must be bool. Got torch.float32.*\.bool\(\)",
    ),
    "marks without their last dimension": (
        lambda: broken(is_init=torch.zeros(12, dtype=torch.bool)),
        ValueError,
        r"'is_init' must have the shape.*Got \[12\].*unsqueeze\(-1\)",
    ),
    "marks of the next view in another shape": (
        lambda: broken(next={"is_init": torch.zeros(12, 1, 1, dtype=torch.bool)}),
        ValueError,
        r"'next', 'is_init'\) must have the shape of 'is_init', \[12, 1\]",
    ),
    "one step": (lambda: collect(12)[0], ValueError, r"needs a time dimension.*batch size \[\]"),
    "single transitions": (
        lambda: collect(12)[torch.tensor([7, 0, 9, 3])],
        ValueError,
        "Time is not contiguous.*SliceSampler.*set_recurrent_mode",
    ),
    "time first": (
        lambda: collect(12, batch=(2,)).transpose(0, 1).contiguous(),
        ValueError,
        "Time is not contiguous",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    make, error, text = REFUSED[name]
    batch = make()
    before = tensors(batch)
    with pytest.raises(error, match=text):
        NextInitTracker()(batch)
    assert_untouched(batch, before)


def test_refuses_transitions_told_by_their_index_alone() -> None:
    data = collect().exclude("step_count", "collector", "is_init", ("next", "done"))
    data["is_init"] = torch.zeros(60, 1, dtype=torch.bool)
    rb = buffer(data, None, batch_size=16)
    with pytest.raises(ValueError, match="see 'index'"):
        NextInitTracker()(rb.sample())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "key, error, text",
    [([], ValueError, "names no key"), (3, TypeError, "must be a key"), ([3], TypeError, "Got 3")],
)
def test_refuses_keys(key: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        NextInitTracker(key)


def test_samplers_refuse_no_key_and_missing_marks() -> None:
    none: Any = None
    with pytest.raises(ValueError, match="init_key cannot be None"):
        NextInitSliceSampler(slice_len=4, init_key=none)
    rb = buffer(collect().exclude("is_init"), NextInitSliceSampler(slice_len=4), batch_size=8)
    with pytest.raises(KeyError, match=r"no init key 'is_init' in the replay buffer.*InitTracker"):
        rb.sample()


def test_masked_steps_may_break_time() -> None:
    data = collect(12)
    data["step_count"][8:] = 0
    data[("collector", "mask")] = torch.arange(12) < 8
    del data[("collector", "traj_ids")]
    assert NextInitTracker()(data)["next", "is_init"].any()
