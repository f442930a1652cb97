"""Training runs that are stopped and continued, and their files."""

from __future__ import annotations

import csv
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from rnnkeys import runs


@dataclass
class Args:
    output: str
    size: int = 3
    seed: int = 0
    gamma: float = 0.9
    resume: str | None = None
    overwrite: bool = False
    logger: str | None = None


def read(*argv: str, fixed: tuple[str, ...] = ()) -> tuple[Args, dict[str, Any]]:
    return runs.read_args(Args, list(argv), fixed=fixed)


def save_run(folder: Path, **args: Any) -> runs.Run:
    run = runs.Run(Args(str(folder), **args), {}, policy=nn.Linear(2, 1))
    run.record(torch.tensor([1.0, 3.0]))
    run.save()
    return run


def test_read_args_after_resume_takes_the_arguments_and_the_folder_of_the_run(
    tmp_path: Path,
) -> None:
    save_run(tmp_path / "old", size=7)
    (tmp_path / "old").rename(tmp_path / "moved")
    path = str(tmp_path / "moved" / "checkpoint.pt")
    args, checkpoint = read("--resume", path, "--gamma", "0.5", "--output", str(tmp_path / "moved"))
    assert (args.size, args.gamma, args.output) == (7, 0.5, str(tmp_path / "moved"))
    assert checkpoint["best"] == {"return": 2.0, "frames": 0}


def test_read_args_of_another_run_raises(tmp_path: Path) -> None:
    save_run(tmp_path)
    path = str(tmp_path / "checkpoint.pt")
    with pytest.raises(runs.RunError, match="--size must be 3, as in"):
        read("--resume", path, "--size", "4", "--output", str(tmp_path), fixed=("size",))
    with pytest.raises(runs.RunError, match="--output must be"):
        read("--resume", path, "--output", "elsewhere")
    with pytest.raises(runs.RunError, match="contains a run. Continue it with --resume"):
        read("--output", str(tmp_path))
    with pytest.raises(runs.RunError, match="--resume continues .* choose one"):
        read("--resume", path, "--output", str(tmp_path), "--overwrite")
    assert read("--output", str(tmp_path), "--overwrite")[1] == {}


@pytest.mark.parametrize("content", [None, {"weights": 1}, {"args": {"unknown": 1}}])
def test_read_args_with_another_file_raises(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "file.pt"
    if content is None:
        path.write_text("no checkpoint")
    else:
        torch.save(content, path)
    with pytest.raises(runs.RunError, match=r"--resume is .*: expected a checkpoint"):
        read("--resume", str(path), "--output", str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "--size is 0: expected at least 1"),
        ({"seed": -1}, "--seed is -1: expected at least 0"),
        ({"gamma": 1.5}, "--gamma is 1.5: expected a number from 0 to 1"),
        ({"gamma": float("nan")}, "--gamma is nan"),
    ],
)
def test_check_ranges_with_a_bad_value_raises(changes: dict[str, Any], message: str) -> None:
    runs.check_ranges(Args("runs", size=1, seed=0, gamma=1.0), gamma=(0, 1))
    with pytest.raises(runs.RunError, match=message):
        runs.check_ranges(Args("runs", **changes), gamma=(0, 1))


STOPS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture
def _handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@STOPS
@pytest.mark.usefixtures("_handlers")
def test_catch_signals_sets_the_event_and_a_second_signal_ends_the_program(
    number: signal.Signals,
) -> None:
    [other] = {signal.SIGINT, signal.SIGTERM} - {number}
    before = signal.getsignal(other)
    with runs.catch_signals() as stop:
        assert not stop.is_set()
        signal.raise_signal(number)
        assert stop.is_set()
        assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) == signal.SIG_DFL  # also while the program saves
    assert signal.getsignal(other) == before


