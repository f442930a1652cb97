"""Actors: what they collect, whose it is, and what happens when one dies.

The rules are tested with actors that answer when the test says so; that real ones keep them is
tested once with processes and once on a Ray cluster, with two workers each.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.data import LazyTensorStorage, OneHot, TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type

from rnnkeys import drqn_policy, get_env_transforms_from_module
from rnnkeys.transforms import Windows

TUTORIALS = Path(__file__).parents[1] / "tutorials"
ACTOR = ("collector", "actor")
LONG = 240.0  # seconds that a loaded machine may take


@pytest.fixture(autouse=True)
def actors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as a tutorial imports it."""
    monkeypatch.syspath_prepend(str(TUTORIALS))
    return import_module("actors")


# What actors are asked, and how their answers are put in order.


class ByHand:
    """An actor whose answers the test gives."""

    def __init__(self, plan: Any) -> None:
        self.plan = plan
        self.asked: list[Future] = []
        self.weights: list[Any] = []
        self.stopped = 0

    @staticmethod
    def share(weights: TensorDictBase) -> TensorDictBase:
        return weights

    def collect(self, weights: Any) -> Future:
        self.asked.append(Future())
        self.weights.append(weights)
        return self.asked[-1]

    def stop(self) -> None:
        self.stopped += 1

    def answer(self, value: float = 0.0) -> None:
        batch = TensorDict({"value": torch.full((2, 3), value)}, [2, 3])
        answer = import_module("actors").Answer(batch, f"place {self.plan.actor}")
        self.asked[-1].set_result(answer)

    def die(self) -> None:
        self.asked[-1].set_exception(ChildProcessError("killed"))


class Started:
    """Starts actors by hand and keeps all that it started."""

    share = staticmethod(ByHand.share)

    def __init__(self) -> None:
        self.all: list[ByHand] = []

    def __call__(self, plan: Any) -> ByHand:
        self.all.append(ByHand(plan))
        return self.all[-1]


@pytest.fixture
def started() -> Started:
    return Started()


@pytest.fixture
def collector(actors: ModuleType, started: Started) -> Iterator[Any]:
    with make_by_hand(actors, started) as collector:
        yield collector


def make_by_hand(actors: ModuleType, started: Started, patience: float = LONG) -> Any:
    nothing: Any = None
    plans = [actors.Plan(actor, nothing, nothing, 6, seed=0) for actor in range(2)]
    return actors.ActorCollector(plans, started, seed=0, patience=patience)


def whose(batch: TensorDictBase) -> int:
    tags = batch[ACTOR]
    assert tags.shape == batch.shape and (tags == tags.flatten()[0]).all()
    return int(tags.flatten()[0])


def test_batches_come_in_the_order_in_which_they_are_ready(
    collector: Any, started: Started
) -> None:
    first, second = started.all
    second.answer(1.0)
    batch = collector.next()
    assert whose(batch) == 1 and (batch["value"] == 1).all()
    second.answer(2.0)
    first.answer(3.0)
    # Both are ready: the first was asked earlier, and is not starved by a quicker one.
    assert [whose(collector.next()) for _ in range(2)] == [0, 1]
    assert len(first.asked) == 2 and len(second.asked) == 3


def test_an_actor_is_asked_again_while_the_learner_learns(collector: Any, started: Started) -> None:
    first, second = started.all
    assert len(first.asked) == len(second.asked) == 1
    first.answer()
    collector.next()
    assert len(first.asked) == 2


def test_weights_are_sent_once_to_each_actor_with_its_next_batch(
    collector: Any, started: Started
) -> None:
    first, second = started.all
    policy = nn.Linear(1, 1)
    collector.update_policy_weights_(policy)
    sent = policy.weight.detach().clone()
    nn.init.zeros_(policy.weight)  # what is learned later is not sent
    for _ in range(2):
        first.answer()
        collector.next()
    second.answer()
    collector.next()
    nothing, got, later = first.weights
    assert nothing is None and later is None
    assert torch.equal(got["weight"], sent) and not got["weight"].requires_grad
    assert second.weights[0] is None and torch.equal(second.weights[1]["weight"], sent)


def test_a_dead_actor_is_replaced_by_one_with_other_episodes_and_the_last_weights(
    collector: Any, started: Started
) -> None:
    first, second = started.all
    collector.update_policy_weights_(nn.Linear(1, 1))
    second.answer()
    collector.next()
    second.die()
    first.answer()
    assert whose(collector.next()) == 0
    first.answer()
    with pytest.warns(RuntimeWarning, match=r"Actor 1 \(place 1\) is lost: killed\. Another"):
        assert whose(collector.next()) == 0
    third = started.all[2]
    assert second.stopped == 1 and first.stopped == 0
    assert third.plan.actor == 1 and third.weights[0] is not None
    assert len({actor.plan.seed for actor in started.all}) == 3
    third.answer(5.0)
    assert whose(collector.next()) == 1


