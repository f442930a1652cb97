"""The recurrent-PPO tutorial, run with small budgets as a reader would run it.

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

from rnnkeys.cells import LRU
from tests.support.odd_environments import (
    ACTIONS,
    OBSERVATIONS,
    action_id,
    masked_id,
    observation_id,
)
from tests.support.tutorials import (
    NEEDS_SIGNALS,
    ROOT,
    assert_exits,
    interrupt_script,
    read_checkpoint,
    read_files,
)

SCRIPT = ROOT / "tutorials" / "recurrent_ppo.py"
SMALL = [
    *("--num-envs", "2", "--steps", "16", "--seq-len", "8", "--minibatch-steps", "16"),
    *("--epochs", "2", "--hidden-size", "8", "--net-arch", "8", "--eval-episodes", "2"),
]
SHORT = [*SMALL, "--frames", "64", "--eval-every", "32"]

pytestmark = pytest.mark.usefixtures("signal_handlers")


@pytest.fixture
def ppo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return import_module(SCRIPT.stem)


@pytest.fixture
def make_trainer(ppo: ModuleType, tmp_path: Path) -> Any:
    def make(*argv: str) -> Any:
        args, _ = ppo.read_args([*SHORT, *argv, "--output", str(tmp_path)])
        return ppo.Trainer(args, {})

    return make


@pytest.mark.parametrize(
    "options",
    [
        "--cell lstm --refresh",
        "--cell gru --critic shared --lmbda 0",
        "--cell lstm_ln --num-layers 2 --activation gelu",
        "--cell feed_forward",
        "--critic feed_forward --ortho-init --activation relu --net-arch 8 4",
        "--normalize-observation --normalize-reward --frame-stack 3",
        "--lr-schedule constant --clip-schedule constant --clip-value 0.2 --target-kl 0.01",
        "--hide 3 --entropy 0.01 --wrappers gymnasium.wrappers:RepeatAction(num_repeats=2)",
        "--env Pendulum-v1 --noise-correlation 0.5 --eval-every 64",
        "--env Pendulum-v1 --sde --sde-sample-freq 4 --no-squash --eval-every 64",
        "--env FrozenLake-v1(is_slippery=False) --logger csv",
        "--env tests.support.odd_environments:OddOneStep-v0",
    ],
)
def test_main_small_budget_writes_all_files(ppo: ModuleType, tmp_path: Path, options: str) -> None:
    ppo.main([*SHORT, *options.split(), "--output", str(tmp_path)])
    rows, result, checkpoint = read_files(tmp_path)
    assert rows[-1]["frames"] == result["frames"] == checkpoint["frames"] == 64
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert result["test_return"] == pytest.approx(sum(result["test_returns"]) / 2)
    assert result["args"]["epochs"] == 2


ODD = [*map(observation_id, OBSERVATIONS), *map(action_id, ACTIONS)]


@pytest.mark.parametrize("name", ODD)
def test_main_any_space_trains(ppo: ModuleType, tmp_path: Path, name: str) -> None:
    tiny = ["--frames", "32", "--eval-every", "32", "--epochs", "1", "--minibatch-steps", "32"]
    ppo.main([*SMALL, *tiny, "--env", name, "--output", str(tmp_path)])
    rows, result, _ = read_files(tmp_path)
    assert result["test_returns"] == [20, 20] and math.isfinite(rows[0]["loss"])


@pytest.mark.parametrize("name", ["Choices", "Binary"])
def test_agent_discrete_actions_all_are_played(make_trainer: Any, name: str) -> None:
    trainer = make_trainer("--env", action_id(name), "--frames", "320", "--num-envs", "8")
    learn, played = trainer.learn, []

    def watch(rollout: Any) -> None:
        played.append(rollout["action"].flatten(0, 1))
        learn(rollout)

    trainer.learn = watch
    trainer.train()
    assert len(torch.cat(played).unique(dim=0)) == {"Choices": 6, "Binary": 8}[name]


@pytest.mark.parametrize("options", ["", "--critic shared", "--normalize-observation --cell gru"])
def test_learn_first_minibatch_has_ratio_one(make_trainer: Any, options: str) -> None:
    """Ratios are those of the actions as they were played, in the midst of episodes too."""
    trainer = make_trainer(*options.split())
    seen = []
    loss = trainer.loss

    def watch(batch: Any) -> Any:
        terms = loss(batch)
        seen.append((terms["max_ratio"].item(), bool(batch["is_init"][:, 0].all())))
        return terms

    watch.in_keys, watch.parameters, watch.clip_epsilon = (  # pyright: ignore[reportFunctionMemberAccess]
        loss.in_keys,
        loss.parameters,
        loss.clip_epsilon,
    )
    trainer.loss = watch
    trainer.train()
    per_rollout = len(seen) // 2
    for ratio, _ in (seen[0], seen[per_rollout]):
        assert ratio == pytest.approx(1, abs=1e-5)
    assert seen[1][0] != pytest.approx(1, abs=1e-5)  # the weights have changed
    assert not all(starts for _, starts in seen[per_rollout:])


def test_scale_rewards_counts_returns_of_whole_episodes(make_trainer: Any) -> None:
    trainer = make_trainer("--frames", "640")
    learn, steps = trainer.learn, []

    def watch(rollout: Any) -> None:
        torch.testing.assert_close(rollout["next", "reward"], torch.full((2, 16, 1), 0.1))
        steps.append(rollout.numel())
        learn(rollout)

    trainer.learn = watch
    trainer.train()
    # Every step is worth 1, and belongs to an episode that has ended or to an unfinished one.
    assert len(trainer.run.returns) == trainer.run.episodes > 4
    assert sum(trainer.run.returns) + trainer.unfinished[0].sum() == sum(steps)


def test_scale_rewards_normalized_divides_by_deviation_of_returns(make_trainer: Any) -> None:
    from tensordict import TensorDict

    trainer = make_trainer("--normalize-reward", "--gamma", "0.5", "--reward-scale", "1")
    reward = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, -2.0]])
    done = torch.tensor([[False, True, False], [False, False, False]])
    data = {"reward": reward.unsqueeze(-1), "done": done.unsqueeze(-1)}
    rollout = TensorDict({"next": TensorDict(data, [2, 3])}, [2, 3])
    trainer.scale_rewards(rollout)
    returns = torch.tensor([1, 2.5, 3, 4, 2, -1])
    want = reward / returns.std(correction=0)
    torch.testing.assert_close(rollout["next", "reward"].squeeze(-1), want)
    assert list(trainer.run.returns) == [3]


def test_main_resume_continues_the_run(ppo: ModuleType, tmp_path: Path) -> None:
    ppo.main([*SHORT, "--normalize-observation", "--output", str(tmp_path)])
    rows, _, before = read_files(tmp_path)
    ppo.main(["--resume", str(tmp_path / "checkpoint.pt"), "--frames", "128"])
    more, result, after = read_files(tmp_path)
    assert [row["frames"] for row in more] == [32, 64, 96, 128]
    assert more[:2] == rows
    changed = {"frames": 128, "resume": str(tmp_path / "checkpoint.pt")}
    assert after["args"] == {**before["args"], **changed}
    assert {k: v for k, v in result["args"].items() if k in changed} == changed
    steps = [one["optimizer"]["state"][0]["step"] for one in (before, after)]
    assert steps == [8, 16]
    assert after["agent"]["norm.count"] == 2 * before["agent"]["norm.count"]


def test_trainer_checkpoint_restores_everything(
    ppo: ModuleType, make_trainer: Any, tmp_path: Path
) -> None:
    first = make_trainer("--normalize-reward")
    first.train()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again = ppo.Trainer(first.args, saved)
    again.run.save()
    restored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved.keys() == restored.keys()
    for name in ("frames", "episodes", "seconds", "rows", "args"):
        assert restored[name] == saved[name]
    for name in ("agent", "return_norm"):
        for key, value in saved[name].items():
            assert torch.equal(restored[name][key], value)


def test_main_in_a_folder_with_a_run_needs_resume_or_overwrite(
    ppo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ppo.main([*SHORT, "--output", str(tmp_path)])
    argv = [*SHORT, "--seed", "1", "--output", str(tmp_path)]
    assert_exits(capsys, "contains a run. Continue it with --resume", lambda: ppo.main(argv))
    ppo.main([*argv, "--overwrite"])
    assert read_files(tmp_path)[1]["args"]["seed"] == 1


def test_trainer_gives_the_cell_its_options_and_minibatches_theirs(make_trainer: Any) -> None:
    options = ("--cell", "lru", "--cell-options", "block", "plain", "max_radius", "0.95")
    trainer = make_trainer(*options, "--critic", "feed_forward", "--no-normalize-advantage")
    cell = trainer.agent.actor[0][0].cell
    assert isinstance(cell, LRU) and cell.max_radius == 0.95
    assert not trainer.minibatches.normalize_advantage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frame", "64"], "--frame"),
        (["--cell", "esn"], "--cell"),
        (
            ["--noise-correlation", "1.5"],
            "--noise-correlation is 1.5: expected a number from 0 to 1",
        ),
        (["--epochs", "0"], "--epochs is 0: expected at least 1"),
        (["--minibatch-steps", "100"], "expected a multiple of --seq-len, 64"),
        (["--sde"], "the actions of CartPole-v1 are discrete"),
        (["--cell-options", "speed", "2"], "--cell is lstm, --cell-options is {'speed': 2.0}: "),
        (["--env", "Nowhere-v0"], "environment Nowhere-v0 cannot be made"),
        (["--env", "OddSequence-v0"], "has the observation space Sequence"),
        (["--env", "OddActionText-v0"], "has the action space Text"),
        (["--hide", "9"], "hide is (9,): expected some of the entries 0 to 3"),
        (["--resume", "nowhere.pt"], "--resume is nowhere.pt: expected a checkpoint"),
        (["--resume", str(SCRIPT)], "expected a checkpoint of this program"),
        (
            ["--env", "OddNaN-v0", "--eval-episodes", "2"],
            "entry 1 of an observation of OddNaN-v0 is nan",
        ),
        (["--env", "OddNaNReward-v0"], "a reward of OddNaNReward-v0 is nan"),
    ],
)
def test_main_bad_option_exits_with_its_name(
    ppo: ModuleType,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_exits(capsys, message, lambda: ppo.main([*options, "--output", str(tmp_path)]))


def test_main_resume_with_another_network_exits(
    ppo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ppo.main([*SHORT, "--output", str(tmp_path)])
    argv = ["--resume", str(tmp_path / "checkpoint.pt"), "--cell", "gru"]
    assert_exits(capsys, "--cell must be lstm, as in", lambda: ppo.main(argv))


def test_learn_loss_not_finite_stops_with_its_name(make_trainer: Any) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        for parameter in trainer.agent.critic.parameters():
            parameter.fill_(1e30)
    with pytest.raises(ValueError, match="advantage|value_target|loss_critic"):
        trainer.train()


@NEEDS_SIGNALS
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_script_copied_elsewhere_saves_at_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    """The file alone is copied, with another environment, and stopped while it trains."""
    argv = [*SMALL, "--env", "FrozenLake-v1", "--frames", "10000000", "--eval-every", "64"]
    out = interrupt_script(SCRIPT, argv, tmp_path, number)
    assert "Continue: --resume out" in out
    checkpoint = read_checkpoint(tmp_path / "out")
    assert checkpoint["frames"] > 0 and not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize("name", ["Choice", "Choices"])
def test_run_of_an_environment_with_action_masks_plays_allowed_actions(
    ppo: ModuleType, tmp_path: Path, name: str
) -> None:
    ppo.main([*SHORT, "--env", masked_id("entry", name), "--output", str(tmp_path)])
    assert read_files(tmp_path)[1]["frames"] == 64  # the environment raises at any other action


def test_run_of_an_environment_with_several_actions_plays_and_learns(
    ppo: ModuleType, tmp_path: Path
) -> None:
    ppo.main([*SHORT, "--env", "OddActionDict-v0", "--output", str(tmp_path)])
    assert read_files(tmp_path)[1]["frames"] == 64
