"""Actors in processes of this machine."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing.connection import Connection
from threading import Lock, Thread

from tensordict import TensorDictBase

from .remote import RemoteActors
from .worker import Answer, Worker


class ProcessActors(RemoteActors):
    """Collect with processes of this machine while the learner learns.

    Each process holds environments, a copy of the policy and a TorchRL collector::

        with ProcessActors(make_env, policy, num_actors=2, frames_per_batch=256) as actors:
            for batch in actors:                 # [num_envs, T], all of one actor
                buffer.extend(batch)
                ...                              # gradient steps
                actors.update_policy(policy)     # for the batches that are requested from now on

    A process that ends is replaced by one with new episodes; see ``docs/collectors.md``. No process
    is left after :meth:`close`, after the end of the program, or after it was killed.

    The processes import the main module, so a script needs ``if __name__ == "__main__":`` around
    what it runs.

    Args:
        make_env: makes the environments of one actor, with all transforms that the policy needs.
        policy: a TensorDict module, or a function that makes it from the actor's number 0, 1, ...,
            such as the learner's network followed by exploration of its own. It may be on any
            device; actors get a copy on the CPU.
        num_actors: number of processes.
        frames_per_batch: steps in a batch of one actor, of all its environments together.
        seed: from which the seed of each actor is drawn.
        num_threads: CPU threads of torch in each process.
        timeout: seconds after which an actor without an answer counts as lost. To import torch on a
            busy machine takes many.
        max_restarts: how many times in a row an actor is restarted before it has given a batch.
        first_trajectory: number of the first trajectory, :attr:`num_trajectories` of an earlier run
            that is resumed.
        release: called once, after the last process has ended.

    Raises:
        TypeError: if ``make_env`` or ``policy`` is of a wrong type.
        ValueError: if a number is out of range.
    """

    def start_worker(self, plan: bytes, actor: int, seed: int) -> _ProcessWorker:
        """Start a process."""
        return _ProcessWorker(plan, actor, seed)

    def share_weights(self, weights: TensorDictBase) -> bytes:
        """Pickle weights once for all processes."""
        return pickle.dumps(weights)


class _ProcessWorker:
    """A worker in a process of its own.

    A thread waits for each answer, so that the learner never blocks on a pipe. Batches are sent as
    bytes: tensors in shared memory would fill a small /dev/shm, and stay there after a kill.
    """

    def __init__(self, plan: bytes, actor: int, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, actor, seed), daemon=True)
        with _sigint_blocked():
            self._process.start()
        theirs.close()  # else the end of the process would not close the pipe
        self._plan = plan
        self._thread = Thread()
        self._joining = Lock()  # only one thread may read how a process ended

    def collect(self, weights: bytes | None) -> Future[Answer]:
        future: Future[Answer] = Future()
        message = self._plan, weights or pickle.dumps(None)
        self._plan = b""  # sent with the first request only
        # A daemon: the end of the program does not wait for a batch.
        self._thread = Thread(target=self._call, args=(future, *message), daemon=True)
        self._thread.start()
        return future

    def _call(self, future: Future[Answer], plan: bytes, weights: bytes) -> None:
        try:
            if plan:
                self._connection.send_bytes(plan)
            self._connection.send_bytes(weights)
            future.set_result(pickle.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):
            with self._joining:
                self._process.join(timeout=10)
            text = f"its process has ended with exit code {self._process.exitcode}"
            future.set_exception(ChildProcessError(text))

    def stop(self) -> None:
        self._process.kill()
        with self._joining:
            self._process.join()
        if self._thread.ident is not None:
            self._thread.join()
        self._connection.close()


def _serve(connection: Connection, actor: int, seed: int) -> None:
    """Answer requests until the learner is gone."""
    try:
        worker = Worker(connection.recv_bytes(), actor, seed)
        while True:
            weights = pickle.loads(connection.recv_bytes())
            connection.send_bytes(pickle.dumps(worker.collect(weights)))
    except (EOFError, OSError):
        return


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Start a process that never receives Ctrl-C, so that the learner decides when it ends."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
