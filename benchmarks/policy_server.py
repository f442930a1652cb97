"""Load the policy server with clients on the loopback interface, and check every action.

    python -m benchmarks.policy_server                      # 200 clients, as fast as they can
    python -m benchmarks.policy_server --rate 10            # each asks 10 times a second

The server is the tutorial's, in a process of its own, with an untrained LSTM of 128. Clients play
episodes of random length, leave after each third one and come again. Afterwards each client's
observations are played again, alone and step by step: the actions must be the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torchrl.data import OneHot

from rnnkeys import StatefulPolicy, drqn_policy, load_pretrained, save_pretrained

ROOT = Path(__file__).parents[1]
SIZE = 8
Step = tuple[np.ndarray, bool, int]


def draw_steps(seed: int, number: int) -> Iterator[tuple[np.ndarray, bool, bool]]:
    """Yield observations, and whether an episode starts and whether the client leaves before."""
    random = np.random.default_rng(seed)
    left, episodes = 0, 0
    for _ in range(number):
        is_init = left == 0
        if is_init:
            left, episodes = int(random.integers(5, 40)), episodes + 1
        left -= 1
        yield random.normal(size=SIZE).astype(np.float32), is_init, is_init and episodes % 3 == 0


async def play(port: int, seed: int, number: int, rate: float) -> tuple[list[Step], list[float]]:
    """Play as one client; returns its steps, and the seconds that each answer took."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def ask(**request: object) -> dict[str, int]:
        writer.write(json.dumps({"id": f"client {seed}", **request}).encode() + b"\n")
        return json.loads(await reader.readline())

    steps, seconds = [], []
    due = time.perf_counter() + np.random.default_rng(seed).random() / rate if rate else 0.0
    for observation, is_init, leaves in draw_steps(seed, number):
        if leaves:
            await ask(leave=True)
        if rate:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            due += 1 / rate
        start = time.perf_counter()
        answer = await ask(observation=observation.tolist(), is_init=is_init)
        seconds.append(time.perf_counter() - start)
        steps.append((observation, is_init, answer["action"]))
    writer.close()
    return steps, seconds


async def load(port: int, clients: int, number: int, rate: float) -> tuple[list, float]:
    start = time.perf_counter()
    played = await asyncio.gather(*(play(port, seed, number, rate) for seed in range(clients)))
    return played, time.perf_counter() - start


def count_mixed_up(folder: str, played: list) -> int:
    """Return the number of actions that differ from those of each client alone."""
    policy, wrong = load_pretrained(folder), 0
    for steps, _ in played:
        player = StatefulPolicy(policy, action_spec=OneHot(4))
        for observation, is_init, action in steps:
            if is_init:
                player.reset()
            wrong += int(player(observation)) != action
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200, help="of each client")
    parser.add_argument("--rate", type=float, default=0.0, help="steps a second, 0: no pause")
    parser.add_argument("--max-wait", default="0.002", help="of the server")
    options = parser.parse_args()
    arguments = {
        "action_spec": OneHot(4),
        "observation_shape": (SIZE,),
        "hidden_size": 128,
    }
    with tempfile.TemporaryDirectory() as folder:
        policy = drqn_policy(**arguments)
        save_pretrained(policy, folder, builder=drqn_policy, arguments=arguments)
        command = [sys.executable, str(ROOT / "tutorials" / "policy_server.py"), folder]
        command += ["--port", "0", "--max-wait", options.max_wait]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
        assert server.stdout is not None
        port = int(server.stdout.readline().rpartition(":")[2])
        try:
            asyncio.run(load(port, options.clients, 3, 0.0))  # warms up
            played, seconds = asyncio.run(load(port, options.clients, options.steps, options.rate))
        finally:
            server.terminate()
            server.wait()
        wrong = count_mixed_up(folder, played)
    latencies = np.concatenate([one for _, one in played]) * 1000
    low, middle, high = np.percentile(latencies, [50, 95, 99])
    print(f"{options.clients} clients, {len(latencies)} steps, {seconds:.1f} s:")
    print(f"{len(latencies) / seconds:.0f} steps/s, ms at 50/95/99 %: ", end="")
    print(f"{low:.1f} / {middle:.1f} / {high:.1f}, {wrong} actions differ from those alone")


if __name__ == "__main__":
    main()
