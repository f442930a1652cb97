"""Actors on a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from tensordict import TensorDictBase

from ..checks import as_int
from .ray_cluster import connect, import_ray
from .remote import RemoteActors
from .worker import Answer, MakeEnv, Policy, Worker

STORE_BYTES = 128 * 2**20


class RayActors(RemoteActors):
    """Collect with actors of a Ray cluster while the learner learns.

    As :class:`ProcessActors`, on any number of machines. Needs the ``ray`` extra.

    Without an address, and without the environment variable ``RAY_ADDRESS``, a cluster of one node
    is started on this machine and stopped by :meth:`close`. Its servers listen on the loopback
    interface only, and its temporary folder is removed, at the latest when the next one is started.
    A connection that the program has made itself (``ray.init``) is used and left as it is.

    Args:
        make_env: makes the environments of one actor, with all transforms that the policy needs.
        policy: a TensorDict module, or a function that makes it from the actor's number.
        num_actors: number of Ray actors.
        address: of a running cluster, such as ``"10.0.0.1:6379"``.
        actor_options: options of ``ray.remote`` for each actor, ``{"num_cpus": 1}`` by default.
        runtime_env: Ray's description of what the nodes need; the package itself is added to it.
        object_store_memory: bytes for batches and weights in a cluster that is started here.
        **arguments: ``frames_per_batch``, ``seed``, ``num_threads``, ``timeout``, ``max_restarts``
            and ``first_trajectory``, as for :class:`ProcessActors`. An actor that Ray finds no
            place for gives no answer until ``timeout``.

    Raises:
        ModuleNotFoundError: if Ray is not installed.
        ConnectionError: if the cluster cannot be joined.
        TypeError: if ``make_env`` or ``policy`` is of a wrong type.
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        make_env: MakeEnv,
        policy: Policy,
        *,
        num_actors: int,
        address: str | None = None,
        actor_options: Mapping[str, Any] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        object_store_memory: int = STORE_BYTES,
        **arguments: Any,
    ) -> None:
        self._ray = import_ray()
        num_actors = as_int("num_actors", num_actors)
        options = {"num_cpus": 1, "max_restarts": 0, **(actor_options or {})}
        self._worker_class: Any = self._ray.remote(**options)(Worker)
        num_cpus = num_actors * options["num_cpus"]
        disconnect = connect(address, num_cpus, object_store_memory, runtime_env or {})
        super().__init__(make_env, policy, num_actors=num_actors, release=disconnect, **arguments)

    def start_worker(self, plan: bytes, actor: int, seed: int) -> _RayWorker:
        """Start a Ray actor."""
        return _RayWorker(self._ray, self._worker_class.remote(plan, actor, seed))

    def share_weights(self, weights: TensorDictBase) -> Any:
        """Put weights in Ray's object store once for all actors."""
        return self._ray.put(weights)


class _RayWorker:
    """A worker that Ray places on its cluster."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self._ray, self._handle = ray, handle

    def collect(self, weights: Any) -> Future[Answer]:
        try:
            return self._handle.collect.remote(weights).future()
        except self._ray.exceptions.RayError as error:  # the cluster is gone
            lost: Future[Answer] = Future()
            lost.set_exception(error)
            return lost

    def stop(self) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._handle)
