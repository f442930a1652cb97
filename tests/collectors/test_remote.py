from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from rnnkeys.collectors import ActorError, ActorsLostError, LocalActors, ProcessActors
from tests.support.actors import ManualActors, actor_of, version_of


@pytest.fixture
def actors() -> Iterator[ManualActors]:
    with ManualActors() as actors:
        yield actors


def test_next_returns_batches_in_the_order_of_their_requests(actors: ManualActors) -> None:
    first, second = actors.started
    second.answer(1.0)
    batch = actors.next()
    assert actor_of(batch) == 1 and (batch["value"] == 1).all()
    second.answer(2.0)
    first.answer(3.0)
    # Both are ready: the first was asked earlier, and a faster one does not starve it.
    assert [actor_of(actors.next()) for _ in range(2)] == [0, 1]
    assert len(first.requests) == 2 and len(second.requests) == 3


def test_next_requests_another_batch_of_the_same_actor(actors: ManualActors) -> None:
    first, second = actors.started
    assert len(first.requests) == len(second.requests) == 1
    first.answer()
    actors.next()
    assert len(first.requests) == 2


def test_actors_are_iterated_without_an_end(actors: ManualActors) -> None:
    for count, _ in zip(range(3), _answered(actors), strict=False):
        assert count < 3


def _answered(actors: ManualActors) -> Iterator[Any]:
    actors.started[0].answer()
    for batch in actors:
        yield batch
        actors.started[0].answer()


def test_update_policy_sends_a_copy_once_to_each_actor(actors: ManualActors) -> None:
    first, second = actors.started
    policy = nn.Linear(1, 1)
    actors.update_policy(policy)
    sent = policy.weight.detach().clone()
    nn.init.zeros_(policy.weight)  # a later gradient step is not sent
    for _ in range(2):
        first.answer()
        actors.next()
    second.answer()
    actors.next()
    none, got, later = first.weights
    assert none is None and later is None
    assert torch.equal(got["weight"], sent) and not got["weight"].requires_grad
    assert second.weights[0] is None and torch.equal(second.weights[1]["weight"], sent)


def test_batches_carry_the_version_of_the_weights_that_collected_them(
    actors: ManualActors,
) -> None:
    first, second = actors.started
    versions = []
    for _ in range(3):
        actors.update_policy(nn.Linear(1, 1))
        first.answer()
        versions.append(version_of(actors.next()))
    second.answer()  # requested before any update
    assert versions == [0, 1, 2] and version_of(actors.next()) == 0
    assert actors.policy_version == 3


def test_trajectories_of_all_actors_have_different_numbers(actors: ManualActors) -> None:
    first, second = actors.started
    first.answer(trajectories=((0, 0, 0), (1, 1, 2)))
    second.answer(trajectories=((0, 0, 0), (1, 1, 1)))
    a, b = actors.next(), actors.next()
    first.answer(trajectories=((0, 0, 3), (2, 2, 2)))
    c = actors.next()
    numbers = [batch["collector", "traj_ids"].tolist() for batch in (a, b, c)]
    assert numbers[0] == [[0, 0, 0], [1, 1, 2]] and numbers[1] == [[3, 3, 3], [4, 4, 4]]
    assert numbers[2] == [[0, 0, 5], [2, 2, 2]] and actors.num_trajectories == 6


@pytest.mark.filterwarnings("ignore:Actor . .* is lost:RuntimeWarning")
def test_trajectories_of_a_restarted_actor_have_new_numbers() -> None:
    with ManualActors(first_trajectory=7) as actors:
        actors.started[0].answer()
        assert actors.next()["collector", "traj_ids"].unique().tolist() == [7, 8]
        actors.started[0].die()
        for _ in range(2):  # the first batch was requested before the death
            actors.started[1].answer()
            actors.next()
        actors.started[2].answer()
        assert actors.next()["collector", "traj_ids"].unique().tolist() == [11, 12]


def test_dead_actor_is_restarted_with_another_seed_and_the_latest_weights(
    actors: ManualActors,
) -> None:
    first, second = actors.started
    actors.update_policy(nn.Linear(1, 1))
    second.answer()
    actors.next()
    second.die()
    first.answer()
    assert actor_of(actors.next()) == 0
    first.answer()
    with pytest.warns(RuntimeWarning, match=r"Actor 1 \(place 1\) is lost: killed\. It is rest"):
        assert actor_of(actors.next()) == 0
    third = actors.started[2]
    assert second.stopped == 1 and first.stopped == 0
    assert third.actor == 1 and third.weights[0] is not None
    assert len({worker.seed for worker in actors.started}) == 3
    third.answer(5.0)
    batch = actors.next()
    assert actor_of(batch) == 1 and version_of(batch) == 1


def test_actor_that_keeps_dying_is_given_up(actors: ManualActors) -> None:
    first, second = actors.started
    actors.mortal = {1}
    second.die()
    first.answer()
    assert actor_of(actors.next()) == 0
    texts = []
    for _ in range(3):
        first.answer()
        with pytest.warns(RuntimeWarning) as warned:
            assert actor_of(actors.next()) == 0
        texts += [str(warning.message) for warning in warned]
    assert ["It is restarted" in text for text in texts] == [True, True, False]
    assert "3 times in a row without a batch. Collection continues with the other 1" in texts[2]
    first.answer()
    assert actor_of(actors.next()) == 0 and len(actors.started) == 4


