from __future__ import annotations

import multiprocessing
import signal
import sys

import pytest

from rnnkeys.collectors import ActorError, ProcessActors
from tests.support.actors import (
    collect_with_two_actors,
    is_running,
    make_policy,
    start_learner,
    wait_until,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")


@pytest.mark.filterwarnings("ignore:Actor . .* is lost:RuntimeWarning")
def test_process_actors_collect_survive_a_kill_and_leave_no_process() -> None:
    processes = collect_with_two_actors(ProcessActors)
    assert not any(map(is_running, processes))
    assert not multiprocessing.active_children()


def test_process_actors_raise_the_exception_of_an_environment() -> None:
    def make_env() -> None:
        raise ZeroDivisionError("no such environment")

    with ProcessActors(make_env, make_policy(), num_actors=1, frames_per_batch=8) as actors:  # pyright: ignore[reportArgumentType]
        with pytest.raises(ActorError, match="ZeroDivisionError: no such environment"):
            actors.next()


@pytest.mark.parametrize(
    ("ending", "number"),
    [
        ("time.sleep(600)", signal.SIGKILL),
        ("time.sleep(600)", signal.SIGINT),
        ("raise ValueError", None),
    ],
    ids=["killed", "interrupted", "raised"],
)
def test_process_actors_end_with_the_learner(ending: str, number: signal.Signals | None) -> None:
    learner, processes = start_learner("ProcessActors", ending)
    if number is not None:
        learner.send_signal(number)
    learner.communicate(timeout=60)
    wait_until(lambda: not any(map(is_running, processes)))
