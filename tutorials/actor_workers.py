"""What an actor does, and where: in a process of this machine, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any, NamedTuple, Protocol

import cloudpickle
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

MakeEnv = Callable[[], EnvBase]
MakePolicy = Callable[[int], TensorDictModuleBase]


class Answer(NamedTuple):
    """What an actor sends back: a batch ``[num_envs, T]``, or else how it failed."""

    batch: TensorDictBase | None
    where: str
    failure: str = ""


@dataclass
class Plan:
    """What an actor is to do. It travels, with all it refers to, to where the actor lives."""

    actor: int
    make_env: MakeEnv
    make_policy: MakePolicy
    frames_per_batch: int
    seed: int

    def make_collector(self) -> Collector:
        torch.manual_seed(self.seed)
        env = self.make_env()
        env.set_seed(self.seed)
        return Collector(
            env,
            self.make_policy(self.actor),
            frames_per_batch=self.frames_per_batch,
            total_frames=-1,
            storing_device="cpu",
        )


class Worker:
    """An actor: its environments and its copy of the policy, in a collector of TorchRL.

    All is made with the first batch, so that whatever goes wrong is told in place of a batch. An
    exception here is a mistake in the program; that an actor *dies* is noticed where its answers
    are waited for.
    """

    def __init__(self, plan: bytes) -> None:
        self.plan = plan
        self.where = f"process {os.getpid()} on {socket.gethostname()}"
        self.collector: Any = None

    def collect(self, weights: TensorDictBase | None) -> Answer:
        """Take over ``weights``, if there are any, and collect a batch."""
        try:
            if self.collector is None:
                torch.set_num_threads(1)  # there are as many actors as cores, or more
                self.collector = pickle.loads(self.plan).make_collector()
            if weights is not None:
                self.collector.update_policy_weights_(weights)
            batch = self.collector.next()
        except Exception:
            return Answer(None, self.where, traceback.format_exc())
        return Answer(batch.reshape(-1, batch.shape[-1]), self.where)


class Actor(Protocol):
    """A worker seen from the learner. A future that raises means that the worker is gone."""

    def collect(self, weights: Any) -> Future[Answer]: ...

    def stop(self) -> None: ...


class ProcessActor:
    """A worker in a process of its own.

    A thread talks to it and does all the waiting: the learner never blocks on a pipe. Batches cross
    as bytes: tensors in shared memory would fill a small /dev/shm and leave pieces of a worker that
    was killed.
    """

    def __init__(self, plan: Plan) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _no_interrupts():
            self.process.start()
        theirs.close()  # else the end of the process would not be the end of the pipe
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.joining = Lock()  # only one thread may learn how a process ended
        self.thread.submit(self.connection.send_bytes, cloudpickle.dumps(plan))

    @staticmethod
    def share(weights: TensorDictBase) -> bytes:
        """Make of weights what is given to ``collect`` of any number of actors."""
        return pickle.dumps(weights)

    def collect(self, weights: bytes | None) -> Future[Answer]:
        return self.thread.submit(self._call, weights or pickle.dumps(None))

    def _call(self, weights: bytes) -> Answer:
        try:
            self.connection.send_bytes(weights)
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            with self.joining:
                self.process.join(timeout=10)
            raise ChildProcessError(
                f"its process has ended with exit code {self.process.exitcode}"
            ) from error

    def stop(self) -> None:
        self.process.kill()
        with self.joining:
            self.process.join()
        self.thread.shutdown()
        self.connection.close()


def _serve(connection: Connection) -> None:
    """Answer until the learner is gone."""
    try:
        worker = Worker(connection.recv_bytes())
        while True:
            weights = pickle.loads(connection.recv_bytes())
            connection.send_bytes(pickle.dumps(worker.collect(weights)))
    except (EOFError, OSError):
        return


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Let a process that is started here never see Ctrl-C: its end is for the learner to decide."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class RayActor:
    """A worker that Ray places somewhere on its cluster, with one CPU."""

    def __init__(self, plan: Plan) -> None:
        import ray

        remote: Any = ray.remote(num_cpus=1, max_restarts=0)(Worker)
        self.handle = remote.remote(cloudpickle.dumps(plan))

    @staticmethod
    def share(weights: TensorDictBase) -> Any:
        """Put weights in Ray's store, once for all actors."""
        import ray

        return ray.put(weights)

    def collect(self, weights: Any) -> Future[Answer]:
        return self.handle.collect.remote(weights).future()

    def stop(self) -> None:
        import ray

        ray.kill(self.handle)