@STOPS
def test_catch_signals_without_a_signal_or_at_a_prompt_restores_handlers(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    with runs.catch_signals():
        assert signal.getsignal(number) != before
    assert signal.getsignal(number) == before
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with runs.catch_signals():
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_run_keeps_the_weights_of_the_best_evaluation(tmp_path: Path) -> None:
    policy = nn.Linear(2, 1)
    run = runs.Run(Args(str(tmp_path)), {}, policy=policy)
    for frames, mean in ((10, 1.0), (20, 5.0), (30, 5.0), (40, 2.0)):
        run.frames = frames
        nn.init.constant_(policy.weight, frames)
        run.record(torch.tensor([mean - 1, mean + 1]), policy, epsilon=0.5)
    assert run.best["frames"] == 30 and (run.best["policy"]["weight"] == 30).all()
    sentence = run.finish(torch.tensor([3.0, 4.0]))
    assert "Weights of frame 30: mean return 3.5 over 2 new episodes" in sentence
    with (tmp_path / "learning_curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["evaluation"] for row in rows] == ["1.0", "5.0", "5.0", "2.0"]
    assert rows[1]["evaluation_min"] == "4.0" and rows[1]["epsilon"] == "0.5"
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["test_returns"] == [3.0, 4.0] and result["best_frames"] == 30


def test_run_from_a_checkpoint_continues(tmp_path: Path) -> None:
    old = save_run(tmp_path)
    done = torch.tensor([[False, True, False]]).unsqueeze(-1)
    entries = {"done": done, "episode_reward": torch.tensor([[1.0, 2.0, 3.0]]).unsqueeze(-1)}
    old.count(TensorDict({"next": TensorDict(entries, [1, 3])}, [1, 3]))
    assert (old.frames, old.episodes, list(old.returns)) == (3, 1, [2.0])
    assert old.summarize() == {"training_return": 2.0}  # no gradient step yet
    old.save(more=5)
    old.finish(torch.ones(1))
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    policy = nn.Linear(2, 1)
    new = runs.Run(old.args, checkpoint, policy=policy)
    assert (new.frames, new.episodes, new.seconds) == (3, 1, old.seconds)
    assert str(new.rows) == str(old.rows)  # with NaN: no episode had ended
    assert torch.equal(policy.weight, old.modules["policy"].weight) and checkpoint["more"] == 5
    assert not (tmp_path / "result.json").exists()  # the run is not finished any more
    assert (tmp_path / "learning_curve.csv").exists()


def test_run_in_a_used_folder_deletes_the_other_run(tmp_path: Path) -> None:
    save_run(tmp_path).finish(torch.ones(1))
    runs.Run(Args(str(tmp_path)), {})
    assert not list(tmp_path.iterdir())


def test_run_with_a_logger_of_torchrl_logs_rows(tmp_path: Path) -> None:
    save_run(tmp_path, logger="csv")
    [scalars] = (tmp_path / "log").rglob("evaluation.csv")
    assert scalars.read_text().strip() == "0,2.0"


@pytest.mark.parametrize("change", ["no rows", "no policy", "other weights"])
def test_run_from_a_checkpoint_of_another_version_raises_in_one_line(
    tmp_path: Path, change: str
) -> None:
    save_run(tmp_path).save()
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    if change == "other weights":
        checkpoint["policy"] = nn.Linear(3, 1).state_dict()
    else:
        del checkpoint[change.removeprefix("no ")]
    with pytest.raises(runs.RunError, match="written by another version") as raised:
        runs.Run(Args(str(tmp_path)), checkpoint, policy=nn.Linear(2, 1))
    assert "\n" not in str(raised.value)
    assert (tmp_path / "learning_curve.csv").exists()  # nothing is deleted


def test_run_that_cannot_write_raises_and_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path)
    run.save()
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def fail(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(runs.RunError, match="cannot be written: PytorchStreamWriter.*--resume"):
        run.save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_make_folder_below_a_file_raises(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(runs.RunError, match="the folder .*file/run cannot be written"):
        runs.make_folder(tmp_path / "file" / "run", resumed=False)
