"""What the tests of tutorials share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec


class BrokenEnv(gym.Env):
    """Return NaN in one entry of the fifth step."""

    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, entry: str) -> None:
        self.entry = entry

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        broken = np.nan if self.steps == 5 else 0.0
        observation = np.array([0, broken if self.entry == "observation" else 0, 0], np.float32)
        reward = broken if self.entry == "reward" else 1.0
        return observation, reward, self.steps == 9, False, {}


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that runs the tutorial of a module of tests and returns its folder."""

    def main(*argv: str) -> Path:
        request.module.tutorial.main([*argv, "--output", str(tmp_path)])
        return tmp_path

    return main


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """Restore the handlers of the signals that a tutorial catches."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def broken_env(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register ``Broken-v0``, whose argument ``entry`` names the entry that becomes NaN."""
    make: Any = BrokenEnv
    monkeypatch.setitem(gym.registry, "Broken-v0", EnvSpec("Broken-v0", entry_point=make))
