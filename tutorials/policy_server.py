"""Serve a recurrent policy to many clients: one file to run, copy and change.

    python policy_server.py cartpole                  # a folder of save_pretrained
    python policy_server.py cartpole --max-wait 0.005 --idle 300

A client connects by TCP, sends one line of JSON for each step, and reads one line before it sends
the next:

    {"id": "ada", "observation": [0.1, 0.0, 0.2, 0.0], "is_init": true}    ->   {"action": 1}
    {"id": "ada", "leave": true}                                           ->   {"left": true}

``is_init`` starts an episode. The server keeps the recurrent state of each id, runs the policy on
all requests that arrive within ``max_wait`` seconds, and forgets ids that are idle. A request that
cannot be answered gets ``{"error": ...}`` and changes no state. The server listens on the loopback
interface unless --host names another one: it neither encrypts nor asks who a client is.

It needs rnnkeys[tutorials,hub].
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro

from rnnkeys import StatefulPolicy, load_pretrained
from rnnkeys.deploy import PretrainedError, read_arguments

MAX_LINE = 1 << 20  # bytes of a request
MAX_ID = 200  # characters of an id


@dataclass
class Args:
    folder: Annotated[str, tyro.conf.Positional]  # of save_pretrained
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 for all
    port: int = 7070  # 0 takes a free one
    max_wait: float = 0.002  # seconds that a request waits for others
    max_batch: int = 256  # requests in one call of the policy
    idle: float = 60.0  # seconds without a request after which an id is forgotten
    max_ids: int = 10_000  # ids whose states are kept
    threads: int = 1  # CPU threads of torch


class RequestError(ValueError):
    """A request that cannot be answered."""


class Request(NamedTuple):
    id: str
    observation: np.ndarray
    is_init: bool
    answer: asyncio.Future[Any]


class PolicyServer:
    """Forms batches of the requests of many clients, and keeps a state for each id.

    Everything runs in one event loop: between two ``await`` nothing else touches the states.
    """

    def __init__(self, args: Args, player: StatefulPolicy, shape: Sequence[int]) -> None:
        self.args = args
        self.player = player
        self.shape = tuple(shape)
        self.waiting: deque[Request] = deque()
        self.arrived = asyncio.Event()
        self.last_seen: dict[str, float] = {}  # seconds, for each id that has a state

    async def run(self, started: asyncio.Future[int] | None = None) -> None:
        """Serve until the task is cancelled."""
        args = self.args
        server = await asyncio.start_server(self.serve, args.host, args.port, limit=MAX_LINE)
        port = server.sockets[0].getsockname()[1]
        print(f"Serving {args.folder} on {args.host}:{port}", flush=True)
        if started is not None:
            started.set_result(port)
        try:
            await asyncio.gather(self.form_batches(), self.forget_idle())
        finally:
            server.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after the other."""
        try:
            while line := await reader.readline():
                try:
                    answer = await self.answer(line)
                except RequestError as error:
                    answer = {"error": str(error)}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError):  # gone, or a line of more than MAX_LINE
            pass
        finally:
            writer.close()

    async def answer(self, line: bytes) -> dict[str, Any]:
        request = self.read(line)
        client = request["id"]
        if request.get("leave"):
            self.forget([client] if client in self.last_seen else [])
            return {"left": True}
        observation = self.read_observation(request.get("observation"))
        future = asyncio.get_running_loop().create_future()
        is_init = request.get("is_init", False) is True
        self.waiting.append(Request(client, observation, is_init, future))
        self.arrived.set()
        return {"action": await future}

    def read(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except ValueError as error:
            raise RequestError(f"the line is not JSON: {error}") from error
        client = request.get("id") if isinstance(request, dict) else None
        if not isinstance(client, str) or not 0 < len(client) <= MAX_ID:
            raise RequestError(f"id must be a string of 1 to {MAX_ID} characters; got {client!r}")
        return request

    def read_observation(self, value: Any) -> np.ndarray:
        try:
            observation = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError):
            observation = np.full((), np.nan, np.float32)
        if observation.shape != self.shape or not np.isfinite(observation).all():
            raise RequestError(f"observation must be finite numbers of shape {list(self.shape)}")
        return observation

    async def form_batches(self) -> None:
        while True:
            await self.arrived.wait()
            if len(self.waiting) < self.args.max_batch:
                await asyncio.sleep(self.args.max_wait)
            self.step(self.take())
            if not self.waiting:
                self.arrived.clear()
            await asyncio.sleep(0)  # clients get their answers before the next batch

    def take(self) -> list[Request]:
        """Take the oldest requests, one of each id, that can be answered."""
        batch: dict[str, Request] = {}
        later = []
        while self.waiting and len(batch) < self.args.max_batch:
            request = self.waiting.popleft()
            if request.id in batch:
                later.append(request)
            elif error := self.find_error(request, len(batch)):
                fail(request, error)
            else:
                batch[request.id] = request
        self.waiting.extendleft(reversed(later))
        return list(batch.values())

    def find_error(self, request: Request, joining: int) -> str:
        if request.id in self.last_seen:
            return ""
        if not request.is_init:
            return (
                f"id {request.id!r} has no state: no episode was started, or none of its requests "
                f"came for {self.args.idle:g} s. Start one with is_init: true"
            )
        full = len(self.last_seen) + joining >= self.args.max_ids
        return f"the server holds {self.args.max_ids} ids already: try again later" if full else ""

    def step(self, batch: list[Request]) -> None:
        """Run the policy on requests of different ids, and answer them."""
        if not batch:
            return
        ids = [request.id for request in batch]
        known = [one for one in ids if one in self.last_seen]
        before = self.player.state(known)
        try:
            self.player.reset([request.id for request in batch if request.is_init])
            actions = self.player(np.stack([request.observation for request in batch]), ids=ids)
        except ValueError as error:  # a state would not be finite
            self.player.reset(known, before)
            self.player.remove([one for one in ids if one in self.player.ids and one not in known])
            if len(batch) == 1:
                fail(batch[0], str(error))
                return
            for request in batch:  # the others are not to blame
                self.step([request])
            return
        now = time.monotonic()
        for request, action in zip(batch, np.asarray(actions).tolist(), strict=True):
            self.last_seen[request.id] = now
            if not request.answer.done():  # the client may be gone
                request.answer.set_result(action)

    async def forget_idle(self) -> None:
        while True:
            await asyncio.sleep(self.args.idle / 10)
            oldest = time.monotonic() - self.args.idle
            self.forget([one for one, seen in self.last_seen.items() if seen < oldest])

    def forget(self, ids: list[str]) -> None:
        self.player.remove(ids)
        for one in ids:
            del self.last_seen[one]


def fail(request: Request, message: str) -> None:
    if not request.answer.done():
        request.answer.set_exception(RequestError(message))


def make_server(args: Args) -> PolicyServer:
    """Load a policy of ``drqn_policy``; for another one pass its builder to load_pretrained."""
    arguments = read_arguments(args.folder)
    policy = load_pretrained(args.folder)
    player = StatefulPolicy(policy, action_spec=arguments["action_spec"])
    return PolicyServer(args, player, arguments["observation_shape"])


async def serve(args: Args) -> None:
    task = asyncio.ensure_future(make_server(args).run())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        print("Stopped.")


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, args=argv, description=__doc__)
    torch.set_num_threads(args.threads)
    if not ip_address(args.host).is_loopback:
        print("Anybody who reaches this address can use the policy.", file=sys.stderr)
    try:
        asyncio.run(serve(args))
    except (PretrainedError, OSError) as error:
        print(f"policy_server.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
