"""The recurrent-SAC tutorial, run with small budgets as a reader would run it.

That it learns takes minutes, and is measured by ``make learn``.
"""

from __future__ import annotations

import math
import signal
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase

from rnnkeys import set_recurrent_mode
from tests.support.odd_environments import ACTIONS, action_id
from tests.support.tutorials import (
    NEEDS_SIGNALS,
    ROOT,
    assert_exits,
    interrupt_script,
    read_checkpoint,
    read_files,
)

SCRIPT = ROOT / "tutorials" / "recurrent_sac.py"
SMALL = [
    *("--num-envs", "2", "--batch-frames", "32", "--updates", "1", "--warmup", "64"),
    *("--slices", "4", "--slice-len", "12", "--burn-in", "4", "--capacity", "1000"),
    *("--hidden-size", "8", "--net-arch", "8", "--eval-episodes", "2"),
]
SHORT = [*SMALL, "--frames", "512", "--eval-every", "256"]
BOXES = [action_id(name) for name in ACTIONS if name.startswith("Box")]

pytestmark = pytest.mark.usefixtures("signal_handlers")


@pytest.fixture
def sac(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return import_module(SCRIPT.stem)


def gradient_steps(checkpoint: dict[str, Any]) -> int:
    return int(checkpoint["optimizer"]["state"][0]["step"])


@pytest.mark.parametrize(
    "options",
    ["", "--cell lstm --lmbda 0.9", "--cell feed_forward", "--logger csv --frame-stack 2"],
)
def test_main_small_budget_writes_all_files(sac: ModuleType, tmp_path: Path, options: str) -> None:
    sac.main([*SHORT, *options.split(), "--output", str(tmp_path)])
    rows, result, checkpoint = read_files(tmp_path)
    assert [row["frames"] for row in rows] == [256, 512]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert result["test_return"] == pytest.approx(sum(result["test_returns"]) / 2)
    assert result["best_evaluation"] == pytest.approx(max(row["evaluation"] for row in rows))
    assert gradient_steps(checkpoint) == (512 - 64) // 32 + 1


@pytest.mark.parametrize("name", BOXES)
def test_main_any_continuous_space_trains(sac: ModuleType, tmp_path: Path, name: str) -> None:
    tiny = ["--frames", "128", "--eval-every", "128"]
    sac.main([*SMALL, *tiny, "--env", name, "--output", str(tmp_path)])
    rows, result, _ = read_files(tmp_path)
    assert result["test_returns"] == [20, 20] and math.isfinite(rows[0]["loss"])


def test_main_resume_continues_the_run(sac: ModuleType, tmp_path: Path) -> None:
    sac.main([*SHORT, "--output", str(tmp_path)])
    rows, _, before = read_files(tmp_path)
    path = str(tmp_path / "checkpoint.pt")
    sac.main(["--resume", path, "--frames", "768"])
    more, _, after = read_files(tmp_path)
    assert [row["frames"] for row in more] == [256, 512, 768]
    assert str(more[:2]) == str(rows)  # no episode has ended yet: NaN
    assert after["args"] == {**before["args"], "frames": 768, "resume": path}
    # The buffer is filled again first.
    assert gradient_steps(after) == gradient_steps(before) + (256 - 64) // 32 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--burn-in", "32"], "--burn-in is 32: expected a number from 0 to 31"),
        (["--alpha", "0"], "--alpha is 0.0: expected at least 1e-06"),
        (["--env", "CartPole-v1"], "CartPole-v1 has discrete actions, or several: use recurrent_p"),
        (["--env", "OddActionDict-v0"], "OddActionDict-v0 has discrete actions, or several: use"),
        (["--env", "Pendulum-v9"], "environment Pendulum-v9 cannot be made"),
        (["--frames", "1600"], "--frames is 1600: expected at least 1601"),
        (["--batch-frames", "30"], "expected a multiple of --num-envs"),
        (["--observation", "smells"], "--observation"),
        (["--frame", "64"], "--frame"),
        (["--resume", "nowhere.pt"], "--resume is nowhere.pt: expected a checkpoint"),
        (["--env", "OddNaNBox-v0"], "entry 1 of an observation of OddNaNBox-v0 is nan"),
    ],
)
def test_main_bad_option_exits_with_its_name(
    sac: ModuleType,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_exits(capsys, message, lambda: sac.main([*options, "--output", str(tmp_path)]))


def test_main_resume_with_another_network_exits(
    sac: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sac.main([*SHORT, "--output", str(tmp_path)])
    argv = ["--resume", str(tmp_path / "checkpoint.pt"), "--cell", "lstm"]
    assert_exits(capsys, "--cell must be gru, as in", lambda: sac.main(argv))


@pytest.fixture
def learned(
    sac: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, TensorDictBase]:
    """The networks of a short run, and a batch ``[slices, slice_len]`` that they learned from."""
    learn, seen = sac.Learner.learn, []

    def watch(learner: Any, batch: TensorDictBase, progress: float) -> float:
        whole = batch.clone()
        loss = learn(learner, batch, progress)
        seen.append((learner, whole.set("learned", batch["learned"])))
        return loss

    monkeypatch.setattr(sac.Learner, "learn", watch)
    sac.main([*SHORT, "--output", str(tmp_path)])
    return seen[-1]


@pytest.fixture
def learner(learned: tuple[Any, TensorDictBase]) -> Any:
    return learned[0]


@pytest.fixture
def batch(learned: tuple[Any, TensorDictBase]) -> TensorDictBase:
    return learned[1]


def loss_of(learner: Any, batch: TensorDictBase) -> torch.Tensor:
    torch.manual_seed(0)  # the same actions are drawn
    with torch.no_grad():
        losses = learner.loss(batch.clone())
    return torch.stack([losses["loss_actor"], losses["loss_qvalue"]])


def test_loss_reward_in_burn_in_does_not_count(learner: Any, batch: TensorDictBase) -> None:
    before = loss_of(learner, batch)
    batch["next", "reward"][:, :4] += 100
    assert torch.equal(loss_of(learner, batch), before)
    batch["next", "reward"][:, 4] += 100
    assert not torch.equal(loss_of(learner, batch), before)


def test_loss_observation_in_burn_in_prepares_states(learner: Any, batch: TensorDictBase) -> None:
    before = loss_of(learner, batch)
    batch["observation"][:, 2] += 1
    assert not torch.equal(loss_of(learner, batch), before)


def test_loss_actor_starts_from_its_stored_states(learner: Any, batch: TensorDictBase) -> None:
    before = loss_of(learner, batch)
    batch["actor_state"][:, 0] += 1
    assert not torch.equal(loss_of(learner, batch), before)
    assert "critic_state" not in batch


def test_critic_action_changes_no_later_value(learner: Any, batch: TensorDictBase) -> None:
    batch = batch.select("observation", "action", "is_init")
    critic = learner.loss.qvalue_network
    params = learner.loss.qvalue_network_params[0]
    with torch.no_grad(), params.to_module(critic), set_recurrent_mode():
        value = critic(batch.clone())["state_action_value"]
        batch["action"][:, 5] += 1
        changed = critic(batch)["state_action_value"] != value
    assert changed[:, 5].all()
    assert not changed[:, :5].any() and not changed[:, 6:].any()


@NEEDS_SIGNALS
def test_script_copied_elsewhere_saves_at_a_signal(tmp_path: Path) -> None:
    argv = [
        *SMALL,
        "--env",
        "MountainCarContinuous-v0",
        "--frames",
        "1000000",
        "--eval-every",
        "64",
    ]
    out = interrupt_script(SCRIPT, argv, tmp_path, signal.SIGTERM)
    assert "Continue: --resume out" in out
    assert read_checkpoint(tmp_path / "out")["frames"] > 0
