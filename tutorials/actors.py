"""Collect experience with several actors: processes of this machine, or a Ray cluster.

    with make_collector("ray", 2, make_env, make_policy, frames_per_batch=256) as collector:
        windows = ActorWindows(length=64, residual="overlap", period=32)
        while learning:
            batch = collector.next()                    # [num_envs, T], all of one actor
            replay.extend(batch)                        # a buffer with transform=windows
            ...                                         # gradient steps
            collector.update_policy_weights_(policy)    # for the batches to come

Each actor holds environments, a copy of the policy and a collector of TorchRL. All collect while
the learner learns, and the batch that was ready first comes first, tagged with the actor that
collected it: an actor's batches come in order, and go on with its episodes.

An actor that dies is replaced by one with new episodes. What the learner holds is not touched.
docs/actors.md tells the rest.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from actor_workers import Actor, Answer, MakeEnv, MakePolicy, Plan, ProcessActor, RayActor
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.envs import Transform

import rnnkeys
from rnnkeys.transforms import Windows

KINDS = ("none", "process", "ray")
ACTOR_KEY = ("collector", "actor")
"""Which actor has collected a step: an integer, ``[B, T]``."""

STORE_BYTES = 128 * 2**20
"""Memory for batches and weights under way in a Ray cluster on this machine."""


class ActorsLost(RuntimeError):
    """No actor is left to collect. The learner is as it was: save it, and tell the reader."""


class AnyCollector(Protocol):
    """What ``make_collector`` returns."""

    def next(self) -> TensorDictBase: ...

    def update_policy_weights_(self, policy: nn.Module) -> None: ...

    def shutdown(self) -> None: ...

    def __enter__(self) -> AnyCollector: ...

    def __exit__(self, *error: object) -> None: ...


def make_collector(
    kind: str,
    count: int,
    make_env: MakeEnv,
    make_policy: MakePolicy,
    *,
    frames_per_batch: int,
    seed: int = 0,
    patience: float = 600.0,
    ray_address: str | None = None,
) -> AnyCollector:
    """Make a collector of batches ``[num_envs, T]``, each of one actor.

    Args:
        kind: ``"none"``: in this process, with the learner's own weights; ``"process"``: ``count``
            processes of this machine; ``"ray"``: ``count`` actors of a Ray cluster.
        count: how many actors.
        make_env: makes an actor's environments, with all transforms that the policy needs.
        make_policy: makes the policy of actor 0, 1, ...: the learner's with its exploration.
        frames_per_batch: of one actor, all its environments together.
        seed: from which each actor's own seed is drawn.
        patience: seconds after which an actor that has not answered counts as dead. Importing torch
            on a loaded machine takes many.
        ray_address: of a running cluster; by default that of ``RAY_ADDRESS``, else a cluster is
            started on this machine and stopped with the collector.

    Raises:
        ValueError: if there is no such kind, or no actor.
        ModuleNotFoundError: if Ray is asked for and not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"kind of actors must be one of {', '.join(KINDS)}. Got {kind!r}.")
    if count < 1:
        raise ValueError(f"count of actors must be at least 1. Got {count}.")
    plans = [
        Plan(actor, make_env, make_policy, frames_per_batch, draw_seed(seed, actor))
        for actor in range(1 if kind == "none" else count)
    ]
    if kind == "none":
        return LocalCollector(plans[0])
    if kind == "process":
        return ActorCollector(plans, ProcessActor, seed=seed, patience=patience)
    disconnect = connect_to_ray(count, ray_address)
    return ActorCollector(plans, RayActor, seed=seed, patience=patience, finish=disconnect)


def draw_seed(seed: int, actor: int, life: int = 0) -> int:
    """Return a seed that no other actor has, nor the same actor before it was replaced."""
    drawn = np.random.SeedSequence([seed, actor, life]).generate_state(1)[0]
    return 2**30 + int(drawn) % 2**30  # larger than any that evaluations use


