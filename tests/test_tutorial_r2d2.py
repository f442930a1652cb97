"""The R2D2 tutorial, run with small budgets as a reader would run it.

That it learns takes minutes, and is measured by ``make learn``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from .support.shared_tutorials import (
    PNG_SIGNATURE,
    ROOT,
    assert_same,
    gradient_steps,
    interrupt,
    make_trainer,
    read_checkpoint,
    read_rows,
)

SCRIPT = ROOT / "tutorials" / "r2d2.py"
SHORT = [
    *("--frames", "384", "--eval-every", "128", "--eval-episodes", "2", "--warmup", "128"),
    *("--num-envs", "4", "--batch-frames", "64", "--updates", "2", "--hidden-size", "8"),
    *("--windows", "4", "--window-len", "8", "--period", "4", "--burn-in", "2"),
]

pytestmark = pytest.mark.usefixtures("tutorial")
Run = Callable[..., Path]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--burn-in", "0", "--state", "zero", "--cell", "gru"],
        ["--burn-in", "0", "--state", "refreshed", "--refresh-every", "64"],
        ["--memoryless"],
        ["--alpha", "0", "--cell", "lstm_ln"],
    ],
    ids=" ".join,
)
def test_a_run_leaves_its_files(run: Run, argv: list[str]) -> None:
    folder = run(*SHORT, *argv)
    rows = read_rows(folder)
    assert [row["frames"] for row in rows] == [128, 256, 384]
    assert (folder / "learning_curve.png").read_bytes().startswith(PNG_SIGNATURE)
    assert len(json.loads((folder / "result.json").read_text())["test_returns"]) == 20
    assert gradient_steps(read_checkpoint(folder)) == 2 * 5
    off = [row["staleness_first"] for row in rows]
    assert all(math.isfinite(value) for value in off)
    if "--memoryless" in argv:
        assert not any(off)
    else:
        assert off[1] > 0


@pytest.mark.skipif(importlib.util.find_spec("popgym") is None, reason="needs popgym")
def test_the_memory_task_has_settings_of_its_own(run: Run) -> None:
    task = import_module("r2d2_settings").MEMORY_TASK
    folder = run("--env", task, *SHORT)
    settings = read_checkpoint(folder)["settings"]
    assert settings["observation"] == "all" and settings["gamma"] == 0.5
    assert all(-1 <= row["evaluation"] <= 1 for row in read_rows(folder))


def test_resume_goes_on_with_what_was_saved(run: Run, tutorial: ModuleType, tmp_path: Path) -> None:
    folder = run(*SHORT, "--capacity", "40")
    before, rows = read_checkpoint(folder), read_rows(folder)
    trainer = make_trainer(tutorial, tmp_path, *SHORT, "--capacity", "40")
    trainer.load_state_dict(before)
    again = trainer.state_dict()
    old, new = before["replay"].pop("priorities"), again["replay"].pop("priorities")
    torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-7)
    assert_same(again, before)
    run("--resume", str(folder / "checkpoint.pt"), "--frames", "512")
    after = read_checkpoint(folder)
    assert read_rows(folder)[:3] == rows and len(read_rows(folder)) == 4
    assert after["settings"] == {**before["settings"], "frames": 512}
    assert gradient_steps(after) - gradient_steps(before) == 2 * 2  # without another warm-up
    assert after["episodes"] > before["episodes"]


def test_windows_are_saved_from_the_oldest_on(tutorial: ModuleType, tmp_path: Path) -> None:
    trainer = make_trainer(tutorial, tmp_path, *SHORT, "--capacity", "5")
    for number in range(3):  # 3 windows each: the last ones overwrite the first ones
        stored = torch.arange(3) + 3 * number
        trainer.replay.buffer.extend(TensorDict({"x": stored.float()}, [3]))
    trainer.replay.buffer.update_priority(torch.arange(5), torch.tensor([5.0, 6, 7, 8, 4]))
    saved = trainer.replay.state_dict()
    assert saved["windows"]["x"].tolist() == [4, 5, 6, 7, 8]
    torch.testing.assert_close(saved["priorities"].float(), torch.tensor([4.0, 5, 6, 7, 8]))


def test_states_are_zeros_as_stored_or_refreshed(run: Run, tutorial: ModuleType) -> None:
    folder = run(*SHORT)
    saved = read_checkpoint(folder)
    starts = {}
    for state in ("zero", "stored", "refreshed"):
        argv = ["--resume", str(folder / "checkpoint.pt"), "--state", state, "--windows", "200"]
        trainer = make_trainer(tutorial, folder, *argv)
        trainer.load_state_dict(saved)
        if state == "refreshed":
            trainer.replay.refresh()
        off = trainer.replay.staleness(seed=0)["first"]
        assert (off < 1e-6) == (state == "refreshed")
        windows = trainer.replay.sample()
        starts[state] = windows["recurrent_state_h"][windows["window", "first"] > 0]
    assert not starts["zero"].any()
    assert starts["stored"].any()
    assert not torch.equal(starts["stored"], starts["refreshed"])


def test_environments_explore_less_and_less_from_one_to_the_next(
    tutorial: ModuleType, tmp_path: Path
) -> None:
    argv = ["--actors", "process", "--num-actors", "2"]
    learner = make_trainer(tutorial, tmp_path, *SHORT, *argv).learner
    one, two = (learner.make_explorer(actor)[-1] for actor in range(2))
    rungs = torch.cat([one.epsilons, two.epsilons])
    assert len(rungs) == 4 and (rungs.diff() < 0).all() and rungs[0] == pytest.approx(0.4)
    learner.anneal(7_500)
    assert one.floor == two.floor == 0.5


def test_a_run_without_actors_saves_and_says_so(
    run: Run, tutorial: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make = tutorial.make_collector

    def make_mortal(*args: Any, **kwargs: Any) -> Any:
        collector = make(*args, **kwargs)
        batches = iter([collector.next() for _ in range(4)])

        def following() -> Any:
            for batch in batches:
                return batch
            raise tutorial.ActorsLost("the last one died")

        collector.next = following
        return collector

    monkeypatch.setattr(tutorial, "make_collector", make_mortal)
    with pytest.raises(SystemExit, match="the last one died\nTo go on: --resume .*checkpoint.pt"):
        run(*SHORT)
    saved = read_checkpoint(tmp_path)
    assert saved["frames"] == 256 and gradient_steps(saved) == 2 * 3


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
def test_ctrl_c_leaves_everything_written(tmp_path: Path) -> None:
    interrupt(SCRIPT, [*SHORT, "--frames", "10000000"], tmp_path)
    assert len(read_rows(tmp_path)) == read_checkpoint(tmp_path)["frames"] // 128


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--burn-in", "40"], "--burn-in is 40: expected less than --window-len, 40"),
        (["--period", "41"], "--period is 41: expected at most --window-len, 40"),
        (["--state", "fresh"], "invalid choice: 'fresh'"),
        (["--actors", "thread"], "invalid choice: 'thread'"),
        (["--num-envs", "9", "--actors", "ray"], "expected a multiple of --num-actors, 2"),
        (["--batch-frames", "100"], "expected a multiple of the environments of an actor, 16"),
        (["--frames", "2000"], "--frames is 2000: expected more than --warmup, 2000"),
        (["--eta", "1.5"], "--eta is 1.5: expected at most 1"),
        (["--env", "MountainCar-v0"], "--observation is positions, and those of MountainCar-v0"),
        (["--env", "Pendulum-v1"], "--env is Pendulum-v1: expected discrete actions"),
        (["--env", "CartPole-v9", "--observation", "all"], "--env is CartPole-v9: "),
        (["--env", "nowhere:It-v0", "--observation", "all"], "--env is nowhere:It-v0: "),
    ],
)
def test_bad_options_are_refused(
    tutorial: ModuleType, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tutorial.main(argv)
    assert message in " ".join(capsys.readouterr().err.split())


def test_resume_refuses_other_windows(
    tutorial: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(tutorial, tmp_path, *SHORT).save()
    with pytest.raises(SystemExit):
        tutorial.main(["--resume", str(tmp_path / "checkpoint.pt"), "--window-len", "10"])
    assert "--window-len is 10, but the checkpoint was made with 8" in capsys.readouterr().err
