from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from rnnkeys.collectors import ACTOR_KEY, ActorWindows
from rnnkeys.transforms import Windows


def make_steps(actor: int, first: int, *, starts: bool = False, length: int = 5) -> TensorDict:
    """Return two rows of an actor; steps are numbered, and each actor has its own thousand."""
    count = torch.arange(first, first + length).expand(2, length) + 1000 * actor
    init = torch.zeros(2, length, 1, dtype=torch.bool)
    init[:, 0] = starts
    batch = TensorDict({"x": count + torch.tensor([[0], [500]]), "is_init": init}, [2, length])
    batch["next", "done"] = torch.zeros(2, length, 1, dtype=torch.bool)
    return batch.set(ACTOR_KEY, torch.tensor(actor).expand(2, length))


def test_actor_windows_join_only_batches_of_one_actor() -> None:
    windows, alone = ActorWindows(4, "last"), [Windows(4, "last"), Windows(4, "last")]
    for actor, first in [(0, 0), (1, 0), (1, 5), (0, 5), (1, 10), (0, 10)]:
        batch = make_steps(actor, first, starts=first == 0)
        cut = windows.cut(batch)
        assert torch.equal(cut["x"], alone[actor].cut(batch)["x"])
        assert (cut["x"] == cut["x"][:, :1] + torch.arange(4)).all()
    assert windows.waiting == sum(one.waiting for one in alone) > 0


def test_actor_windows_number_after_gives_larger_numbers_to_new_episodes() -> None:
    before, after = ActorWindows(4, "null"), ActorWindows(4, "null")
    old = before.cut(make_steps(0, 0, starts=True))["window", "episode"]
    after.number_after(old)
    new = [after.cut(make_steps(k, 0, starts=True))["window", "episode"] for k in range(2)]
    assert torch.cat(new).min() > old.max()


def test_actor_windows_of_a_restarted_actor_start_new_episodes() -> None:
    windows = ActorWindows(4, "null")
    windows.cut(make_steps(0, 0, starts=True))
    cut = windows.cut(make_steps(0, 100, starts=True))
    rest, new = cut["x"][[0, 2]], cut["x"][[1, 3]]
    assert rest.tolist() == [[4, 0, 0, 0], [504, 0, 0, 0]]
    assert (new[:, 0] == torch.tensor([100, 600])).all()


def test_actor_windows_give_every_episode_another_number() -> None:
    windows = ActorWindows(5, "last")
    numbers = [
        windows.cut(make_steps(actor, first, starts=True))["window", "episode"].tolist()
        for first in (0, 5)
        for actor in range(3)
    ]
    assert len({number for some in numbers for number in some}) == 12


def test_actor_windows_in_a_replay_buffer_give_windows() -> None:
    replay = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10), transform=ActorWindows(4, "last"), batch_size=6
    )
    replay.extend(make_steps(0, 0, starts=True, length=3))  # fills no window yet
    assert len(replay) == 0
    replay.extend(make_steps(0, 3))
    replay.extend(make_steps(1, 0, starts=True))
    sample = replay.sample()
    assert len(replay) == 6 and sample.shape == (6, 4)
    assert (sample["x"] == sample["x"][:, :1] + torch.arange(4)).all()


def test_actor_windows_without_one_actor_raise() -> None:
    windows = ActorWindows(4)
    batch = make_steps(0, 0, starts=True)
    with pytest.raises(KeyError, match="keep it when you select"):
        windows.cut(batch.exclude(ACTOR_KEY))
    with pytest.raises(ValueError, match=r"actors \[0, 1\]"):
        windows.cut(torch.cat([batch, make_steps(1, 0)]))  # pyright: ignore[reportArgumentType]
