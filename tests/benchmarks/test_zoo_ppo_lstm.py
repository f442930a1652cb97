"""Each recurrent-PPO configuration of rl-baselines3-zoo, as arguments of the tutorial.

Where the package of an environment is missing, one with the same spaces stands in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from benchmarks.zoo_ppo_lstm import CONFIGURATIONS, SCRIPT, command_line
from tests.support.odd_environments import SpacesEnv, box

NUMBERS = spaces.Box(-np.inf, np.inf, (11,), np.float64)
IMAGES = spaces.Box(0, 255, (96, 96, 3), np.uint8)
STEERING = spaces.Box(np.array([-1, 0, 0], np.float32), np.ones(3, np.float32))
STAND_INS: dict[str, tuple[gym.Space, gym.Space]] = {
    "atari": (spaces.Box(0, 255, (84, 84), np.uint8), spaces.Discrete(4)),
    "BipedalWalker": (box(24), box(4)),
    "BipedalWalkerHardcore": (box(24), box(4)),
    "LunarLanderNoVel": (box(8), spaces.Discrete(4)),
    "LunarLanderContinuousNoVel": (box(8), box(2)),
    "CarRacing": (IMAGES, STEERING),
}
CLASSIC = ("PendulumNoVel", "CartPoleNoVel", "MountainCarNoVel", "MountainCarContinuousNoVel")


@pytest.fixture
def ppo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return import_module(SCRIPT.stem)


@pytest.fixture
def stand_in() -> Iterator[Any]:
    registered = []

    def register(name: str) -> str:
        observation, action = STAND_INS.get(name, (NUMBERS, box(3)))
        registered.append(f"StandInFor{name}-v0")
        gym.register(registered[-1], lambda **_: SpacesEnv(observation, action))
        return registered[-1]

    yield register
    for name in registered:
        del gym.registry[name]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration_runs_two_iterations(
    ppo: ModuleType, stand_in: Any, tmp_path: Path, name: str
) -> None:
    args, _ = ppo.read_args([*command_line(name), "--output", str(tmp_path)])
    assert args.num_envs * args.steps >= args.minibatch_steps or args.num_envs == 1
    assert args.steps % args.seq_len == 0
    small = {
        "num_envs": 2,
        "steps": 8,
        "seq_len": 8,
        "minibatch_steps": 8,
        "epochs": 2,
        "frames": 32,
        "eval_every": 32,
        "eval_episodes": 1,
    }
    wrappers = (*args.wrappers, "gymnasium.wrappers:TimeLimit(max_episode_steps=20)")
    env = args.env if name in (*CLASSIC, "Acrobot") else stand_in(name)
    if name == "atari":
        wrappers = wrappers[1:]  # the stand-in is no emulator
    trainer = ppo.Trainer(replace(args, **small, env=env, wrappers=wrappers), {})
    assert trainer.train()
    assert trainer.run.frames == 32 and len(trainer.run.losses) == 8


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("PendulumNoVel", {"sde": True, "sde_sample_freq": 4, "gamma": 0.9, "num_envs": 4}),
        ("CartPoleNoVel", {"lr_schedule": "linear", "clip_schedule": "linear", "epochs": 20}),
        ("MountainCarContinuousNoVel", {"log_std_init": -3.29, "ortho_init": False, "sde": True}),
        ("BipedalWalkerHardcore", {"critic": "feed_forward", "normalize_reward": True}),
        ("CarRacing", {"net_arch": (), "activation": "gelu", "frame_stack": 2, "squash": False}),
        ("HalfCheetah", {"net_arch": (256, 256), "activation": "relu", "seq_len": 64}),
        ("atari", {"clip": 0.1, "lr_schedule": "linear", "minibatch_steps": 256}),
    ],
)
def test_command_line_sets_the_entries(ppo: ModuleType, name: str, entries: dict[str, Any]) -> None:
    args, _ = ppo.read_args(command_line(name))
    assert {key: getattr(args, key) for key in entries} == entries
