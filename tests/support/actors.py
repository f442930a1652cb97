"""Actors whose answers a test gives, and what tests of real actors have in common."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.data import OneHot

from rnnkeys import drqn_policy
from rnnkeys.collectors import ACTOR_KEY, POLICY_VERSION_KEY, EpsilonGreedy, ProcessActors
from rnnkeys.collectors.remote import RemoteActors
from rnnkeys.collectors.worker import Answer, MakeEnv
from rnnkeys.keys import TRAJECTORY_KEY

ROOT = Path(__file__).parents[2]
PATIENCE = 600.0
"""Seconds that a busy machine may take for an answer."""


class ManualWorker:
    """A worker whose answers the test gives."""

    def __init__(self, actor: int, seed: int) -> None:
        self.actor, self.seed = actor, seed
        self.requests: list[Future[Answer]] = []
        self.weights: list[Any] = []
        self.stopped = 0

    def collect(self, weights: Any) -> Future[Answer]:
        self.requests.append(Future())
        self.weights.append(weights)
        return self.requests[-1]

    def stop(self) -> None:
        self.stopped += 1

    def answer(self, value: float = 0.0, trajectories: Any = ((0, 0, 0), (1, 1, 1))) -> None:
        batch = TensorDict({"value": torch.full((2, 3), value)}, [2, 3])
        batch[TRAJECTORY_KEY] = torch.tensor(trajectories)
        self.requests[-1].set_result(Answer(batch, f"place {self.actor}"))

    def fail(self, error: str) -> None:
        self.requests[-1].set_result(Answer(None, f"place {self.actor}", error))

    def die(self) -> None:
        self.requests[-1].set_exception(ChildProcessError("killed"))


class ManualActors(RemoteActors):
    """Two actors; ``started`` lists all workers, ``mortal`` the actors that die when restarted."""

    def __init__(self, **options: Any) -> None:
        self.started: list[ManualWorker] = []
        self.mortal: set[int] = set()
        policy: Any = nn.Identity()
        defaults = {"num_actors": 2, "frames_per_batch": 6, "timeout": PATIENCE}
        super().__init__(_no_env, policy, **{**defaults, **options})

    def start_worker(self, plan: bytes, actor: int, seed: int) -> ManualWorker:
        worker = ManualWorker(actor, seed)
        self.started.append(worker)
        if actor in self.mortal:
            collect = worker.collect

            def collect_and_die(weights: Any) -> Future[Answer]:
                future = collect(weights)
                worker.die()
                return future

            worker.collect = collect_and_die
        return worker

    def share_weights(self, weights: TensorDictBase) -> TensorDictBase:
        return weights


def _no_env() -> Any:
    raise NotImplementedError


def actor_of(batch: TensorDictBase) -> int:
    return _only(batch[ACTOR_KEY], batch)


def version_of(batch: TensorDictBase) -> int:
    return _only(batch[POLICY_VERSION_KEY], batch)


def _only(values: torch.Tensor, batch: TensorDictBase) -> int:
    assert values.shape == batch.shape and values.dtype == torch.int64
    [value] = values.unique().tolist()
    return value


def next_of(actors: Any, actor: int) -> TensorDictBase:
    """Return the next batch of one actor."""
    limit = time.monotonic() + PATIENCE
    while actor_of(batch := actors.next()) != actor:
        assert time.monotonic() < limit, f"no batch of actor {actor}"
    return batch


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "the condition did not become true"
        time.sleep(0.05)


def is_running(process: int) -> bool:
    """Return whether a process runs; one that waits to be reaped by its parent does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def process_of(actors: RemoteActors, actor: int) -> int:
    return int(actors.locations[actor].split()[1])


def make_policy() -> TensorDictSequential:
    return drqn_policy(OneHot(2), (4,), hidden_size=4)


def make_parts(
    policy: TensorDictSequential,
) -> tuple[MakeEnv, Callable[[int], TensorDictSequential]]:
    """Return functions that make two environments, and the policy of an actor.

    Functions inside of a function are pickled whole: Ray's processes cannot import the tests.
    """

    def make_env() -> Any:
        import gymnasium as gym
        from gymnasium.vector import AutoresetMode
        from torchrl.envs import GymWrapper, TransformedEnv

        from rnnkeys import get_env_transforms_from_module

        options = {"autoreset_mode": AutoresetMode.DISABLED}
        envs = gym.make_vec("CartPole-v1", 2, vectorization_mode="sync", vector_kwargs=options)
        return TransformedEnv(GymWrapper(envs), get_env_transforms_from_module(policy))

    def make_actor_policy(actor: int) -> TensorDictSequential:
        both: Any = (policy, EpsilonGreedy(OneHot(2), 0.5))
        return TensorDictSequential(*both)

    return make_env, make_actor_policy


