"""Speed of recurrent PPO from end to end: rnnkeys, TorchRL's modules and sb3-contrib.

    python -m benchmarks.bench_ppo                # needs sb3-contrib: pip install sb3-contrib
    python -m benchmarks.bench_ppo --rounds 5 --epochs 4 --num-envs 8
    python -m benchmarks.bench_ppo --processes    # collect from several processes, too

All three play CartPole without velocities, 128 steps in each environment, with an LSTM of 64 for
the actor and another for the critic, and learn in minibatches of 256 steps of whole sequences.
The first two run ``tutorials/recurrent_ppo.py``, with one module or the other. Rounds take turns,
and the median counts. Results go to ``benchmarks/results/recurrent_ppo_speed.md``.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import torchrl.modules
from torchrl.collectors import Collector

import rnnkeys
from benchmarks.learn import find_commit
from benchmarks.tables import table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tutorials"))
import recurrent_ppo  # noqa: E402 (tutorials are scripts, not a package)

ENVS, STEPS, HIDDEN, MINIBATCH = 8, 128, 64, 256
RESULTS = ROOT / "benchmarks" / "results"


class Tutorial:
    """``tutorials/recurrent_ppo.py``, with the recurrent modules of a library."""

    def __init__(
        self,
        epochs: int,
        make_recurrent: Callable[..., Any] = rnnkeys.recurrent_module,
        seq_len: int = STEPS,
        num_envs: int = ENVS,
        vectorization: Literal["sync", "async"] = "sync",
    ) -> None:
        recurrent_ppo.recurrent_module = make_recurrent
        args = recurrent_ppo.Args(
            num_envs=num_envs,
            vectorization=vectorization,
            steps=STEPS,
            seq_len=seq_len,
            minibatch_steps=MINIBATCH,
            epochs=epochs,
            hidden_size=HIDDEN,
            output=tempfile.mkdtemp(),
        )
        self.trainer = recurrent_ppo.Trainer(args, {})
        if make_recurrent is make_torchrl_lstm:
            # TorchRL's LSTM branches on values, which the estimator's vmap does not allow.
            self.trainer.advantage.deactivate_vmap = True
        policy = self.trainer.agent.collector
        env = recurrent_ppo.make_env(args, num_envs)
        env.append_transform(rnnkeys.get_env_transforms_from_module(policy))
        self.collector = Collector(env, policy, frames_per_batch=num_envs * STEPS)

    def collect(self) -> None:
        self.rollout: Any = self.collector.next()
        self.trainer.scale_rewards(self.rollout)

    def learn(self) -> None:
        self.trainer.learn(self.rollout)


def make_torchrl_lstm(
    cell: str,
    input_size: int,
    hidden_size: int,
    layers: int,
    *,
    in_key: str,
    out_key: str,
    state_key: str,
) -> Any:
    states = [f"{state_key}_h", f"{state_key}_c"]
    return torchrl.modules.LSTMModule(
        input_size=input_size,
        hidden_size=hidden_size,
        num_layers=layers,
        in_keys=[in_key, *states],
        out_keys=[out_key, *(("next", state) for state in states)],
    )


class HideVelocities(gym.ObservationWrapper):
    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[[0, 2]] / np.array([2.4, 0.2095], dtype=np.float32)


class StableBaselines:
    """sb3-contrib's ``RecurrentPPO``."""

    def __init__(self, epochs: int, num_envs: int = ENVS) -> None:
        from sb3_contrib import RecurrentPPO
        from stable_baselines3.common.env_util import make_vec_env

        env = make_vec_env("CartPole-v1", num_envs, wrapper_class=HideVelocities)
        self.model = RecurrentPPO(
            "MlpLstmPolicy",
            env,
            n_steps=STEPS,
            batch_size=MINIBATCH,
            n_epochs=epochs,
            policy_kwargs={
                "lstm_hidden_size": HIDDEN,
                "net_arch": [64],
                "shared_lstm": False,
                "enable_critic_lstm": True,
            },
            device="cpu",
        )
        _, self.callback = self.model._setup_learn(10**9, None)

    def collect(self) -> None:
        model = self.model
        model.collect_rollouts(
            model.env, self.callback, model.rollout_buffer, n_rollout_steps=STEPS
        )

    def learn(self) -> None:
        self.model.train()


