"""The recurrent-QMIX tutorial, run with small budgets. ``make learn`` measures that it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrl.envs.utils import check_env_specs

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
)

SCRIPT = ROOT / "tutorials" / "recurrent_qmix.py"
SMALL = [
    *("--num-envs", "4", "--batch-frames", "32", "--warmup", "64", "--slices", "4"),
    *("--hidden-size", "8", "--eval-every", "64", "--eval-episodes", "4"),
]
SHORT = [*SMALL, "--frames", "128"]

pytestmark = pytest.mark.usefixtures("signal_handlers")
tutorial = load_tutorial("recurrent_qmix")
Run = Callable[..., Path]


def make_doors(num_envs: int = 6, **arguments: Any) -> Any:
    env = tutorial.Password(num_envs, **arguments)
    env.set_seed(0)
    return env


@pytest.mark.filterwarnings("ignore")
def test_password_fits_its_specs() -> None:
    check_env_specs(make_doors(3))


def test_password_shows_each_agent_its_own_word_once() -> None:
    data = make_doors(6, agents=3, words=4).rollout(40, break_when_any_done=False)
    heard = data["agents", "observation"][..., :4]
    starts = torch.ones(6, 40, dtype=torch.bool)
    starts[:, 1:] = data["next", "done"][:, :-1, 0]
    assert starts[:, 1:].any(1).all()
    assert (heard[starts].sum(-1) == 1).all() and not heard[~starts].any()
    password = data["state"][..., :-1].unflatten(-1, (3, 4))
    assert torch.equal(heard[starts], password[starts])
    assert (password[:, 1:] == password[:, :-1])[~starts[:, 1:]].all()
    assert len(password[starts].argmax(-1).unique(dim=0)) > 10


def test_password_asks_all_agents_at_once_after_a_varying_time() -> None:
    data = make_doors(64).rollout(30, break_when_any_done=False)
    asked = data["agents", "observation"][..., -1]
    assert torch.equal(asked.amin(-1), asked.amax(-1))
    assert torch.equal(asked[..., 0].bool(), data["next", "done"][..., 0])
    waits = asked[..., 0].argmax(1)
    assert (waits.min(), waits.max()) == tutorial.Password.WAIT


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_password_rewards_only_all_right_words(wrong: int) -> None:
    env = make_doors(6)
    step = env.reset()
    password = env.password.clone()
    for _ in range(env.WAIT[1] + 1):
        said = password.clone()
        said[:, :wrong] = 1 - said[:, :wrong]
        asked = step["agents", "observation"][:, :1, -1]
        step["agents", "action"] = said
        step = env.step(step)["next"]
        assert torch.equal(step["reward"], asked * (wrong == 0))
        assert torch.equal(step["done"], asked.bool())


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--own"],
        ["--cell", "lstm", "--lmbda", "0"],
        ["--cell", "feed_forward"],
        ["--cell", "feed_forward", "--own"],
        ["--own", "--agents", "2", "--words", "3"],
    ],
    ids=" ".join,
)
def test_run_writes_all_files(run: Run, argv: list[str]) -> None:
    assert_complete(run(*SHORT, *argv), [64, 128])


@pytest.mark.parametrize("own", [False, True])
def test_make_policy_shares_weights_unless_they_are_own(own: bool) -> None:
    args = tutorial.Args(own=own, hidden_size=8)
    policy = tutorial.make_policy(args)
    recurrent = [name for name, _ in policy.named_parameters() if "weight_hh" in name]
    assert len(recurrent) == (3 if own else 1)
    assert tutorial.evaluate(args, policy, 5, seed=0).isfinite().all()


def test_resume_with_more_frames_continues(run: Run) -> None:
    folder = run(*SHORT)
    before = read_rows(folder)
    tutorial.main(["--resume", str(folder / "checkpoint.pt"), "--frames", "256"])
    rows = read_rows(folder)
    assert rows[:2] == before and [row["frames"] for row in rows] == [64, 128, 192, 256]
    assert rows[-1]["epsilon"] < rows[1]["epsilon"] < 1


def test_resume_restores_the_saved_state(run: Run) -> None:
    folder = run(*SHORT)
    saved, path = read_checkpoint(folder), str(folder / "checkpoint.pt")
    tutorial.main(["--resume", path])
    saved["args"]["resume"] = path
    assert_same(read_checkpoint(folder), saved)


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
        "--own must be False, as in",
        lambda: tutorial.main(["--resume", str(folder / "checkpoint.pt"), "--own"]),
    )
    run(*SHORT, "--own", "--overwrite")
    assert read_result(folder)["args"]["own"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--words", "1"], "--words is 1: expected at least 2"),
        (["--agents", "0"], "--agents is 0: expected at least 1"),
        (["--batch-frames", "100"], "--batch-frames: expected a multiple of --num-envs"),
        (["--warmup", "100"], "--warmup is 100: expected at least 512"),
        (["--frames", "2000"], "--frames is 2000: expected at least 2001"),
        (["--tau", "2"], "--tau is 2.0: expected a number from 0 to 1"),
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
    monkeypatch.delattr(tutorial, "Collector")  # before anything is collected
    assert_fails(capsys, message, lambda: run(*argv))


def test_main_with_an_abbreviated_option_raises(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_exits(capsys, "--agent", lambda: run("--agent", "3"))


@pytest.mark.parametrize("key", ["state", "reward"])
def test_run_with_nan_from_the_environment_names_the_entry(
    run: Run, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = tutorial.Collector.next

    def break_entry(collector: Any) -> Any:
        data = collect(collector)
        data["next", key][1, 3] = float("nan")
        return data

    monkeypatch.setattr(tutorial.Collector, "next", break_entry)
    with pytest.raises(ValueError, match=rf"entry \('next', '{key}'\) is not finite"):
        run(*SHORT)


@NEEDS_SIGNALS
def test_script_after_a_signal_saves_the_run(tmp_path: Path) -> None:
    out = interrupt_script(SCRIPT, [*SMALL, "--frames", "10000000"], tmp_path)
    frames = read_checkpoint(tmp_path / "out")["frames"]
    assert f"Stopped after {frames} frames" in out
    assert len(read_rows(tmp_path / "out")) == frames // 64
