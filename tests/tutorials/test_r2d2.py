"""The R2D2 tutorial, run with small budgets. ``make learn`` measures that it learns."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.experiments import EXPERIMENTS
from rnnkeys.cells import LRU
from rnnkeys.collectors import ActorsLostError, LocalActors
from tests.support import odd_environments
from tests.support.tutorials import (
    NEEDS_SIGNALS,
    ROOT,
    assert_complete,
    assert_exits,
    assert_fails,
    assert_same,
    interrupt_script,
    load_tutorial,
    read_checkpoint,
    read_result,
    read_rows,
    start_script,
)

SCRIPT = ROOT / "tutorials" / "r2d2.py"
SMALL = [
    *("--warmup", "128", "--num-envs", "4", "--batch-frames", "64", "--updates", "2"),
    *("--windows", "4", "--window-len", "8", "--period", "4", "--burn-in", "2"),
    *("--hidden-size", "8", "--eval-episodes", "2", "--eval-every", "128"),
]
SHORT = [*SMALL, "--frames", "384"]

pytestmark = pytest.mark.usefixtures("signal_handlers")
tutorial = load_tutorial("r2d2")
Run = Callable[..., Path]


def make_learner(folder: Path, *argv: str) -> Any:
    args, _ = tutorial.read_args([*argv, "--output", str(folder / "new")])
    return tutorial.Learner(args, {})


def load_learner(saved: dict[str, Any], **changes: Any) -> Any:
    learner = tutorial.Learner(tutorial.Args(**{**saved["args"], **changes}), saved)
    learner.make_run(saved)
    return learner


def count_gradient_steps(checkpoint: dict[str, Any]) -> int:
    return int(checkpoint["optimizer"]["state"][0]["step"])


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--burn-in", "0", "--state", "zero", "--cell", "gru"],
        ["--burn-in", "0", "--state", "refreshed", "--refresh-every", "64"],
        ["--alpha", "0", "--cell", "lstm_ln", "--target-period", "3", "--decay", "constant"],
    ],
    ids=" ".join,
)
def test_run_writes_all_files(
    run: Run, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(*SHORT, *argv)
    assert_complete(folder, [128, 256, 384])
    assert count_gradient_steps(read_checkpoint(folder)) == 2 * 5
    assert read_rows(folder)[1]["staleness_first"] > 0
    out, bar = capsys.readouterr()
    assert f"mean return {read_result(folder)['test_return']:.1f} over 20 new episodes" in out
    for shown in ("384/384", "frames/s", "training_return=", "loss=", "epsilon=", "lag="):
        assert shown in bar


def test_run_of_the_feed_forward_baseline_has_no_staleness(run: Run) -> None:
    folder = run(*SHORT, "--cell", "feed_forward")
    assert_complete(folder, [128, 256, 384])
    assert not any(row["staleness_first"] for row in read_rows(folder)[1:])


@pytest.mark.parametrize("name", ["Image", "Dict", "Discrete", "Float64"])
def test_run_in_other_observation_spaces_learns(run: Run, name: str) -> None:
    folder = run(*SMALL, "--frames", "192", "--env", odd_environments.observation_id(name))
    assert count_gradient_steps(read_checkpoint(folder)) == 2 * 2


def test_run_with_one_seed_repeats_itself(tmp_path: Path) -> None:
    rows = []
    for name in ("a", "b"):
        tutorial.main([*SHORT, "--output", str(tmp_path / name)])
        rows.append([{**row, "seconds": 0.0} for row in read_rows(tmp_path / name)])
    assert_same(rows[0], rows[1])


def test_resume_with_more_frames_continues(run: Run) -> None:
    folder = run(*SHORT)
    before, rows = read_checkpoint(folder), read_rows(folder)
    tutorial.main(["--resume", str(folder / "checkpoint.pt"), "--frames", "512"])
    after = read_checkpoint(folder)
    assert_complete(folder, [128, 256, 384, 512])
    assert read_rows(folder)[:3] == rows
    # The replay buffer is restored: no second warmup.
    assert count_gradient_steps(after) - count_gradient_steps(before) == 2 * 2
    assert after["trajectories"] > before["trajectories"] > 0


@pytest.mark.parametrize("capacity", ["40", "1000"])
def test_resume_restores_the_saved_state(run: Run, tmp_path: Path, capacity: str) -> None:
    folder = run(*SHORT, "--capacity", capacity)
    saved = read_checkpoint(folder)
    assert len(saved["replay"]["priorities"]) <= int(capacity)
    learner = load_learner(saved)
    learner.save(learner.make_run(saved))
    again = read_checkpoint(folder)
    old, new = saved["replay"].pop("priorities"), again["replay"].pop("priorities")
    torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-7)
    assert_same(again, saved)


def test_resume_without_the_replay_buffer_raises(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(*SHORT)
    saved = read_checkpoint(folder)
    del saved["replay"]
    torch.save(saved, folder / "checkpoint.pt")
    argv = ["--resume", str(folder / "checkpoint.pt"), "--frames", "512"]
    message = "written by another version.*KeyError, 'replay"
    assert_fails(capsys, message, lambda: tutorial.main(argv))
    assert read_result(folder)


def test_resume_that_stops_early_leaves_no_old_result(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(*SHORT)
    monkeypatch.setattr(tutorial, "train", lambda *_: None)
    tutorial.main(["--resume", str(folder / "checkpoint.pt"), "--frames", "512"])
    assert "Stopped after 384 frames" in capsys.readouterr().out
    assert not (folder / "result.json").exists() and len(read_rows(folder)) == 3
    run(*SHORT, "--overwrite")
    assert not (folder / "learning_curve.csv").exists()
    assert read_checkpoint(folder)["frames"] == 0


def test_learn_starts_windows_from_zero_or_stored_states(run: Run, tmp_path: Path) -> None:
    saved = read_checkpoint(run(*SHORT))
    for state in ("zero", "stored"):
        one = load_learner(saved, state=state, windows=200)
        seen = []
        one.loss.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        one.learn()
        inside = seen[0]["window", "first"] > 0
        assert seen[0]["recurrent_state_h"][inside].any() == (state == "stored")


def test_learner_gives_the_cell_its_options(tmp_path: Path) -> None:
    options = ["--cell", "lru", "--cell-options", "block", "plain", "max_radius", "0.95"]
    cell = make_learner(tmp_path, *options).policy[1].cell
    assert isinstance(cell, LRU)  # and no residual block around it
    assert cell.max_radius == 0.95


def test_learner_and_explorer_take_greedy_returns_and_first_visits(tmp_path: Path) -> None:
    one = make_learner(tmp_path, *SHORT, "--greedy-returns", "--first-visits", "5")
    assert one.loss.greedy_returns
    explorer = tutorial.make_explorer(one.args, one.policy, one.epsilon_floor, 0)[-1]
    assert explorer.first_visits == 5


def test_make_explorer_gives_each_actor_its_part_of_the_ladder(tmp_path: Path) -> None:
    one = make_learner(tmp_path, *SHORT, "--actors", "process", "--num-actors", "2")
    explorers = [
        tutorial.make_explorer(one.args, one.policy, one.epsilon_floor, actor)[-1]
        for actor in range(2)
    ]
    rates = torch.cat([explorer.epsilons for explorer in explorers])
    assert len(rates) == 4 and (rates.diff() < 0).all() and rates[0] == pytest.approx(0.4)
    one.anneal(7_500)
    assert explorers[0].floor == explorers[1].floor == 0.5


@pytest.mark.parametrize(
    ("exploration", "rate"),
    [("linear", 0.5), ("exponential", 0.05 + 0.9 * math.exp(-0.5))],
)
def test_anneal_follows_the_exploration_schedule(
    tmp_path: Path, exploration: str, rate: float
) -> None:
    argv = ["--exploration", exploration, "--epsilon", "0.05", "--epsilon-start", "0.95"]
    one = make_learner(tmp_path, *SHORT, *argv, "--epsilon-frames", "1000")
    one.anneal(500)
    explorer = tutorial.make_explorer(one.args, one.policy, one.epsilon_floor, 0)[-1]
    assert explorer.floor.item() == pytest.approx(rate) and not explorer.epsilons.any()


def test_run_with_a_target_period_copies_the_network_at_once(run: Run, tmp_path: Path) -> None:
    saved = read_checkpoint(run(*SHORT, "--decay", "constant"))
    one = load_learner(saved, target_period=3)

    def is_equal() -> bool:
        online, target = one.loss.value_network_params, one.loss.target_value_network_params
        return bool((online.data == target.data).all())

    equal = []
    for _ in range(6):
        one.learn()
        equal.append(is_equal())
    assert equal == [False, False, True, False, False, True]


def test_run_without_actors_saves_and_says_so(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    collect, batches = LocalActors.next, []

    def collect_four(actors: LocalActors) -> Any:
        if len(batches) == 4:
            raise ActorsLostError("Actor 1 is lost, and no other is left")
        batches.append(collect(actors))
        return batches[-1]

    monkeypatch.setattr(LocalActors, "next", collect_four)
    assert_fails(capsys, "Actor 1 is lost, and no other is left", lambda: run(*SHORT))
    saved = read_checkpoint(tmp_path)
    assert saved["frames"] == 256 and count_gradient_steps(saved) == 2 * 3


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("OddNaN-v0", "an observation of OddNaN-v0 is nan"),
        ("OddNaNReward-v0", "a reward of OddNaNReward-v0 is nan"),
    ],
)
def test_run_with_nan_from_the_environment_names_it(
    run: Run, env: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_fails(capsys, message, lambda: run(*SHORT, "--env", env))


def test_run_with_infinite_loss_names_the_remedy(run: Run) -> None:
    with pytest.raises(ValueError, match="The loss .*is not finite .*Scale rewards down"):
        run(*SHORT, "--reward-scale", "1e38")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--burn-in", "40"], "--burn-in is 40: expected a number from 0 to 39"),
        (["--period", "41"], "--period is 41: expected a number from 1 to 40"),
        (["--num-actors", "2"], "--num-actors is 2: --actors local expects 1"),
        (["--actors", "ray", "--num-actors", "3"], "--num-envs is 16: expected a multiple"),
        (["--batch-frames", "100"], "--batch-frames: expected a multiple of --num-envs"),
        (["--eta", "1.5"], "--eta is 1.5: expected a number from 0 to 1"),
        (["--windows", "0"], "--windows is 0: expected at least 1"),
        (["--hide", "7"], r"hide is \(7,\): expected some of the entries 0 to 3"),
        (["--env", "Pendulum-v1"], r"action space Box.*expected Discrete"),
        (["--env", odd_environments.action_id("Choices")], "action space MultiDiscrete"),
        (["--env", odd_environments.action_id("Binary")], "action space MultiBinary"),
        (["--env", "CartPole-v9"], "CartPole-v9"),
        (["--env", "nowhere:It-v0"], "nowhere"),
        (["--cell-options", "speed", "2"], r"--cell-options is {'speed': 2.0}: .*speed"),
        (["--resume", str(SCRIPT)], "expected a checkpoint of this program"),
    ],
)
def test_main_with_a_bad_value_raises_and_writes_nothing(
    tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_fails(capsys, message, lambda: tutorial.main([*argv, "--output", str(tmp_path)]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["--frame", "3"], ["--cell", "esn"], ["--actors", "thread"]])
def test_main_with_an_unknown_option_raises(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_exits(capsys, argv[-2], lambda: tutorial.main(argv))


@pytest.mark.parametrize(
    "argv",
    [
        argv
        for experiment in EXPERIMENTS.values()
        if experiment.script == "r2d2"
        for argv in experiment.variants.values()
    ],
)
def test_read_args_of_each_experiment_accepts_it(argv: list[str], tmp_path: Path) -> None:
    args, _ = tutorial.read_args([*argv, "--output", str(tmp_path)])
    assert args.hide == ((1, 3) if args.env == "CartPole-v1" else None)


def test_run_in_a_folder_with_a_run_needs_resume_or_overwrite(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(*SHORT)
    saved = (folder / "checkpoint.pt").read_bytes()
    message = "contains a run. Continue it with --resume .*--overwr"
    assert_fails(capsys, message, lambda: run(*SHORT, "--seed", "1"))
    assert_fails(capsys, "Nowhere", lambda: run(*SHORT, "--env", "Nowhere-v0", "--overwrite"))
    argv = ["--resume", str(folder / "checkpoint.pt"), "--window-len", "10"]
    assert_fails(capsys, "--window-len must be 8, as in", lambda: tutorial.main(argv))
    assert (folder / "checkpoint.pt").read_bytes() == saved
    run(*SHORT, "--seed", "1", "--overwrite")
    assert read_result(folder)["args"]["seed"] == 1


@NEEDS_SIGNALS
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_script_after_a_signal_saves_the_run(tmp_path: Path, number: signal.Signals) -> None:
    out = interrupt_script(SCRIPT, [*SMALL, "--frames", "10000000"], tmp_path, number)
    checkpoint = read_checkpoint(tmp_path / "out")
    assert f"Stopped after {checkpoint['frames']} frames" in out
    assert "--resume out/checkpoint.pt" in out
    assert len(read_rows(tmp_path / "out")) == checkpoint["frames"] // 128


@NEEDS_SIGNALS
def test_script_after_kill_leaves_no_temporary_file_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, folder = tmp_path / "tmp", tmp_path / "out"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = start_script(SCRIPT, [*SMALL, "--frames", "10000000", "--output", "out"], tmp_path)
    while process.poll() is None and not (folder / "checkpoint.pt").exists():
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    assert not list(temporary.iterdir())
    end = read_checkpoint(folder)["frames"] + 128
    tutorial.main(["--resume", str(folder / "checkpoint.pt"), "--frames", str(end)])
    assert_complete(folder, list(range(128, end + 1, 128)))


def test_script_in_another_folder_collects_with_processes(tmp_path: Path) -> None:
    argv = [*SHORT, "--actors", "process", "--num-actors", "2"]
    process = start_script(SCRIPT, argv, tmp_path)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    folder = tmp_path / "runs" / "r2d2"
    assert_complete(folder, [128, 256, 384])
    assert read_rows(folder)[-1]["lag"] >= 1


def test_run_of_an_environment_with_action_masks_plays_allowed_actions(run: Run) -> None:
    folder = run(*SHORT, "--env", odd_environments.masked_id("entry", "Choice"))
    assert read_result(folder)["frames"] == 384  # the environment raises at any other action
