"""The REINFORCE tutorial, run with small budgets. ``make learn`` measures that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.modules import OneHotCategorical

from rnnkeys import get_env_transforms_from_module, set_recurrent_mode
from tests.support.tutorials import (
    NEEDS_SIGNALS,
    ROOT,
    assert_exits,
    assert_fails,
    assert_same,
    interrupt_script,
    load_tutorial,
    read_checkpoint,
    read_result,
    read_rows,
)

SCRIPT = ROOT / "tutorials" / "recurrent_reinforce.py"
SHORT = ["--episodes", "12", "--num-envs", "4", "--hidden-size", "8"]

pytestmark = pytest.mark.usefixtures("signal_handlers")
tutorial = load_tutorial("recurrent_reinforce")
Run = Callable[..., Path]


def play_episodes(num_envs: int, **arguments: Any) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    args = tutorial.Args(hidden_size=8, **arguments)
    env = tutorial.make_env(args, num_envs)
    policy, critic = tutorial.make_networks(args, env)
    actor = tutorial.TensorDictSequential([policy, critic])
    env.append_transform(get_env_transforms_from_module(actor))
    env.set_seed(0)
    return policy, *tutorial.play(env, actor)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--broken"],
        ["--observation", "auto"],
        ["--cell", "lstm", "--broken"],
        ["--cell", "feed_forward"],
        ["--env", "FrozenLake-v1"],
    ],
    ids=["gru", "broken", "positions", "lstm, broken", "feed_forward", "frozen lake"],
)
def test_run_writes_all_files(run: Run, argv: list[str]) -> None:
    folder = run(*SHORT, *argv)
    rows, result = read_rows(folder), read_result(folder)
    assert len(rows) == result["episodes"] == 12
    assert all(math.isfinite(value) for row in rows for value in row.values())
    mean = sum(row["return"] for row in rows) / len(rows)
    assert rows[-1]["mean_of_last_100"] == pytest.approx(mean) == result["last_100"]
    assert len(result["test_returns"]) == 20
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_play_masks_steps_after_the_end_of_an_episode() -> None:
    _, episodes, returns = play_episodes(4)
    mask, done = episodes["collector", "mask"], episodes["next", "done"].squeeze(-1)
    lengths = returns.long().tolist()
    assert len(set(lengths)) > 1 and max(lengths) == episodes.shape[1]
    for row, length in enumerate(lengths):
        assert mask[row].tolist() == [t < length for t in range(episodes.shape[1])]
        assert done[row].nonzero()[0].item() == length - 1
    assert episodes["is_init"][:, 0].all()
    assert episodes["action"][..., 0].float().std() > 0  # drawn, not always the likeliest


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_as_single_steps_zeroes_every_state_and_keeps_actions(cell: str) -> None:
    _, episodes, _ = play_episodes(2, cell=cell)
    steps = tutorial.as_single_steps(episodes)
    assert steps.shape == (episodes.numel(), 1) and steps["is_init"].all()
    names = {"gru": ["state"], "lstm": ["state_h", "state_c"]}[cell]
    for key in [f"{network}_{name}" for network in ("policy", "critic") for name in names]:
        assert episodes[key].any() and not steps[key].any()
    assert torch.equal(steps["action"], episodes["action"].reshape(-1, 1, 2))


def test_unrolled_episodes_have_the_logits_that_were_played_and_single_steps_do_not() -> None:
    policy, episodes, _ = play_episodes(4)
    steps = tutorial.as_single_steps(episodes)
    with torch.no_grad(), set_recurrent_mode(True):
        unrolled = policy.get_dist(episodes.clone()).logits
        alone = policy.get_dist(steps.clone()).logits.reshape(unrolled.shape)
    mask = episodes["collector", "mask"]
    played = OneHotCategorical(logits=episodes["logits"]).logits
    torch.testing.assert_close(unrolled[mask], played[mask])
    assert (alone - played)[mask].abs().max() > 1e-3


def test_resume_repeats_the_uninterrupted_run_bit_by_bit(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tutorial.main([*SHORT, "--output", str(whole)])
    tutorial.main([*SHORT, "--episodes", "8", "--output", str(parts)])
    tutorial.main(["--resume", str(parts / "checkpoint.pt"), "--episodes", "12"])
    for key in ("loss", "optimizer", "returns"):
        assert_same(read_checkpoint(parts)[key], read_checkpoint(whole)[key])
    assert read_result(parts)["test_returns"] == read_result(whole)["test_returns"]


@pytest.mark.parametrize("entry", ["loss", "returns", "seconds"])
def test_resume_without_an_entry_fails_and_deletes_nothing(
    run: Run, entry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run(*SHORT) / "checkpoint.pt"
    checkpoint = read_checkpoint(path.parent)
    del checkpoint[entry]
    torch.save(checkpoint, path)
    message = f"written by another version of this program.*KeyError, '{entry}'"
    assert_fails(capsys, message, lambda: tutorial.main(["--resume", str(path)]))
    assert read_result(path.parent)


def test_run_stops_when_the_target_is_reached(run: Run) -> None:
    folder = run(*SHORT, "--episodes", "400", "--target", "5", "--num-envs", "50")
    assert len(read_rows(folder)) == 100


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--broken", "--cell", "feed_forward"], "--broken: a feed-forward network has no states"),
        (["--episodes", "0"], "--episodes is 0: expected at least 1"),
        (["--gamma", "nan"], "--gamma is nan: expected a number from 0 to 1"),
        (["--env", "Pendulum-v1"], "Pendulum-v1 has the action space Box.*: expected Discrete"),
        (["--hide", "9"], "expected some of the entries 0 to 3"),
        (["--resume", "nowhere.pt"], "--resume is nowhere.pt: expected a checkpoint"),
    ],
)
def test_main_with_a_bad_value_raises(
    run: Run,
    argv: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(tutorial, "play")
    assert_fails(capsys, message, lambda: run(*argv))


def test_main_with_an_abbreviated_option_raises(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_exits(capsys, "--episode", lambda: run("--episode", "3"))


def test_run_in_a_folder_with_a_run_needs_resume_or_overwrite(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(*SHORT)
    saved = (folder / "checkpoint.pt").read_bytes()
    message = r"contains a run. Continue it with --resume .*--overwrite"
    assert_fails(capsys, message, lambda: run(*SHORT, "--seed", "1"))
    assert (folder / "checkpoint.pt").read_bytes() == saved
    assert_fails(
        capsys,
        "--seed must be 0, as in",
        lambda: tutorial.main(["--resume", str(folder / "checkpoint.pt"), "--seed", "1"]),
    )


@pytest.mark.usefixtures("broken_env")
@pytest.mark.parametrize(
    ("entry", "message"),
    [("observation", "entry 1 of an observation of .* is nan"), ("reward", "reward of .* is nan")],
)
def test_run_with_nan_from_the_environment_names_the_entry(
    run: Run, entry: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    env = f"Broken-v0(entry='{entry}')"
    assert_fails(capsys, message, lambda: run(*SHORT, "--env", env))


@NEEDS_SIGNALS
def test_script_after_a_signal_saves_the_run_and_resumes(tmp_path: Path) -> None:
    out = interrupt_script(SCRIPT, [*SHORT, "--episodes", "10000000"], tmp_path)
    count = len(read_checkpoint(tmp_path / "out")["returns"])
    assert f"Stopped after {count} episodes. Continue: --resume out/checkpoint.pt" in out
    assert len(read_rows(tmp_path / "out")) == count
    argv = ["--resume", str(tmp_path / "out" / "checkpoint.pt"), "--episodes", str(count + 4)]
    tutorial.main(argv)
    assert len(read_rows(tmp_path / "out")) == count + 4