def kill_all(started: Started, *actors: int) -> Callable[[Any], ByHand]:
    """Start actors of which these are dead at once, whenever they are replaced."""

    def replaced(plan: Any) -> ByHand:
        new = started(plan)
        if plan.actor in actors:
            collect = new.collect

            def dies(weights: Any) -> Future:
                collect(weights)
                new.die()
                return new.asked[-1]

            new.collect = dies
        return new

    return replaced


def test_the_run_goes_on_without_an_actor_that_keeps_dying(
    collector: Any, started: Started
) -> None:
    first, second = started.all
    collector.start = kill_all(started, 1)
    second.die()
    first.answer()
    assert whose(collector.next()) == 0
    texts = []
    for _ in range(3):
        first.answer()
        with pytest.warns(RuntimeWarning) as told:
            assert whose(collector.next()) == 0
        texts += [str(warning.message) for warning in told]
    assert ["Another takes its place" in text for text in texts] == [True, True, False]
    assert "3 times without a batch in between. The run goes on with the other 1" in texts[2]
    first.answer()
    assert whose(collector.next()) == 0 and len(started.all) == 4


@pytest.mark.filterwarnings("ignore:Actor . .* is lost:RuntimeWarning")
def test_the_loss_of_all_actors_names_the_last_one_and_the_remedy(
    collector: Any, started: Started, actors: ModuleType
) -> None:
    collector.start = kill_all(started, 0, 1)
    for actor in started.all[:]:
        actor.die()
    with pytest.raises(actors.ActorsLost, match=r"Actor 1 .*killed, 3 times.*no other.*--resume"):
        collector.next()
    assert len(started.all) == 6 and all(actor.stopped for actor in started.all)


def test_deaths_with_batches_in_between_do_not_add_up(collector: Any, started: Started) -> None:
    for _ in range(5):
        collector.actors[1].die()
        collector.actors[0].answer()
        collector.next()
        with pytest.warns(RuntimeWarning, match="Another takes its place"):
            collector.actors[0].answer()
            collector.next()
        collector.actors[1].answer()
        while whose(collector.next()) != 1:
            pass
    assert len(started.all) == 7


def test_an_actor_that_does_not_answer_is_replaced(actors: ModuleType, started: Started) -> None:
    with make_by_hand(actors, started, patience=0.2) as collector:
        time.sleep(0.3)
        started.all[0].answer()
        with pytest.warns(RuntimeWarning, match="Actor 1 .*no answer for 0 seconds"):
            assert whose(collector.next()) == 0
        assert started.all[1].stopped == 1 and started.all[2].plan.actor == 1


def test_a_mistake_in_the_program_is_told_and_not_tried_again(
    collector: Any, started: Started, actors: ModuleType
) -> None:
    failure = actors.Answer(None, "process 7", "ZeroDivisionError: by zero")
    started.all[0].asked[0].set_result(failure)
    with pytest.raises(RuntimeError, match=r"Actor 0 \(process 7\) failed:\nZeroDivisionError"):
        collector.next()
    assert len(started.all) == 2


def test_shutdown_stops_every_actor_once(actors: ModuleType, started: Started) -> None:
    collector = make_by_hand(actors, started)
    collector.shutdown()
    collector.shutdown()
    assert [actor.stopped for actor in started.all] == [1, 1]
    with pytest.raises(actors.ActorsLost, match="were shut down"):
        collector.next()


