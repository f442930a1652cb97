"""The policy server: clients that come and go are not mixed up, and bad requests hurt nobody."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrl.data import OneHot

from rnnkeys import StatefulPolicy, drqn_policy, load_pretrained, save_pretrained
from tests.support.tutorials import NEEDS_SIGNALS, ROOT, load_tutorial, start_script

pytest.importorskip("safetensors")
ARGUMENTS: dict[str, Any] = {
    "action_spec": OneHot(3),
    "observation_shape": (4,),
    "hidden_size": 8,
    "encoder_sizes": (),
}


class Client:
    """A connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, line: bytes) -> Any:
        self.writer.write(line + b"\n")
        return json.loads(await asyncio.wait_for(self.reader.readline(), 30))

    async def ask(self, name: Any, **entries: Any) -> Any:
        return await self.send(json.dumps({"id": name, **entries}).encode())

    async def act(self, name: str, observation: Any, is_init: bool = False) -> Any:
        return await self.ask(name, observation=np.asarray(observation).tolist(), is_init=is_init)


Connect = Callable[[], Awaitable[Client]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    policy = drqn_policy(**ARGUMENTS)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(3)  # so that actions depend on the state
    path = tmp_path_factory.mktemp("policy")
    save_pretrained(policy, path, builder=drqn_policy, arguments=ARGUMENTS)
    return path


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that runs a server and, beside it, a coroutine ``(server, connect)``."""
    tutorial = load_tutorial("policy_server")

    def run(test: Callable[[Any, Connect], Awaitable[None]], **options: Any) -> None:
        async def both() -> None:
            server = tutorial.make_server(tutorial.Args(str(folder), port=0, **options))
            started = asyncio.get_running_loop().create_future()
            task = asyncio.ensure_future(server.run(started))
            port = await started
            clients: list[Client] = []

            async def connect() -> Client:
                clients.append(Client(*await asyncio.open_connection("127.0.0.1", port)))
                return clients[-1]

            try:
                await test(server, connect)
            finally:
                for client in clients:
                    client.writer.close()
                    await client.writer.wait_closed()
                await asyncio.sleep(0.01)  # the server notices
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(both())

    yield run


def draw_episodes(name: str, number: int) -> list[np.ndarray]:
    random = np.random.default_rng([ord(letter) for letter in name])
    return [random.normal(size=(length, 4)) for length in random.integers(1, 9, number)]


def play_alone(folder: Path, episodes: list[np.ndarray]) -> list[int]:
    player = StatefulPolicy(load_pretrained(folder), action_spec=OneHot(3))
    actions = []
    for episode in episodes:
        player.reset()
        actions += [int(player(observation.astype(np.float32))) for observation in episode]
    return actions


def test_server_clients_at_once_get_the_actions_that_each_gets_alone(
    serve: Any, folder: Path
) -> None:
    names = [f"client {i}" for i in range(20)]
    served: dict[str, list[int]] = {}
    sizes: list[int] = []

    async def play(name: str, connect: Connect) -> None:
        client, actions = await connect(), []
        for number, episode in enumerate(draw_episodes(name, 6)):
            for step, observation in enumerate(episode):
                answer = await client.act(name, observation, is_init=step == 0)
                actions.append(answer["action"])
            if number == 2:  # leaves, and comes again by another connection
                assert await client.ask(name, leave=True) == {"left": True}
                client = await connect()
        served[name] = actions

    async def test(server: Any, connect: Connect) -> None:
        step = server.step
        server.step = lambda batch: (sizes.append(len(batch)), step(batch))
        await asyncio.gather(*(play(name, connect) for name in names))

    serve(test)
    alone = {name: play_alone(folder, draw_episodes(name, 6)) for name in names}
    assert served == alone
    assert max(sizes) > 5 and len({tuple(actions) for actions in alone.values()}) > 10


def test_server_id_that_was_idle_is_forgotten_and_says_so(serve: Any) -> None:
    async def test(server: Any, connect: Connect) -> None:
        client = await connect()
        assert "action" in await client.act("ada", np.ones(4), is_init=True)
        while server.last_seen:
            await asyncio.sleep(0.01)
        assert server.player.ids == [0]
        answer = await client.act("ada", np.ones(4))
        assert "'ada' has no state: no episode was started, or none" in answer["error"]
        assert "action" in await client.act("ada", np.ones(4), is_init=True)

    serve(test, idle=0.1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"[1]", "id must be a string"),
        (b'{"id": 0, "observation": [0, 0, 0, 0]}', "id must be a string .*got 0"),
        (b'{"id": "new", "observation": [0, 0, 0, 0]}', "'new' has no state"),
        (b'{"id": "ada", "observation": [0, 0, 0]}', r"finite numbers of shape \[4\]"),
        (b'{"id": "ada", "observation": [0, 0, 0, NaN]}', "finite numbers"),
        (b'{"id": "ada", "observation": [[0], [0, 1]]}', "finite numbers"),
        (b'{"id": "ada"}', "finite numbers"),
    ],
)
def test_server_bad_request_gets_an_error_and_changes_no_state(
    serve: Any, line: bytes, message: str
) -> None:
    async def test(server: Any, connect: Connect) -> None:
        client = await connect()
        await client.act("ada", np.ones(4), is_init=True)
        before = server.player.state("ada").clone()
        answer = await client.send(line)
        with pytest.raises(ValueError, match=message):
            raise ValueError(answer["error"])
        assert (server.player.state("ada") == before).all()
        assert server.player.ids == [0, "ada"]
        assert "action" in await client.act("ada", np.ones(4))

    serve(test)


def test_server_request_that_breaks_the_policy_leaves_others_of_its_batch_alone(
    serve: Any, folder: Path
) -> None:
    answers: dict[str, Any] = {}

    async def test(server: Any, connect: Connect) -> None:
        run = server.player.network.run_step

        def break_big(data: Any) -> Any:
            out = run(data)
            big = data["observation"].amax(-1) > 100
            out["next", "recurrent_state_h"][big] = np.nan
            return out

        server.player.network.run_step = break_big
        values = {"ada": 1.0, "bob": 1000.0, "eve": 2.0}
        clients = {name: await connect() for name in values}

        async def ask(name: str, is_init: bool) -> None:
            value = 1.0 if is_init else values[name]
            answers[name] = await clients[name].act(name, np.full(4, value), is_init)

        for is_init in (True, False):
            await asyncio.gather(*(ask(name, is_init) for name in values))
        assert sorted(server.last_seen) == ["ada", "bob", "eve"]
        before = server.player.state("bob").clone()
        assert "error" in await clients["bob"].act("bob", np.full(4, 1000.0), is_init=True)
        assert (server.player.state("bob") == before).all()

    serve(test, max_wait=0.1)
    assert "is NaN or infinite" in answers["bob"]["error"]
    for name, value in (("ada", 1.0), ("eve", 2.0)):
        episode = np.array([np.ones(4), np.full(4, value)])
        assert answers[name]["action"] == play_alone(folder, [episode])[-1]


def test_server_two_requests_of_one_id_run_in_order(serve: Any, folder: Path) -> None:
    (episode,) = draw_episodes("twice", 1)
    episode = np.concatenate([episode, episode])[:2]
    answers: list[Any] = []

    async def test(server: Any, connect: Connect) -> None:
        first, second = await connect(), await connect()
        one = asyncio.ensure_future(first.act("ada", episode[0], is_init=True))
        while not server.waiting:
            await asyncio.sleep(0)
        two = asyncio.ensure_future(second.act("ada", episode[1]))
        answers.extend(await asyncio.gather(one, two))

    serve(test, max_wait=0.2)
    assert [answer["action"] for answer in answers] == play_alone(folder, [episode])


def test_server_more_ids_than_max_ids_are_turned_away(serve: Any) -> None:
    async def test(server: Any, connect: Connect) -> None:
        client = await connect()
        for name in ("ada", "bob"):
            assert "action" in await client.act(name, np.ones(4), is_init=True)
        answer = await client.act("eve", np.ones(4), is_init=True)
        assert answer == {"error": "the server holds 2 ids already: try again later"}
        assert "action" in await client.act("ada", np.ones(4), is_init=True)

    serve(test, max_ids=2)


@NEEDS_SIGNALS
def test_server_script_listens_on_loopback_alone_and_stops_at_a_signal(
    folder: Path, tmp_path: Path
) -> None:
    script = ROOT / "tutorials" / "policy_server.py"
    process: subprocess.Popen[str] = start_script(script, [str(folder), "--port", "0"], tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(f"Serving {folder} on 127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "Stopped.\n") and "Traceback" not in err
