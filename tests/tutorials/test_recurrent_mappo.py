"""The recurrent-MAPPO tutorial, run with small budgets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vmas", reason="needs the extra rnnkeys[marl]")

from tests.support.tutorials import assert_complete, load_tutorial

SHORT = [
    *("--num-envs", "4", "--steps", "8", "--sequences", "2", "--epochs", "2"),
    *("--hidden-size", "8", "--eval-every", "32", "--frames", "64"),
]

pytestmark = pytest.mark.usefixtures("signal_handlers")
tutorial = load_tutorial("recurrent_mappo")
Run = Callable[..., Path]


@pytest.mark.parametrize(
    "argv",
    [[], ["--own"], ["--algorithm", "ippo"], ["--algorithm", "ippo", "--own", "--cell", "lstm"]],
    ids=" ".join,
)
def test_run_writes_all_files(run: Run, argv: list[str]) -> None:
    assert_complete(run(*SHORT, *argv), [32, 64], tested=256)


def make_rollout() -> Any:
    torch.manual_seed(0)
    env = tutorial.make_env(tutorial.Args(steps=6), 3)
    return env.rollout(12, break_when_any_done=False)


def test_recall_shows_goals_at_the_first_step_alone() -> None:
    seen = make_rollout()["agents", "observation"]
    assert seen[:, [0, 6], :, 4].all() and not seen[:, 1:6, :, 2:].any()
    assert not torch.equal(seen[:, 0, :, 2:4], seen[:, 6, :, 2:4])


def test_recall_rewards_the_team_for_coming_closer() -> None:
    rollout = make_rollout()
    seen, after = rollout["agents", "observation"], rollout["next", "agents", "observation"]
    goal = seen[:, 0, :, 2:4]
    before = (seen[:, 0, :, :2] - goal).norm(dim=-1).mean(-1)
    end = (after[:, 5, :, :2] - goal).norm(dim=-1).mean(-1)
    returns = rollout["next", "agents", "reward"][:, :6, 0, 0].sum(1)
    torch.testing.assert_close(returns, before - end, atol=1e-5, rtol=1e-4)
    assert (
        rollout["next", "agents", "reward"][:, :, :1] == rollout["next", "agents", "reward"]
    ).all()


def test_evaluate_plays_other_episodes_with_another_seed_and_the_same_with_the_same() -> None:
    args = tutorial.Args(steps=4, hidden_size=8)
    actor = tutorial.make_actor(args, tutorial.make_env(args, 1))
    first, again, other = (tutorial.evaluate(args, actor, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