CONTESTANTS: dict[str, Callable[..., Any]] = {
    "rnnkeys": Tutorial,
    "rnnkeys, sequences of 32": partial(Tutorial, seq_len=32),
    "TorchRL's modules": partial(Tutorial, make_recurrent=make_torchrl_lstm),
    "sb3-contrib": StableBaselines,
}


def measure(call: Callable[[], None], clock: Callable[[], float] = time.process_time) -> float:
    """Return seconds of CPU: with one thread those of an idle machine, also on one that is not."""
    start = clock()
    call()
    return clock() - start


def race(epochs: int, num_envs: int, rounds: int) -> list[dict[str, Any]]:
    """Let all contestants collect and learn in turns; return a row for each."""
    frames = num_envs * STEPS
    contestants = {name: make(epochs, num_envs=num_envs) for name, make in CONTESTANTS.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, one in contestants.items():
            times[name].append((measure(one.collect), measure(one.learn)))
    rows = []
    for name, taken in times.items():
        collect, learn = (statistics.median(t) for t in zip(*taken[1:], strict=True))
        rows.append(
            {
                "": name,
                "environments": num_envs,
                "epochs": epochs,
                "frames/s in all": round(frames / (collect + learn)),
                "collection, frames/s": round(frames / collect),
                "update, frames/s": round(frames / learn),
                "collection, s": round(collect, 3),
                "update, s": round(learn, 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


def race_environments(rounds: int) -> list[dict[str, Any]]:
    """Collect from vectors of environments in this process, and from several processes."""
    rows = []
    for num_envs, processes in ((8, 1), (16, 1), (32, 1), (8, 8)):
        one = Tutorial(4, num_envs=num_envs, vectorization="sync" if processes == 1 else "async")
        # Other processes work too: the time of this one is not all.
        times = [measure(one.collect, time.perf_counter) for _ in range(rounds + 1)][1:]
        one.collector.shutdown()
        rows.append(
            {
                "environments": num_envs,
                "processes": processes,
                "collection, frames/s": round(num_envs * STEPS / statistics.median(times)),
            }
        )
        print(rows[-1], flush=True)
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    return table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])


def write(
    rows: list[dict[str, Any]], environments: list[dict[str, Any]], path: Path, rounds: int
) -> None:
    import sb3_contrib

    parts = [
        "# Recurrent PPO from end to end",
        "Made by `python -m benchmarks.bench_ppo`: CartPole without velocities, "
        f"{STEPS} steps of each environment, two LSTMs of {HIDDEN}, minibatches of {MINIBATCH} "
        f"steps in whole sequences. Medians of {rounds} rounds in which all took turns, in seconds "
        "of CPU on one thread, and of the clock where several processes collect.",
        show(rows),
        "The update is faster because all sequences of a minibatch are one call of a kernel; ends "
        "of episodes inside it cost next to nothing. Collection is slower: sb3-contrib hands NumPy "
        "arrays to a plain network, TorchRL carries a TensorDict through environment, transforms "
        "and collector, and more than half of a step's time goes there. Two things that are "
        "ours to choose help: environments of one process in a vector, and more of them, which "
        "share a step.",
        show(environments) if environments else "",
        f"rnnkeys {rnnkeys.__version__} (commit {find_commit()}), "
        f"torchrl {torchrl.__version__}, sb3-contrib "
        f"{sb3_contrib.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, which "
        f"{os.getloadavg()[1]:.1f} processes wanted when it ended.",
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epochs", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--num-envs", type=int, nargs="+", default=[8, 32])
    parser.add_argument(
        "--processes", action="store_true", help="collect from several processes, too: by the clock"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    pairs = itertools.product(options.num_envs, options.epochs)
    rows = [row for size, epochs in pairs for row in race(epochs, size, options.rounds)]
    environments = race_environments(options.rounds) if options.processes else []
    write(rows, environments, RESULTS / "recurrent_ppo_speed.md", options.rounds)


if __name__ == "__main__":
    main()
