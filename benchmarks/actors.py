"""CPU time of a step that an actor collects: in the learner's process, and in all others.

    python -m benchmarks.actors                   # in this process, on processes and on Ray

CartPole without its velocities, an LSTM of 128, 16 environments in each actor, batches of 128
steps; nothing is learned meanwhile. CPU times count, since they depend little on other programs.
They are read from /proc, so that this needs Linux.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchrl.data import OneHot
from torchrl.envs import EnvBase

from rnnkeys import drqn_policy, get_env_transforms_from_module
from rnnkeys.collectors import LocalActors, ProcessActors, RayActors
from rnnkeys.environments import make_gym_env

from .machine import cpu_facts
from .tables import table

FRAMES = 128
WARM = 3  # batches of each actor before the measurement
CONTESTANTS: dict[str, tuple[Any, dict[str, int]]] = {
    "none": (LocalActors, {}),
    "1 process": (ProcessActors, {"num_actors": 1}),
    "2 processes": (ProcessActors, {"num_actors": 2}),
    "1 on Ray": (RayActors, {"num_actors": 1}),
    "2 on Ray": (RayActors, {"num_actors": 2}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of CPU times."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--batches", type=int, default=200, help="batches (default: 200)")
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = cpu_facts(threads=1)
    rows = [[name, *measure(name, options.batches)] for name in options.only]
    print(table(["actors", "learner, us", "other processes, us"], rows))
    print(", ".join(f"{name} {value}" for name, value in facts.items()))


def measure(name: str, batches: int) -> list[str]:
    """Return the microseconds of CPU time for each step, of the learner and of the others."""
    kind, options = CONTESTANTS[name]
    policy = drqn_policy(OneHot(2), (2,), hidden_size=128, encoder_sizes=())
    make_env = partial(make_environments, policy)
    with kind(make_env, policy, frames_per_batch=FRAMES, seed=0, **options) as actors:
        for _ in range(WARM * options.get("num_actors", 1)):
            next(actors)
        own, others = time.process_time(), read_others()
        for _ in range(batches):
            next(actors)
        spent = time.process_time() - own, read_others() - others
    return [f"{1e6 * seconds / (batches * FRAMES):.0f}" for seconds in spent]


def make_environments(policy: Any) -> EnvBase:
    """Make the environments of one actor."""
    env = make_gym_env("CartPole-v1", 16, hide=(1, 3), discrete_actions=True)
    return env.append_transform(get_env_transforms_from_module(policy))


def read_others() -> float:
    """Return the seconds of CPU time of all processes that descend from this one."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        number = int(path.parent.name)
        parents[number] = int(fields[1])
        seconds[number] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return sum(value for number, value in seconds.items() if _descends(number, parents))


def _descends(number: int, parents: dict[int, int]) -> bool:
    while number in parents:
        number = parents[number]
        if number == os.getpid():
            return True
    return False


if __name__ == "__main__":
    main()
