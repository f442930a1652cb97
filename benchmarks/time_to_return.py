"""CPU time until recurrent PPO returns 475 on CartPole without velocities: rnnkeys, sb3-contrib.

    python -m benchmarks.time_to_return              # needs sb3-contrib: pip install sb3-contrib
    python -m benchmarks.time_to_return --seeds 0

All have 8 environments. rnnkeys is ``tutorials/recurrent_ppo.py`` with its defaults; sb3-contrib
has the settings that rl-baselines3-zoo gives for CartPoleNoVel-v1, once as they are and once with
the networks and the observations of the tutorial. Every 10,000 frames 20 episodes are played
without exploration, which is not counted. A finished seed in ``--runs`` is not repeated. Results go
to ``benchmarks/results/time_to_return.md``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torchrl.collectors import Collector

import rnnkeys
from benchmarks.bench_ppo import HideVelocities
from benchmarks.learn import RESULTS, ROOT, describe_machine, find_commit
from benchmarks.tables import table

sys.path.insert(0, str(ROOT / "tutorials"))
import recurrent_ppo  # noqa: E402 (tutorials are scripts, not a package)

ENVS, FRAMES, EVERY, EPISODES, GOAL = 8, 100_000, 10_000, 20, 475.0
TEXT = """# Time until recurrent PPO returns 475

Made by `python -m benchmarks.time_to_return`: CartPole without velocities, 8 environments.
*rnnkeys* is `tutorials/recurrent_ppo.py` with its defaults: two LSTMs of 64, each with a layer of
64. *sb3-contrib* is `RecurrentPPO` with the settings that rl-baselines3-zoo gives for
CartPoleNoVel-v1 (hyperparams/ppo_lstm.yml, commit 038ab16): two LSTMs of 256, each with two layers
of 64, and positions as they are, velocities 0. *sb3-contrib, 64* has the same settings with the
networks and the observations of the tutorial. Every 10,000 frames, 20 episodes are played without
exploration, which is not counted. A run ends with the first mean return of {goal:g} or more, or
after {frames:,} frames.

{table}

{machine}, sb3-contrib {sb3}, one thread per run. Runs are of commit {commits}. Seconds of CPU on a
machine that other programs shared.
"""


class Tutorial:
    """``tutorials/recurrent_ppo.py`` with its defaults."""

    def __init__(self, seed: int) -> None:
        args = recurrent_ppo.Args(
            seed=seed,
            num_envs=ENVS,
            frames=FRAMES,
            output=tempfile.mkdtemp(),
            eval_episodes=EPISODES,
        )
        self.trainer = recurrent_ppo.Trainer(args, {})
        policy = self.trainer.agent.collector
        env = recurrent_ppo.make_env(args, ENVS)
        env.append_transform(rnnkeys.get_env_transforms_from_module(policy))
        env.set_seed(seed)
        self.collector = Collector(env, policy, frames_per_batch=ENVS * args.steps)

    def advance(self) -> int:
        rollout: Any = self.collector.next()
        self.trainer.scale_rewards(rollout)
        self.trainer.learn(rollout)
        self.trainer.run.count(rollout)
        return self.trainer.run.frames

    def evaluate(self) -> float:
        return self.trainer.evaluate(recurrent_ppo.EVAL_SEED).mean().item()


class MaskVelocities(gym.ObservationWrapper):
    """Set the velocities of CartPole to 0, as the zoo does."""

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation * np.array([1, 0, 1, 0], np.float32)


class StableBaselines:
    """sb3-contrib's ``RecurrentPPO`` with the zoo's settings; rate and clip fall to 0."""

    def __init__(
        self, seed: int, wrapper: type[gym.ObservationWrapper], networks: dict[str, Any]
    ) -> None:
        from sb3_contrib import RecurrentPPO
        from stable_baselines3.common.env_util import make_vec_env

        self.seed = seed
        self.make_env = lambda seed: make_vec_env(
            "CartPole-v1", ENVS, seed=seed, wrapper_class=wrapper
        )
        self.model = RecurrentPPO(
            "MlpLstmPolicy",
            self.make_env(seed),
            n_steps=32,
            batch_size=256,
            gae_lambda=0.8,
            gamma=0.98,
            n_epochs=20,
            ent_coef=0.0,
            learning_rate=lambda left: 0.001 * left,
            clip_range=lambda left: 0.2 * left,
            policy_kwargs=networks,
            seed=seed,
            device="cpu",
        )
        _, self.callback = self.model._setup_learn(FRAMES, None)

    def advance(self) -> int:
        model = self.model
        model.collect_rollouts(model.env, self.callback, model.rollout_buffer, n_rollout_steps=32)
        model._update_current_progress_remaining(model.num_timesteps, FRAMES)
        model.train()
        return model.num_timesteps

    def evaluate(self) -> float:
        from stable_baselines3.common.evaluation import evaluate_policy

        env = self.make_env(recurrent_ppo.EVAL_SEED + self.seed)
        returns, _ = evaluate_policy(self.model, env, n_eval_episodes=EPISODES, warn=False)
        return float(np.mean(returns))


CONTESTANTS: dict[str, Callable[[int], Any]] = {
    "rnnkeys": Tutorial,
    "sb3-contrib": partial(StableBaselines, wrapper=MaskVelocities, networks={}),
    "sb3-contrib, 64": partial(
        StableBaselines,
        wrapper=HideVelocities,
        networks={"lstm_hidden_size": 64, "net_arch": [64]},
    ),
}


def train(name: str, seed: int) -> dict[str, Any]:
    """Train until the goal or the last frame; return frames, seconds and the last mean return."""
    one = CONTESTANTS[name](seed)
    frames, seconds, mean, due = 0, 0.0, 0.0, EVERY
    while frames < FRAMES and mean < GOAL:
        start = time.process_time()
        frames = one.advance()
        seconds += time.process_time() - start
        if frames >= due:
            mean, due = one.evaluate(), due + EVERY
            print(name, seed, frames, f"{seconds:.1f} s", f"{mean:.1f}", flush=True)
    return {"frames": frames, "seconds": seconds, "return": mean, "commit": find_commit()}


def path_of(name: str, seed: int, folder: Path) -> Path:
    """Return the file of a finished run."""
    return folder / "time_to_return" / f"{name}_{seed}.json"


def read_or_train(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Return the result of a finished run in ``folder``, or train and write it there."""
    path = path_of(name, seed, folder)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(train(name, seed)))
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="run only these")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learn")
    parser.add_argument("--recorded", action="store_true", help="report finished runs, run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    runs = [
        (name, seed, read_or_train(name, seed, options.runs))
        for seed in options.seeds
        for name in options.only or CONTESTANTS
        if not options.recorded or path_of(name, seed, options.runs).exists()
    ]
    rows = [
        [
            name,
            f"{seed}",
            f"{one['frames']:,}",
            f"{one['seconds']:.0f}",
            f"{one['return']:.1f}",
            "yes" if one["return"] >= GOAL else "no",
        ]
        for name in CONTESTANTS
        for contestant, seed, one in runs
        if contestant == name
    ]
    import sb3_contrib

    text = TEXT.format(
        goal=GOAL,
        frames=FRAMES,
        table=table(["", "seed", "frames", "CPU seconds", "last mean return", "reached"], rows),
        machine=describe_machine(),
        sb3=sb3_contrib.__version__,
        commits=", ".join(sorted({one["commit"] for _, _, one in runs})),
    )
    (RESULTS / "time_to_return.md").write_text(text)


if __name__ == "__main__":
    main()
