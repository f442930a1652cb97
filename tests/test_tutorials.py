"""The recurrent-DQN tutorial, run with small budgets as a reader would run it.

That it learns to balance the pole takes minutes, and is measured by ``make learn``.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.envs.utils import check_env_specs

from rnnkeys import set_recurrent_mode

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tutorials" / "recurrent_dqn.py"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

SHORT = ["--warmup", "256", "--slices", "8", "--slice-len", "8", "--eval-episodes", "4"]
POSITIONS = [*SHORT, "--frames", "1024", "--eval-every", "512"]
PIXELS = [
    *("--observation", "pixels", "--num-envs", "2", "--batch-frames", "32", "--warmup", "32"),
    *("--slices", "2", "--slice-len", "8", "--eval-episodes", "2"),
    *("--frames", "96", "--eval-every", "64"),
]

pytestmark = pytest.mark.usefixtures("tutorial")
Run = Callable[..., Path]


def read_rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "learning_curve.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def read_checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def gradient_steps(checkpoint: dict[str, Any]) -> int:
    return int(checkpoint["learner"]["optimizer"]["state"][0]["step"])


def assert_complete(folder: Path, frames: list[int], tested: int = 20) -> None:
    """All files are there, and the records have a row for each of ``frames``."""
    rows = read_rows(folder)
    assert [row["frames"] for row in rows] == frames
    assert all(math.isfinite(value) for row in rows[1:] for value in row.values())
    assert (folder / "learning_curve.png").read_bytes().startswith(PNG_SIGNATURE)
    result = json.loads((folder / "result.json").read_text())
    assert len(result["test_returns"]) == tested
    assert result["test_return"] == pytest.approx(sum(result["test_returns"]) / tested)
    best = max(rows, key=lambda row: (row["evaluation"], row["frames"]))
    assert result["best_frames"] == best["frames"]
    assert result["best_evaluation"] == pytest.approx(best["evaluation"])


@pytest.mark.parametrize("layer", [["--cell", "lstm"], ["--cell", "gru"], ["--memoryless"]])
def test_positions(run: Run, layer: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(*POSITIONS, *layer)
    assert_complete(folder, [512, 1024])
    assert gradient_steps(read_checkpoint(folder)) == 4 * (1024 - 256 + 128) // 128
    out, bar = capsys.readouterr()
    result = json.loads((folder / "result.json").read_text())
    assert f"mean return {result['test_return']:.1f} over 20 fresh episodes" in out
    for shown in ("1024/1024", "frames/s", "return ", "loss ", "epsilon "):
        assert shown in bar


def test_pixels(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("training"), "TEST_EPISODES", 3)  # rendering takes its time
    assert_complete(run(*PIXELS), [64, 96], tested=3)


def test_resume_goes_on(run: Run) -> None:
    folder = run(*POSITIONS)
    before, rows = read_checkpoint(folder), read_rows(folder)
    run("--resume", str(folder / "checkpoint.pt"), "--frames", "2048")
    after = read_checkpoint(folder)
    assert_complete(folder, [512, 1024, 1536, 2048])
    assert read_rows(folder)[:2] == rows
    # The settings are the first run's, but for what was named; the buffer is filled again first.
    assert after["settings"] == {**before["settings"], "frames": 2048}
    assert gradient_steps(after) - gradient_steps(before) == 4 * (1024 - 256 + 128) // 128
    assert after["learner"]["explore"]["eps"] == pytest.approx(1 - 0.98 * 2048 / 15_000, abs=1e-4)
    assert after["episodes"] > before["episodes"]


def test_a_run_stopped_before_any_evaluation_resumes_with_fewer_frames(run: Run) -> None:
    folder = run(*POSITIONS)
    saved = read_checkpoint(folder)
    torch.save({**saved, "best": {"return": -math.inf}, "rows": []}, folder / "checkpoint.pt")
    run("--resume", str(folder / "checkpoint.pt"), "--frames", "512")
    assert read_checkpoint(folder)["best"]["return"] > 0
    assert len(read_rows(folder)) == 1


def test_resumed_state_is_the_saved_state(tutorial: ModuleType, run: Run, tmp_path: Path) -> None:
    saved = read_checkpoint(run(*POSITIONS))
    trainer = make_trainer(tutorial, tmp_path, *POSITIONS)
    trainer.load_state_dict(saved)
    assert_same(trainer.state_dict(), saved)


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b) or isinstance(a, dict)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cell", "gru"], "--cell is 'gru', but the checkpoint was made with 'lstm'"),
        (["--memoryless"], "--memoryless is True, but the checkpoint was made with False"),
    ],
)
def test_resume_refuses_another_network(
    tutorial: ModuleType,
    tmp_path: Path,
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_trainer(tutorial, tmp_path, *POSITIONS).save()
    with pytest.raises(SystemExit):
        tutorial.main(["--resume", str(tmp_path / "checkpoint.pt"), *argv])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--resume", "nowhere.pt"], "--resume is nowhere.pt: no such file"),
        (["--resume", str(SCRIPT)], "expected a checkpoint.pt of this tutorial"),
        (["--batch-frames", "100"], "expected a multiple of --num-envs, 16"),
        (["--warmup", "100"], "--warmup is 100: expected at least --num-envs times --slice-len"),
        (["--frames", "0"], "--frames is 0: expected at least 1"),
        (["--frames", "2000"], "--frames is 2000: expected more than --warmup, 2000"),
        (["--gamma", "1.5"], "--gamma is 1.5: expected at most 1"),
        (["--device", "gpu"], "--device is gpu: torch cannot use it here"),
        (["--output", str(SCRIPT)], f"--output is {SCRIPT}: expected a folder"),
        (["--observation", "smells"], "invalid choice: 'smells'"),
    ],
)
def test_bad_options_are_refused(
    tutorial: ModuleType, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tutorial.main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["no tutorial's", ""])
def test_only_checkpoints_are_resumed(
    tutorial: ModuleType, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint.pt"
    if content:
        torch.save({"weights": content}, path)
    else:
        path.touch()
    with pytest.raises(SystemExit):
        tutorial.main(["--resume", str(path)])
    assert f"--resume is {path}: expected a checkpoint.pt" in capsys.readouterr().err


def test_resuming_a_finished_run_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(*POSITIONS)
    weights = read_checkpoint(folder)["learner"]["loss"]
    capsys.readouterr()
    run("--resume", str(folder / "checkpoint.pt"))
    out, _ = capsys.readouterr()
    assert "1024 of 1024 frames are done" in out and "A larger --frames would go on" in out
    assert_same(read_checkpoint(folder)["learner"]["loss"], weights)
    assert_complete(folder, [512, 1024])


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_everything_written(tmp_path: Path, number: signal.Signals) -> None:
    interrupt(SCRIPT, [*SHORT, "--frames", "10000000", "--eval-every", "512"], tmp_path, number)
    assert len(read_rows(tmp_path)) == read_checkpoint(tmp_path)["frames"] // 512


def interrupt(
    script: Path, argv: list[str], folder: Path, number: signal.Signals = signal.SIGINT
) -> None:
    """Run a tutorial, press Ctrl-C after its first evaluation, and check that all is written."""
    process = subprocess.Popen(
        [sys.executable, str(script), *argv, "--output", str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (folder / "checkpoint.pt").exists():
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert f"Stopped after {read_checkpoint(folder)['frames']} frames" in out
    assert f"--resume {folder / 'checkpoint.pt'}" in out
    assert (folder / "learning_curve.png").read_bytes().startswith(PNG_SIGNATURE)


def make_trainer(tutorial: ModuleType, folder: Path, *argv: str) -> Any:
    command_line, records = import_module("command_line"), import_module("records")
    argv = (*argv, "--output", str(folder))
    settings, _ = command_line.read_settings(tutorial.Settings, argv, "")
    return tutorial.Trainer(settings, records.Records(folder, "test"))


def test_the_readme_plays_the_checkpoint(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(*POSITIONS).joinpath("demo").mkdir()
    (tmp_path / "checkpoint.pt").rename(tmp_path / "demo" / "checkpoint.pt")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [example] = [block for block in blocks if "demo/checkpoint.pt" in block]
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert "poles fell in 499 steps of 8 environments" in capsys.readouterr().out


def test_velocities_are_hidden(tutorial: ModuleType) -> None:
    env = tutorial.make_env("CartPole-v1", "positions", 1)
    check_env_specs(env)
    hide = env.transform
    state = torch.tensor([[1.2, 0.0, 0.2095, 0.0], [1.2, 3.0, 0.2095, -3.0]])
    seen = hide(TensorDict(observation=state, batch_size=[2]))["observation"]
    torch.testing.assert_close(seen, torch.tensor([[0.5, 1.0], [0.5, 1.0]]))


class PushTowardsTheLean(nn.Module):
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        right = tensordict["observation"][..., 1] > 0
        return tensordict.set("action", torch.stack([~right, right], -1).long())


@pytest.mark.parametrize("num_envs", [1, 3])
def test_evaluation_is_the_return_of_the_first_episodes(
    tutorial: ModuleType, num_envs: int
) -> None:
    env, policy = tutorial.make_env("CartPole-v1", "positions", num_envs), PushTowardsTheLean()
    returns = import_module("evaluation").Evaluation(env, policy)(seed=7)
    env.set_seed(7)
    done = env.rollout(150, policy, break_when_any_done=False)["next", "done"]
    first_end = done.reshape(num_envs, -1).int().argmax(-1)
    assert len(set(returns.tolist())) == num_envs  # episodes of one length would hide a mix-up
    torch.testing.assert_close(returns, first_end + 1.0)


def test_sequences_hold_the_states_that_the_policy_had(
    tutorial: ModuleType, tmp_path: Path
) -> None:
    """Unrolled from its first stored state, a drawn sequence gives every other stored state."""
    trainer = make_trainer(tutorial, tmp_path, *POSITIONS, "--slice-len", "32", "--warmup", "512")
    make_replay = import_module("replay").make_replay
    replay = make_replay(trainer.settings, str(tmp_path / "replay"), trainer.draws)
    collector = trainer.make_collector()
    for _ in range(8):
        trainer.collect(collector, replay)
    batch = replay.sample().reshape(8, 32)
    starts = batch["is_init"].clone()
    assert starts[:, 0].all() and starts[:, 1:].any() and not starts[:, 1:].all()
    states = ["recurrent_state_h", "recurrent_state_c"]
    step = batch[:, 0].select("observation", "is_init", *states)
    step["is_init"] = torch.zeros_like(step["is_init"])  # the draw's mark, not an episode's start
    for t in range(1, 32):
        with torch.no_grad(), set_recurrent_mode(False):
            trainer.learner.policy(step)
        goes_on = ~starts[:, t, 0]
        for key in states:
            torch.testing.assert_close(step["next", key][goes_on], batch[key][goes_on, t])
            assert not batch[key][~goes_on, t].any()
        step = batch[:, t].select("observation", "is_init", *states)
        step["is_init"] = starts[:, t]
    replay.shutdown()
    collector.shutdown()