def test_actor_without_restarts_is_given_up_at_once() -> None:
    with ManualActors(max_restarts=0) as actors:
        actors.started[1].die()
        actors.started[0].answer()
        assert actor_of(actors.next()) == 0
        actors.started[0].answer()
        with pytest.warns(RuntimeWarning, match="1 times in a row without a batch. Collection"):
            assert actor_of(actors.next()) == 0
        assert len(actors.started) == 2


@pytest.mark.filterwarnings("ignore:Actor . .* is lost:RuntimeWarning")
def test_loss_of_all_actors_raises_and_names_the_last_one(actors: ManualActors) -> None:
    actors.mortal = {0, 1}
    for worker in actors.started[:]:
        worker.die()
    with pytest.raises(ActorsLostError, match=r"Actor 1 .*killed, 3 times.*no other.*save it"):
        actors.next()
    assert len(actors.started) == 6 and all(worker.stopped for worker in actors.started)


def test_deaths_with_batches_in_between_are_not_added_up(actors: ManualActors) -> None:
    first = actors.started[0]
    for _ in range(5):
        actors.started[-1].die()
        first.answer()
        actors.next()
        with pytest.warns(RuntimeWarning, match="It is restarted"):
            first.answer()
            actors.next()
        actors.started[-1].answer()
        while actor_of(actors.next()) != 1:
            pass
    assert len(actors.started) == 7


def test_actor_without_an_answer_is_restarted_after_the_timeout() -> None:
    with ManualActors(timeout=0.2) as actors:
        time.sleep(0.3)
        actors.started[0].answer()
        with pytest.warns(RuntimeWarning, match="Actor 1 .*no answer for 0 seconds"):
            assert actor_of(actors.next()) == 0
        assert actors.started[1].stopped == 1 and actors.started[2].actor == 1


def test_exception_in_an_actor_is_raised_and_not_tried_again(actors: ManualActors) -> None:
    actors.started[0].fail("ZeroDivisionError: by zero")
    with pytest.raises(ActorError, match=r"Actor 0 \(place 0\):\nZeroDivisionError"):
        actors.next()
    assert len(actors.started) == 2


def test_close_stops_every_actor_once_and_releases_last() -> None:
    released = []
    actors = ManualActors(release=lambda: released.append([w.stopped for w in actors.started]))
    actors.close()
    actors.close()
    assert released == [[1, 1]]
    with pytest.raises(RuntimeError, match="The actors were closed"):
        actors.next()


def test_close_stops_the_others_if_one_raises() -> None:
    actors = ManualActors()

    def fail() -> None:
        raise OSError("no answer")

    actors.started[1].stop = fail
    with pytest.raises(OSError, match="no answer"):
        actors.close()
    assert actors.started[0].stopped == 1


def test_actors_that_nobody_holds_are_stopped() -> None:
    actors = ManualActors()
    workers, alive = actors.started, weakref.ref(actors)
    del actors
    gc.collect()
    assert alive() is None and [worker.stopped for worker in workers] == [1, 1]


def test_constructor_that_raises_stops_what_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started, released = [], []
    start = ManualActors.start_worker

    def start_one(self: ManualActors, *args: Any) -> Any:
        if started:
            raise OSError("no more processes")
        started.append(start(self, *args))
        return started[0]

    monkeypatch.setattr(ManualActors, "start_worker", start_one)
    with pytest.raises(OSError, match="no more processes"):
        ManualActors(release=lambda: released.append(True))
    assert started[0].stopped == 1 and released


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            {"num_actors": 0},
            ValueError,
            "num_actors must be an int of at least 1. Got",
        ),
        (
            {"frames_per_batch": 1.5},
            ValueError,
            "frames_per_batch must be an int .* Got",
        ),
        ({"timeout": 0}, ValueError, "timeout must be a number of seconds above 0. Got 0"),
        ({"max_restarts": -1}, ValueError, "max_restarts must be an int of at least 0. Got"),
        ({"num_threads": True}, ValueError, "num_threads must be an int of at least 1. Got"),
        ({"first_trajectory": -1}, ValueError, "first_trajectory must be an int of at least 0"),
        ({"make_env": 3}, TypeError, "make_env must be a function .* Got int"),
        ({"policy": None}, TypeError, "policy must be a TensorDict module, or .* Got NoneType"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_argument_is_named(wrong: dict, error: type[Exception], message: str) -> None:
    right: dict[str, Any] = {
        "make_env": lambda: None,
        "policy": nn.Identity(),
        "num_actors": 1,
        "frames_per_batch": 8,
    }
    with pytest.raises(error, match=message):
        ProcessActors(**{**right, **wrong})
    if wrong.keys() <= {"frames_per_batch", "first_trajectory", "make_env", "policy"}:
        del right["num_actors"]
        with pytest.raises(error, match=message):
            LocalActors(**{**right, **wrong})