def collect_with_two_actors(make: Callable[..., RemoteActors]) -> list[int]:
    """Check the batches of two real actors, one of which is killed; return their processes.

    Args:
        make: ``ProcessActors`` or ``RayActors``, with arguments of its own.
    """
    policy = make_policy()
    make_env, make_actor_policy = make_parts(policy)
    options: dict[str, Any] = {"num_actors": 2, "frames_per_batch": 16, "timeout": PATIENCE}
    with make(make_env, make_actor_policy, **options) as actors:
        _check_continuity(actors)
        _check_weights(actors, make_actor_policy(0))
        return _check_restart(actors)


def _check_continuity(actors: RemoteActors) -> None:
    batches: dict[int, list[TensorDictBase]] = {0: [], 1: []}
    while min(map(len, batches.values())) < 3:
        batch = actors.next()
        assert batch.shape == (2, 8) and version_of(batch) == 0
        earlier = batches[actor_of(batch)]
        if earlier:
            assert_continues(earlier[-1], batch)
        earlier.append(batch)
    assert not torch.equal(*(batches[actor][0]["observation"] for actor in (0, 1)))
    numbers = [
        {n for batch in batches[actor] for n in batch[TRAJECTORY_KEY].unique().tolist()}
        for actor in (0, 1)
    ]
    assert not numbers[0] & numbers[1]


def assert_continues(before: TensorDictBase, after: TensorDictBase) -> None:
    """The second batch starts where the first one stopped, inside an episode or not."""
    ended = before["next", "done"][:, -1, 0]
    assert torch.equal(after["is_init"][:, 0, 0], ended)
    for key in ("observation", "recurrent_state_h", "recurrent_state_c"):
        last, first = before["next", key][:, -1], after[key][:, 0]
        assert torch.equal(first[~ended], last[~ended])
    same = after[TRAJECTORY_KEY][:, 0] == before[TRAJECTORY_KEY][:, -1]
    assert torch.equal(same, ~ended)


def _check_weights(actors: RemoteActors, policy: nn.Module) -> None:
    for parameter in policy.parameters():
        nn.init.zeros_(parameter)
    actors.update_policy(policy)
    for actor in (0, 1):
        while version_of(batch := next_of(actors, actor)) == 0:
            assert batch["action_value"].any()
        assert version_of(batch) == 1 and not batch["action_value"].any()


def _check_restart(actors: RemoteActors) -> list[int]:
    processes = [process_of(actors, actor) for actor in (0, 1)]
    assert len({*processes, os.getpid()}) == 3
    if isinstance(actors, ProcessActors):  # a terminal sends Ctrl-C to all processes
        os.kill(processes[1], signal.SIGINT)
    os.kill(processes[0], signal.SIGKILL)
    batch = next_of(actors, 0)
    while process_of(actors, 0) == processes[0]:  # a batch from before the kill
        batch = next_of(actors, 0)
    assert batch["is_init"][:, 0].all()
    assert version_of(batch) == 1 and not batch["action_value"].any()
    for _ in range(3):
        next_of(actors, 1)
    assert process_of(actors, 1) == processes[1]
    return [*processes, process_of(actors, 0)]


def start_learner(kind: str, ending: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a program that collects with one actor; return it and the actor's process.

    Args:
        kind: name of the class of actors.
        ending: what the program does after its first batch.
    """
    learner = subprocess.Popen(
        [sys.executable, "-c", _LEARNER.format(kind=kind, ending=ending)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert learner.stdout is not None and learner.stderr is not None
    line = learner.stdout.readline()
    assert line, learner.stderr.read()
    return learner, [int(line)]


_LEARNER = """
import signal
import time
from rnnkeys.collectors import {kind}
from tests.support.actors import make_parts, make_policy, process_of
if __name__ == "__main__":
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    actors = {kind}(*make_parts(make_policy()), num_actors=1, frames_per_batch=16)
    actors.next()
    print(process_of(actors, 0), flush=True)
    {ending}
"""