def test_bad_arguments_are_named(actors: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(actors.make_collector, make_env=None, make_policy=None, frames_per_batch=8)
    with pytest.raises(ValueError, match="one of none, process, ray. Got 'thread'"):
        make("thread", 2)
    with pytest.raises(ValueError, match="at least 1. Got 0"):
        make("process", 0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rnnkeys\[ray\]'"):
        make("ray", 2)


def test_a_cluster_that_cannot_be_joined_is_told_with_the_remedy(
    actors: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(address: str, **options: Any) -> None:
        raise ConnectionError(f"Failed to connect to Ray cluster at {address}")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    make = partial(actors.make_collector, "ray", 2, None, None, frames_per_batch=8)
    with pytest.raises(ConnectionError, match="at 10.0.0.1:6379. .*RAY_AUTH_MODE=token"):
        make()
    with pytest.raises(ConnectionError, match="at 10.0.0.2:1. .*RAY_ADDRESS or ray_address"):
        make(ray_address="10.0.0.2:1")


def test_actors_beside_a_learner_on_a_gpu_are_refused(actors: ModuleType) -> None:
    settings = import_module("r2d2_settings").Settings(actors="ray", device="cuda")
    with pytest.raises(ValueError, match="--device is cuda: expected cpu"):
        settings._check_actors()


def test_the_number_of_actors_may_follow_their_kind(actors: ModuleType) -> None:
    spell_out = import_module("r2d2_settings").spell_out
    named = ["--actors", "ray", "--num-actors", "4", "--seed", "3"]
    assert spell_out(["--actors", "ray", "4", "--seed", "3"]) == named == spell_out(named)
    assert spell_out(["--seed", "3", "--actors", "ray"]) == ["--seed", "3", "--actors", "ray"]


# Windows of several actors.


def steps(actor: int, first: int, *, starts: bool = False, length: int = 5) -> TensorDict:
    """Two streams of an actor: steps are numbered, and each actor has its own thousand."""
    count = torch.arange(first, first + length).expand(2, length) + 1000 * actor
    init = torch.zeros(2, length, 1, dtype=torch.bool)
    init[:, 0] = starts
    batch = TensorDict({"x": count + torch.tensor([[0], [500]]), "is_init": init}, [2, length])
    batch["next", "done"] = torch.zeros(2, length, 1, dtype=torch.bool)
    return batch.set(ACTOR, torch.tensor(actor).expand(2, length))


def test_windows_join_only_what_one_actor_collected(actors: ModuleType) -> None:
    windows, alone = actors.ActorWindows(4, "last"), [Windows(4, "last"), Windows(4, "last")]
    for actor, first in [(0, 0), (1, 0), (1, 5), (0, 5), (1, 10), (0, 10)]:
        batch = steps(actor, first, starts=first == 0)
        cut = windows.cut(batch)
        assert torch.equal(cut["x"], alone[actor].cut(batch)["x"])
        assert (cut["x"] == cut["x"][:, :1] + torch.arange(4)).all()
    assert windows.waiting == sum(one.waiting for one in alone) > 0


def test_episodes_are_numbered_behind_those_of_a_checkpoint(actors: ModuleType) -> None:
    before, after = actors.ActorWindows(4, "null"), actors.ActorWindows(4, "null")
    old = before.cut(steps(0, 0, starts=True))["window", "episode"]
    after.number_behind(old)
    new = torch.cat([after.cut(steps(k, 0, starts=True))["window", "episode"] for k in range(2)])
    assert new.min() > old.max()


def test_windows_of_a_replaced_actor_start_anew(actors: ModuleType) -> None:
    windows = actors.ActorWindows(4, "null")
    windows.cut(steps(0, 0, starts=True))
    cut = windows.cut(steps(0, 100, starts=True))
    rest, new = cut["x"][[0, 2]], cut["x"][[1, 3]]
    assert rest.tolist() == [[4, 0, 0, 0], [504, 0, 0, 0]]
    assert (new[:, 0] == torch.tensor([100, 600])).all()


def test_no_two_episodes_have_the_same_number(actors: ModuleType) -> None:
    windows = actors.ActorWindows(5, "last")
    numbers = [
        windows.cut(steps(actor, first, starts=True))["window", "episode"].tolist()
        for first in (0, 5)
        for actor in range(3)
    ]
    assert len({number for some in numbers for number in some}) == 12


def test_a_replay_buffer_of_actors_gives_windows(actors: ModuleType) -> None:
    replay = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10), transform=actors.ActorWindows(4, "last"), batch_size=6
    )
    replay.extend(steps(0, 0, starts=True, length=3))  # fills no window yet
    assert len(replay) == 0
    replay.extend(steps(0, 3))
    replay.extend(steps(1, 0, starts=True))
    sample = replay.sample()
    assert len(replay) == 6 and sample.shape == (6, 4)
    assert (sample["x"] == sample["x"][:, :1] + torch.arange(4)).all()


def test_batches_without_one_owner_are_refused(actors: ModuleType) -> None:
    windows = actors.ActorWindows(4)
    batch = steps(0, 0, starts=True)
    with pytest.raises(KeyError, match="keep it when you select"):
        windows.cut(batch.exclude(ACTOR))
    with pytest.raises(ValueError, match=r"actors \[0, 1\]"):
        windows.cut(torch.cat([batch, steps(1, 0)]))  # pyright: ignore[reportArgumentType]


# Exploration.


def test_the_ladder_is_that_of_the_paper() -> None:
    exploration = import_module("exploration")
    ladder = exploration.epsilon_ladder(8)
    assert torch.allclose(ladder, torch.tensor([0.4 ** (1 + i) for i in range(8)]))
    assert exploration.epsilon_ladder(1).tolist() == pytest.approx([0.4])


def test_each_environment_acts_at_random_as_often_as_its_rung_says() -> None:
    exploration = import_module("exploration")
    explore = exploration.EpsilonGreedy(OneHot(1000), torch.tensor([0.0, 1.0]))
    best = nn.functional.one_hot(torch.tensor([[7] * 50, [7] * 50]), 1000)
    for row in range(50):
        with set_exploration_type(ExplorationType.RANDOM):
            played = explore(TensorDict({"action": best[:, row].clone()}, [2]))["action"]
        assert torch.equal(played[0], best[0, row])
        best[:, row] = played
    assert (best[1].argmax(-1) == 7).sum() < 5
    explore.floor.fill_(1.0)
    with set_exploration_type(ExplorationType.RANDOM):
        rows = [explore(TensorDict({"action": best[:, 0]}, [2]))["action"][0] for _ in range(50)]
    assert torch.stack(rows).argmax(-1).unique().numel() > 30
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        same = explore(TensorDict({"action": best[:, 0]}, [2]))["action"]
    assert torch.equal(same, best[:, 0])


# Real actors.


def make_policy() -> TensorDictSequential:
    return drqn_policy(OneHot(2), (2,), hidden_size=4)


def make_parts(policy: TensorDictSequential) -> tuple[Callable, Callable]:
    """Return what makes environments, and what makes the policy of an actor.

    Both are functions inside of one, which travel whole: actors on Ray cannot import tests.
    """
    make_env = import_module("environments").make_env
    explore = import_module("exploration").EpsilonGreedy

    def make_training_env() -> Any:
        env = make_env("CartPole-v1", "positions", 2)
        env.append_transform(get_env_transforms_from_module(policy))
        return env

    def make_actor_policy(actor: int) -> TensorDictSequential:
        both: Any = (policy, explore(OneHot(2), 0.5))
        return TensorDictSequential(*both)

    return make_training_env, make_actor_policy


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Say what a cluster of this test alone needs."""
    pytest.importorskip("ray")
    # Not tmp_path: the names of sockets in it may have a hundred characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        _set_up_ray(monkeypatch)
        yield


def _set_up_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Else Ray writes a token of its own into the home of whoever runs the tests.
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # is put back after Ray has set it
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)


def read_process(collector: Any, actor: int) -> int:
    return int(collector.where[actor].split()[1])


def is_running(process: int) -> bool:
    """Tell whether a process runs; one that only waits for its parent to read its end does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


def next_of(collector: Any, actor: int) -> TensorDictBase:
    limit = time.monotonic() + LONG
    while whose(batch := collector.next()) != actor:
        assert time.monotonic() < limit, f"no batch of actor {actor}"
        time.sleep(0.05)
    return batch


def assert_goes_on(before: TensorDictBase, after: TensorDictBase) -> None:
    """The second batch starts where the first one stopped, in the middle of episodes or not."""
    ended = before["next", "done"][:, -1, 0]
    assert torch.equal(after["is_init"][:, 0, 0], ended)
    for key in ("observation", "recurrent_state_h", "recurrent_state_c"):
        last, first = before["next", key][:, -1], after[key][:, 0]
        assert torch.equal(first[~ended], last[~ended])


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
@pytest.mark.filterwarnings("ignore:Actor . .* is lost:RuntimeWarning")
@pytest.mark.parametrize("kind", ["process", "ray"])
def test_two_real_actors(kind: str, actors: ModuleType, request: pytest.FixtureRequest) -> None:
    if kind == "ray":
        request.getfixturevalue("ray_cluster")
    policy = make_policy()
    parts = make_parts(policy)
    batches: dict[int, list[TensorDictBase]] = {0: [], 1: []}
    with actors.make_collector(kind, 2, *parts, frames_per_batch=16, patience=LONG) as collector:
        while min(map(len, batches.values())) < 3:
            batch = collector.next()
            assert batch.shape == (2, 8)
            if before := batches[whose(batch)]:
                assert_goes_on(before[-1], batch)
            before.append(batch)
        assert not torch.equal(*(batches[actor][0]["observation"] for actor in (0, 1)))

        for parameter in policy.parameters():
            nn.init.zeros_(parameter)
        collector.update_policy_weights_(parts[1](0))
        for actor in (0, 1):
            wait_until(lambda: not next_of(collector, actor)["action_value"].any())  # noqa: B023

        processes = [read_process(collector, actor) for actor in (0, 1)]
        assert len({*processes, os.getpid()}) == 3
        os.kill(processes[0], signal.SIGKILL)
        batch = next_of(collector, 0)
        while read_process(collector, 0) == processes[0]:  # handed over before it died
            batch = next_of(collector, 0)
        assert batch["is_init"][:, 0].all()  # nothing is joined to what the dead one collected
        assert not batch["action_value"].any()
        assert read_process(collector, 1) == processes[1]
        processes.append(read_process(collector, 0))
    wait_until(lambda: not any(map(is_running, processes)))
    assert not multiprocessing.active_children()
