"""The PPO and SAC tutorials on robots of MuJoCo, of which they see positions or velocities only."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from tests.support.tutorials import ROOT, load_tutorial, read_result, read_rows

pytest.importorskip("mujoco")
CHEETAH = ["--env", "HalfCheetah-v5", "--hidden-size", "8", "--net-arch", "8"]
POSITIONS = ["--hide", *map(str, range(8, 17))]
VELOCITIES = ["--hide", *map(str, range(8))]
SHORT = ["--frames", "64", "--eval-every", "64", "--eval-episodes", "1", "--num-envs", "2"]
# Episodes of the evaluation would take 1,000 steps.
BRIEF = ["--wrappers", "gymnasium.wrappers:TimeLimit(max_episode_steps=10)"]
OPTIONS = {
    "recurrent_ppo": ["--steps", "16", "--seq-len", "8", "--minibatch-steps", "32"],
    "recurrent_sac": [
        "--warmup",
        "32",
        "--slices",
        "2",
        "--slice-len",
        "8",
        "--batch-frames",
        "16",
    ],
}

pytestmark = pytest.mark.usefixtures("signal_handlers")


@pytest.mark.parametrize(("hide", "size"), [(POSITIONS, 8), (VELOCITIES, 9)])
@pytest.mark.parametrize("name", OPTIONS)
def test_tutorial_on_a_robot_trains_on_what_it_sees(
    name: str, hide: list[str], size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings to MUJOCO_LOG.TXT
    tutorial = load_tutorial(name)
    argv = [*CHEETAH, *hide, *SHORT, *BRIEF, *OPTIONS[name], "--output", "run"]
    args, _ = tutorial.read_args(argv)
    assert tutorial.make_env(args, 1).observation_spec["observation"].shape == (1, size)
    tutorial.main(argv)
    assert math.isfinite(read_rows(tmp_path / "run")[-1]["loss"])
    assert math.isfinite(read_result(tmp_path / "run")["test_return"])


def test_table_of_positions_and_velocities_is_that_of_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "robots.md").read_text()
    rows = re.findall(r"^\| `(\w+-v5)` \| (\d+).*?(\d+) \| (\d+).*?(\d+) \|", text, re.M)
    compared = []
    for name, *numbers in rows:
        env: Any = gym.make(name).unwrapped
        declared = getattr(env, "observation_structure", None)
        if declared is not None:
            positions = declared["qpos"]
            ends = [0, positions - 1, positions, positions + declared["qvel"] - 1]
            assert [int(number) for number in numbers] == ends, name
            compared.append(name)
        env.close()
    assert len(compared) >= 5
