"""Requests to actors in other processes, and the replacement of those that are lost."""

from __future__ import annotations

import time
import weakref
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

from tensordict import TensorDictBase
from torch import nn

from ..checks import as_int, warn_caller
from .base import Actors, check_plan, draw_seed
from .worker import Answer, MakeEnv, Plan, Policy, dumps, read_weights


class ActorError(RuntimeError):
    """An actor raised an exception; the message holds its traceback."""


class ActorsLostError(RuntimeError):
    """No actor is left. What the learner holds is intact: save it."""


class RemoteWorker(Protocol):
    """A worker in another process, seen from the learner."""

    def collect(self, weights: Any) -> Future[Answer]:
        """Request a batch; the future raises if the process is lost."""
        ...

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        ...


class _Request(NamedTuple):
    actor: int
    version: int
    since: float


class RemoteActors(Actors):
    """Collect with several workers, and replace those that are lost.

    All workers collect while the learner learns. The batch that is ready first is returned first;
    where several are ready, the one that was requested first. A worker is asked for its next batch,
    with the latest weights, when its last one is returned.

    Subclasses implement :meth:`start_worker` and :meth:`share_weights`.
    """

    def __init__(
        self,
        make_env: MakeEnv,
        policy: Policy,
        *,
        num_actors: int,
        frames_per_batch: int,
        seed: int = 0,
        num_threads: int = 1,
        timeout: float = 600.0,
        max_restarts: int = 2,
        first_trajectory: int = 0,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the workers; arguments are those of :class:`ProcessActors`."""
        self._workers: dict[int, RemoteWorker] = {}
        self._close = weakref.finalize(self, _stop_all, self._workers, release)
        self._requests: dict[Future[Answer], _Request] = {}  # in the order of the requests
        try:
            super().__init__(first_trajectory)
            plan = Plan(make_env, policy, frames_per_batch, num_threads)
            check_plan(plan)
            if not timeout > 0:
                raise ValueError(f"timeout must be a number of seconds above 0. Got {timeout!r}.")
            self.num_actors = as_int("num_actors", num_actors)
            self._max_restarts = as_int("max_restarts", max_restarts, minimum=0)
            self._timeout = timeout
            self._seed = seed
            self._plan = dumps(plan)  # once, so that restarted actors have the same first weights
            self._restarts = [0] * num_actors
            self._failures = [0] * num_actors
            self._versions = [0] * num_actors
            self._locations = ["not started"] * num_actors
            self._weights: Any = None
            self._last_words = ""
            for actor in range(num_actors):
                self._start(actor)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def start_worker(self, plan: bytes, actor: int, seed: int) -> RemoteWorker:
        """Start a :class:`~rnnkeys.collectors.worker.Worker` with these arguments."""

    @abstractmethod
    def share_weights(self, weights: TensorDictBase) -> Any:
        """Prepare weights once for all workers, as the argument of :meth:`RemoteWorker.collect`."""

    @property
    def locations(self) -> list[str]:
        """Process and machine of each actor, as of its last batch."""
        return list(self._locations)

    def next(self) -> TensorDictBase:
        """Return the next batch ``[num_envs, T]`` of any actor.

        Raises:
            ActorsLostError: if every actor was lost, and its restarts, too.
            ActorError: if an actor raised an exception: a restart would raise it again.
            RuntimeError: after :meth:`close`.

        Warns:
            RuntimeWarning: for each actor that was lost.
        """
        if not self._close.alive:
            raise RuntimeError("The actors were closed: make new ones to collect further.")
        while True:
            future = self._wait()
            request = self._requests.pop(future)
            error = future.exception()
            if error is not None:
                self._replace(request.actor, error)
                continue
            answer = future.result()
            self._locations[request.actor] = answer.location
            if answer.batch is None:
                raise ActorError(f"Actor {request.actor} ({answer.location}):\n{answer.error}")
            self._failures[request.actor] = 0
            self._ask(request.actor)
            return self._label(answer.batch, request.actor, request.version)

    def update_policy(self, policy: nn.Module | TensorDictBase) -> None:
        """Copy weights and buffers to the CPU; each actor gets them with its next request."""
        self._weights = self.share_weights(read_weights(policy).clone().cpu())
        self._policy_version += 1

    def close(self) -> None:
        """Stop all actors; a second call has no effect."""
        self._requests.clear()
        self._close()

    def _start(self, actor: int) -> None:
        seed = draw_seed(self._seed, actor, self._restarts[actor])
        self._workers[actor] = self.start_worker(self._plan, actor, seed)
        self._versions[actor] = 0
        self._ask(actor)

    def _ask(self, actor: int) -> None:
        version = self._policy_version
        weights = self._weights if self._versions[actor] < version else None
        self._versions[actor] = version
        future = self._workers[actor].collect(weights)
        self._requests[future] = _Request(actor, version, time.monotonic())

    def _wait(self) -> Future[Answer]:
        """Return the answer that is ready, or the one among several that was requested first."""
        while True:
            self._replace_overdue()
            if not self._requests:
                raise ActorsLostError(self._last_words)
            first = min(request.since for request in self._requests.values())
            left = max(first + self._timeout - time.monotonic(), 0)
            done, _ = wait(self._requests, timeout=left, return_when=FIRST_COMPLETED)
            for future in self._requests:
                if future in done:
                    return future

    def _replace_overdue(self) -> None:
        now = time.monotonic()
        for future, request in list(self._requests.items()):
            if now - request.since >= self._timeout and not future.done():
                del self._requests[future]
                error = TimeoutError(f"no answer for {self._timeout:.0f} seconds")
                self._replace(request.actor, error)

    def _replace(self, actor: int, error: BaseException) -> None:
        """Restart a lost actor, or continue without it."""
        self._workers.pop(actor).stop()
        self._trajectories.restart(actor)
        self._failures[actor] += 1
        reason = str(error).partition("\n")[0].rstrip(".")  # Ray's messages have many lines
        lost = f"Actor {actor} ({self._locations[actor]}) is lost: {reason}"
        if self._failures[actor] <= self._max_restarts:
            text = f"{lost}. It is restarted with new episodes and the latest weights."
            warn_caller(text, RuntimeWarning)
            self._restarts[actor] += 1
            self._start(actor)
            return
        lost += f", {self._failures[actor]} times in a row without a batch"
        self._last_words = (
            f"{lost}, and no other is left. What the learner holds is intact: save it. Use fewer "
            "actors if memory ran out; LocalActors shows errors in this process."
        )
        if self._workers:
            text = f"{lost}. Collection continues with the other {len(self._workers)}."
            warn_caller(text, RuntimeWarning)


def _stop_all(workers: dict[int, RemoteWorker], release: Callable[[], None]) -> None:
    """Stop all workers, then release what they share, whatever one of them raises."""
    with ExitStack() as stack:
        stack.callback(release)
        for worker in workers.values():
            stack.callback(worker.stop)
    workers.clear()
