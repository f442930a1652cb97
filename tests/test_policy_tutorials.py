"""The policy-gradient tutorials, run with small budgets as a reader would run them.

That they learn takes minutes, and is measured by ``make learn``.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, check_env_specs, set_exploration_type

TUTORIALS = Path(__file__).parents[1] / "tutorials"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SHORT = [
    *("--frames", "512", "--num-envs", "4", "--steps", "32", "--seq-len", "16", "--epochs", "2"),
    *("--minibatch-steps", "64", "--hidden-size", "8", "--head-size", "8"),
    *("--eval-every", "256", "--eval-episodes", "2"),
]

Main = Callable[..., Path]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TUTORIALS))


def tutorial(name: str) -> ModuleType:
    return import_module(name)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    def main(name: str, *argv: str) -> Path:
        tutorial(name).main([*argv, "--output", str(tmp_path)])
        return tmp_path

    return main


def read(folder: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    with (folder / "learning_curve.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert (folder / "learning_curve.png").read_bytes().startswith(PNG_SIGNATURE)
    return rows, json.loads((folder / "result.json").read_text())


def read_settings(*argv: str) -> Any:
    settings = tutorial("ppo_settings").Settings
    return tutorial("command_line").read_settings(settings, argv, "")[0]


# --- PPO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["--cell", "lstm", "--refresh"],
        ["--cell", "gru", "--shared"],
        ["--memoryless"],
        ["--env", "Pendulum-v1", "--gamma", "0.9"],
        ["--env", "Acrobot-v1", "--observation", "all", "--eval-every", "512"],
    ],
    ids=["lstm", "gru, shared", "memoryless", "pendulum", "acrobot"],
)
def test_ppo(run: Main, argv: list[str]) -> None:
    rows, result = read(run("recurrent_ppo", *SHORT, *argv))
    assert rows[-1]["frames"] == result["frames"] == 512
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert len(result["test_returns"]) == 20
    if "Pendulum-v1" in argv:
        assert all(-2000 < value < 0 for value in result["test_returns"])


def test_ppo_sees_pixels(run: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tutorial("training"), "TEST_EPISODES", 2)
    argv = ["--observation", "pixels", "--frames", "64", "--num-envs", "2", "--steps", "16"]
    small = ["--seq-len", "8", "--minibatch-steps", "16", "--epochs", "1", "--eval-episodes", "2"]
    rows, _ = read(run("recurrent_ppo", *argv, *small, "--eval-every", "64"))
    assert [row["frames"] for row in rows] == [64]


def test_ppo_resumes_where_it_was(run: Main) -> None:
    folder = run("recurrent_ppo", *SHORT)
    before, _ = read(folder)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    run("recurrent_ppo", "--resume", str(folder / "checkpoint.pt"), "--frames", "1024")
    after, result = read(folder)
    assert [row["frames"] for row in after] == [256, 512, 768, 1024]
    assert after[:2] == before
    assert result["settings"] == {**checkpoint["settings"], "frames": 1024}
    steps = torch.load(folder / "checkpoint.pt", weights_only=True)["learner"]["optimizer"]["state"]
    assert steps[0]["step"] == 2 * checkpoint["learner"]["optimizer"]["state"][0]["step"] == 32


def test_ppo_leaves_a_film(run: Main) -> None:
    folder = run("recurrent_ppo", *SHORT, "--film")
    with Image.open(folder / "film.gif") as film:
        assert film.is_animated and film.size == (600, 400)  # pyright: ignore[reportAttributeAccessIssue]


def test_ppo_learns_from_what_was_played(tmp_path: Path) -> None:
    """At the first minibatch the ratio is 1, with separate memories and with one."""
    ppo, records = tutorial("recurrent_ppo"), tutorial("records")
    for shared in ([], ["--shared"]):
        settings = read_settings(*SHORT, *shared)
        trainer = ppo.Trainer(settings, records.Records(tmp_path, "test"))
        collector = trainer._make_collector()
        trainer._collect(collector)
        rollout = trainer._collect(collector)  # begins in the midst of episodes
        learner = trainer.learner
        learner.advantage(rollout)
        batch = next(learner.minibatches(learner._keep_what_is_read(rollout)))
        assert not batch["is_init"][:, 0].all()
        ratio = learner.loss(batch)["max_ratio"]
        torch.testing.assert_close(ratio, torch.ones(()), rtol=0, atol=1e-5)
        collector.shutdown()


def test_ppo_notes_the_returns_of_whole_episodes(tmp_path: Path) -> None:
    ppo, records = tutorial("recurrent_ppo"), tutorial("records")
    settings = read_settings(*SHORT)
    trainer = ppo.Trainer(settings, records.Records(tmp_path, "test"))
    collector = trainer._make_collector()
    ends, going_on = 0, torch.ones(4, dtype=torch.bool)
    for _ in range(4):
        rollout = trainer._collect(collector)
        ends += int(rollout["next", "done"].sum())
        going_on = ~rollout["next", "done"][:, -1, 0]
        torch.testing.assert_close(rollout["next", "reward"], torch.full((4, 32, 1), 0.1))
    # Every step is worth 1, and belongs to an episode that has ended or goes on.
    assert len(trainer.returns) == trainer.episodes == ends > 4
    assert sum(trainer.returns) + trainer.so_far.sum() == 4 * 4 * 32
    assert torch.equal(trainer.so_far > 0, going_on)
    collector.shutdown()


def test_noise_outlasts_a_step_and_no_ratio_tells(tmp_path: Path) -> None:
    ppo, records = tutorial("recurrent_ppo"), tutorial("records")
    argv = ["--env", "Pendulum-v1", "--noise-correlation", "0.8", "--steps", "256"]
    settings = read_settings(*SHORT, *argv)
    trainer = ppo.Trainer(settings, records.Records(tmp_path, "test"))
    collector = trainer._make_collector()
    rollout, learner = trainer._collect(collector), trainer.learner
    noise, starts = rollout["next", "noise"], rollout["is_init"]
    torch.testing.assert_close(
        rollout["noise"][:, 1:][~starts[:, 1:]], noise[:, :-1][~starts[:, 1:]]
    )
    assert starts[:, 1:].any() and not rollout["noise"][starts].any()
    torch.testing.assert_close(
        (rollout["action"] / 2).atanh(),
        rollout["loc"] + rollout["scale"] * noise,
        rtol=0,
        atol=0.01,
    )
    fresh = torch.where(starts, noise, (noise - 0.8 * rollout["noise"]) / 0.6)
    assert 0.8 < fresh.std() < 1.2 and (fresh[:, 1:] * noise[:, :-1]).mean().abs() < 0.3
    learner.advantage(rollout)
    batch = next(learner.minibatches(learner._keep_what_is_read(rollout)))
    torch.testing.assert_close(learner.loss(batch)["max_ratio"], torch.ones(()), rtol=0, atol=1e-4)
    collector.shutdown()


def test_noise_starts_anew_with_an_episode() -> None:
    """And without exploration no action is touched."""
    actor = SimpleNamespace(build_dist_from_params=None)
    starts, old = torch.tensor([[True], [False]]), torch.full((2, 1), 100.0)
    step = TensorDict(is_init=starts, noise=old, action=old, batch_size=[2])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        tutorial("lasting_noise").LastingNoise(actor, 0.8, 1)(step)
    new, going_on = step["next", "noise"].flatten().tolist()
    assert abs(new) < 10 and 70 < going_on < 90
    assert step["action"] is old


def test_noise_is_for_continuous_actions() -> None:
    with pytest.raises(ValueError, match="--noise-correlation is 0.5, and the actions of CartPole"):
        tutorial("recurrent_ppo").Learner(read_settings(*SHORT, "--noise-correlation", "0.5"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--noise-correlation", "1.5"], "--noise-correlation is 1.5: expected at most 1"),
        (["--minibatch-steps", "100"], "expected a multiple of --seq-len, 64"),
        (["--num-envs", "3", "--processes", "2"], "expected a multiple of --processes, 2"),
        (["--epochs", "0"], "--epochs is 0: expected at least 1"),
        (["--env", "FrozenLake-v1"], "it is not known which entries are positions in FrozenLake"),
        (["--resume", "nowhere.pt"], "--resume is nowhere.pt: no such file"),
    ],
)
def test_ppo_refuses_bad_options(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tutorial("recurrent_ppo").main(argv)
    assert message in capsys.readouterr().err


def test_ppo_does_not_resume_other_networks(run: Main, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("recurrent_ppo", *SHORT)
    with pytest.raises(SystemExit):
        run("recurrent_ppo", "--resume", str(folder / "checkpoint.pt"), "--cell", "gru")
    assert "--cell is 'gru', but the checkpoint was made with 'lstm'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_positions_are_what_is_seen(name: str) -> None:
    environments = tutorial("environments")
    env = environments.make_env(name, "positions", 3)
    check_env_specs(env)
    full = environments.make_env(name, "all", 3)
    seen = [one.set_seed(5) and one.reset()["observation"] for one in (env, full)]
    kept, scales = environments.POSITIONS[name]
    torch.testing.assert_close(seen[0], seen[1][:, list(kept)] / torch.tensor(scales))


def test_tensorboard_is_asked_for_by_name_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    records = tutorial("records")
    with pytest.raises(SystemExit, match="pip install tensorboard"):
        records.Records(tmp_path, "test", tensorboard=True)


def test_what_is_recorded_goes_to_tensorboard_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    board = SimpleNamespace(add_scalar=lambda *row: seen.append(row), flush=lambda: None)
    records = tutorial("records")
    monkeypatch.setattr(records, "_make_board", lambda folder: board)
    written = records.Records(tmp_path, "test", tensorboard=True)
    written.add(frames=7, loss=0.5)
    assert seen == [("frames", 7, 7), ("loss", 0.5, 7)]