class LocalCollector:
    """Collects in this process, when it is asked to, with the learner's own weights."""

    def __init__(self, plan: Plan) -> None:
        rng = torch.get_rng_state()
        self.collector = plan.make_collector()
        torch.set_rng_state(rng)

    def next(self) -> TensorDictBase:
        batch: Any = self.collector.next()
        return _tag(batch.reshape(-1, batch.shape[-1]), 0)

    def update_policy_weights_(self, policy: nn.Module) -> None:
        """Do nothing: the weights are the learner's."""

    def shutdown(self) -> None:
        self.collector.shutdown()

    def __enter__(self) -> LocalCollector:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()


class ActorCollector:
    """Collects with actors that outlive each other.

    An actor is asked for its next batch, with the latest weights, when its last one is handed over.

    Args:
        plans: one for each actor.
        start: starts an actor; has ``share`` that makes of weights what actors are given.
        seed: from which replaced actors' seeds are drawn.
        patience: seconds after which an actor that has not answered counts as dead.
        attempts: an actor that dies so many times without a batch in between is given up.
        finish: is called after the last actor was stopped.
    """

    def __init__(
        self,
        plans: list[Plan],
        start: Any,
        *,
        seed: int,
        patience: float,
        attempts: int = 3,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self.plans, self.start, self.seed = plans, start, seed
        self.patience, self.attempts, self.finish = patience, attempts, finish
        self.actors: dict[int, Actor] = {}
        self.lives = [0] * len(plans)
        self.failures = [0] * len(plans)
        self.weights: Any = None
        self.version = 0
        self.versions = [0] * len(plans)
        self.where = ["not yet heard of"] * len(plans)
        self._last_words = "The actors were shut down: make another collector."
        # Who was asked and when, in the order of asking: who waits longest is served first.
        self.asked: dict[Future[Answer], tuple[int, float]] = {}
        try:
            for actor in range(len(plans)):
                self._start(actor)
        except BaseException:
            self.shutdown()
            raise

    def next(self) -> TensorDictBase:
        """Return the next batch ``[num_envs, T]`` of any actor, tagged at ``ACTOR_KEY``.

        Raises:
            ActorsLost: if every actor has died, three times without a batch in between.
            RuntimeError: if an actor reports an exception: it would be the same for all.
        """
        while True:
            future = self._wait()
            actor, _ = self.asked.pop(future)
            error = future.exception()
            if error is not None:
                self._replace(actor, error)
                continue
            answer = future.result()
            self.where[actor] = answer.where
            if answer.batch is None:
                raise RuntimeError(f"Actor {actor} ({answer.where}) failed:\n{answer.failure}")
            self.failures[actor] = 0
            self._ask(actor)
            return _tag(answer.batch, actor)

    def update_policy_weights_(self, policy: nn.Module) -> None:
        """Take a copy of all weights and buffers; each actor gets them with its next batch.

        Args:
            policy: of the same modules as those that ``make_policy`` makes.
        """
        weights: Any = TensorDict.from_module(policy)
        weights = weights.data.clone().cpu()
        self.weights = self.start.share(weights)
        self.version += 1

    def shutdown(self) -> None:
        """Stop all actors, whatever they are doing; harmless when called again."""
        self.asked.clear()
        for actor in list(self.actors):
            self.actors.pop(actor).stop()
        finish, self.finish = self.finish, lambda: None
        finish()

    def __enter__(self) -> ActorCollector:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    def _start(self, actor: int) -> None:
        seed = draw_seed(self.seed, actor, self.lives[actor])
        self.actors[actor] = self.start(replace(self.plans[actor], seed=seed))
        self.lives[actor] += 1
        self.versions[actor] = 0
        self._ask(actor)

    def _ask(self, actor: int) -> None:
        weights = self.weights if self.versions[actor] < self.version else None
        self.versions[actor] = self.version
        self.asked[self.actors[actor].collect(weights)] = actor, time.monotonic()

    def _wait(self) -> Future[Answer]:
        """Return the answer that is ready, or was asked for, first."""
        while True:
            self._replace_overdue()
            if not self.asked:
                raise ActorsLost(self._last_words)
            latest = min(since for _, since in self.asked.values()) + self.patience
            left = max(latest - time.monotonic(), 0)
            done, _ = wait(self.asked, timeout=left, return_when=FIRST_COMPLETED)
            for future in self.asked:
                if future in done:
                    return future

    def _replace_overdue(self) -> None:
        now = time.monotonic()
        for future, (actor, since) in list(self.asked.items()):
            if now - since >= self.patience and not future.done():
                del self.asked[future]
                self._replace(actor, TimeoutError(f"no answer for {self.patience:.0f} seconds"))

    def _replace(self, actor: int, error: BaseException) -> None:
        """Start an actor again that was lost, or give it up."""
        self.actors.pop(actor).stop()
        self.failures[actor] += 1
        reason = str(error).partition("\n")[0].rstrip(".")  # Ray has much to say
        lost = f"Actor {actor} ({self.where[actor]}) is lost: {reason}"
        if self.failures[actor] < self.attempts:
            message = f"{lost}. Another takes its place, with new episodes; the run goes on."
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            self._start(actor)
            return
        lost += f", {self.failures[actor]} times without a batch in between"
        self._last_words = (
            f"{lost}, and no other is left. Nothing learned is lost: go on with --resume, with "
            "fewer actors if memory ran out, or with --actors none to see an error in its place."
        )
        if self.actors:
            message = f"{lost}. The run goes on with the other {len(self.actors)}."
            warnings.warn(message, RuntimeWarning, stacklevel=3)


def _tag(batch: TensorDictBase, actor: int) -> TensorDictBase:
    return batch.set(ACTOR_KEY, torch.tensor(actor).expand(batch.shape))


class ActorWindows(Transform):
    """``Windows`` of a replay buffer that several actors fill.

    Each actor has its own streams: what one collected is never joined to what another did, in
    whatever order batches come. Where an actor was replaced, its first steps start new episodes.

    Args:
        *args: of ``rnnkeys.transforms.Windows``.
        **kwargs: of ``rnnkeys.transforms.Windows``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self._make = partial(Windows, *args, **kwargs)
        self._layout = self._make()
        self._of_actor: dict[int, Windows] = {}

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Lay a sample of stored windows out as ``[N, L]``."""
        return self._layout.to_sequences(tensordict)

    def _inv_call(self, tensordict: TensorDictBase) -> Any:
        stored = self.cut(tensordict)
        # A replay buffer takes None for nothing to store.
        return stored if stored.shape[0] else None

    def cut(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Cut a batch ``[B, T]`` of one actor into windows ``[N]`` as they are stored."""
        actor = _read_actor(tensordict)
        if actor not in self._of_actor:
            self._of_actor[actor] = self._make()
        return self._of_actor[actor].cut(tensordict)

    @property
    def waiting(self) -> int:
        """How many steps wait for the batches that go on with them."""
        return sum(windows.waiting for windows in self._of_actor.values())


def _read_actor(batch: TensorDictBase) -> int:
    tags = batch.get(ACTOR_KEY, None)
    if tags is None:
        raise KeyError(
            f"There is no {ACTOR_KEY!r}, which tells whose streams go on with this batch: keep it "
            "when you select entries of what collector.next() returns."
        )
    actors = tags.unique().tolist()
    if len(actors) != 1:
        raise ValueError(f"A batch must be of one actor. Got steps of the actors {actors}.")
    return actors[0]


def connect_to_ray(count: int, address: str | None) -> Callable[[], None]:
    """Join a Ray cluster, or start one on this machine with a core for each actor.

    The tutorials and rnnkeys travel to the cluster's nodes; the rest must be installed there.

    Returns:
        What leaves the cluster, and stops it if it was started here.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Actors on Ray need Ray, which is not installed: pip install 'rnnkeys[ray]', or take "
            "--actors process."
        ) from error
    if ray.is_initialized():  # the reader's own connection stays as it is
        return lambda: None
    options: dict[str, Any] = {
        "runtime_env": {
            "working_dir": str(Path(__file__).parent),
            "excludes": ["runs"],
            "py_modules": [str(Path(rnnkeys.__file__).parent)],
        },
        "log_to_driver": False,
        "logging_level": logging.WARNING,
    }
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = "local"
        options |= {
            "num_cpus": count,
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
        }
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}. RAY_ADDRESS or ray_address must be that of a running cluster, such as "
            "10.0.0.1:6379; without one, a cluster is started here. Clusters that ask for a token, "
            "as Ray's do by default, need RAY_AUTH_MODE=token and the token on this machine too."
        ) from error
    return ray.shutdown
