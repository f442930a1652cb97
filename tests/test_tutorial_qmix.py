"""The recurrent-QMIX tutorial: its environment, short runs as a reader would run them, learning."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrl.envs.utils import check_env_specs

SCRIPT = Path(__file__).parents[1] / "tutorials" / "recurrent_qmix.py"
SHORT = [
    *("--num-envs", "4", "--batch-frames", "32", "--warmup", "64", "--slices", "4"),
    *("--frames", "128", "--eval-every", "64", "--eval-episodes", "4"),
]

pytestmark = pytest.mark.usefixtures("tutorial")
Run = Callable[..., Path]


def make_doors(num_envs: int = 6, **arguments: Any) -> Any:
    env = import_module("password").Password(num_envs, **arguments)
    env.set_seed(0)
    return env


def read_rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "learning_curve.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.mark.filterwarnings("ignore")
def test_the_environment_keeps_its_specs():
    check_env_specs(make_doors(3))


def test_an_agent_is_told_its_word_once_and_no_other_one():
    env = make_doors(6, agents=3, words=4)
    data = env.rollout(40, break_when_any_done=False)
    heard = data["agents", "observation"][..., :4]
    starts = torch.ones(6, 40, dtype=torch.bool)
    starts[:, 1:] = data["next", "done"][:, :-1, 0]
    assert starts[:, 1:].any(1).all()
    assert (heard[starts].sum(-1) == 1).all() and not heard[~starts].any()
    password = data["state"][..., :-1].unflatten(-1, (3, 4))
    assert torch.equal(heard[starts], password[starts])
    assert (password[:, 1:] == password[:, :-1])[~starts[:, 1:]].all()
    assert len(password[starts].argmax(-1).unique(dim=0)) > 10


def test_all_are_asked_at_once_after_a_while_that_differs():
    env = make_doors(64)
    data = env.rollout(30, break_when_any_done=False)
    asked = data["agents", "observation"][..., -1]
    assert torch.equal(asked.amin(-1), asked.amax(-1))
    assert torch.equal(asked[..., 0].bool(), data["next", "done"][..., 0])
    waits = asked[..., 0].argmax(1)
    low, high = import_module("password").WAIT
    assert (waits.min(), waits.max()) == (low, high)


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_only_all_words_right_open_the_door(wrong):
    env = make_doors(6)
    step = env.reset()
    password = env.password.clone()
    for _ in range(import_module("password").WAIT[1] + 1):
        said = password.clone()
        said[:, :wrong] = 1 - said[:, :wrong]
        asked = step["agents", "observation"][:, :1, -1]
        step["agents", "action"] = said
        step = env.step(step)["next"]
        assert torch.equal(step["reward"], asked * (wrong == 0))
        assert torch.equal(step["done"], asked.bool())


@pytest.mark.parametrize(
    "options", [[], ["--own"], ["--cell", "lstm"], ["--memoryless"], ["--own", "--agents", "2"]]
)
def test_a_short_run_leaves_all_files(run: Run, options: list[str]):
    folder = run(*SHORT, *options)
    assert [row["frames"] for row in read_rows(folder)] == [64, 128]
    result = json.loads((folder / "result.json").read_text())
    assert len(result["test_returns"]) == 20
    assert (folder / "learning_curve.png").stat().st_size > 1000


def test_a_run_goes_on_where_it_stopped(run: Run):
    folder = run(*SHORT)
    before = read_rows(folder)
    checkpoint = str(folder / "checkpoint.pt")
    run("--resume", checkpoint, "--frames", "256")
    rows = read_rows(folder)
    assert rows[:2] == before and [row["frames"] for row in rows] == [64, 128, 192, 256]
    assert rows[-1]["epsilon"] < rows[1]["epsilon"] < 1


def test_weights_of_other_agents_are_refused(run: Run, capsys: pytest.CaptureFixture[str]):
    folder = run(*SHORT)
    with pytest.raises(SystemExit):
        run("--resume", str(folder / "checkpoint.pt"), "--own")
    assert "--own is True, but the checkpoint was made with False" in capsys.readouterr().err
