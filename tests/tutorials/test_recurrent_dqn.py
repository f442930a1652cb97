"""The recurrent-DQN tutorial, run with small budgets. ``make learn`` measures that it learns."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from rnnkeys import get_env_transforms_from_module, set_recurrent_mode
from tests.support.odd_environments import masked_id
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

SCRIPT = ROOT / "tutorials" / "recurrent_dqn.py"
SMALL = ["--warmup", "256", "--slices", "8", "--slice-len", "8", "--eval-episodes", "4"]
SHORT = [*SMALL, "--hidden-size", "16", "--frames", "1024", "--eval-every", "512"]

pytestmark = pytest.mark.usefixtures("signal_handlers")
tutorial = load_tutorial("recurrent_dqn")
Run = Callable[..., Path]


def count_gradient_steps(checkpoint: dict[str, Any]) -> int:
    return int(checkpoint["optimizer"]["state"][0]["step"])


@pytest.mark.parametrize(
    "options", ["", "--cell gru --lmbda 0", "--cell lstm_ln --gamma 0", "--cell feed_forward"]
)
def test_run_with_each_cell_writes_all_files(
    run: Run, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(*SHORT, *options.split())
    assert_complete(folder, [512, 1024])
    assert count_gradient_steps(read_checkpoint(folder)) == 4 * (1024 - 256 + 128) // 128
    out, bar = capsys.readouterr()
    assert f"mean return {read_result(folder)['test_return']:.1f} over 20 new episodes" in out
    for shown in ("1024/1024", "frames/s", "training_return=", "loss=", "epsilon="):
        assert shown in bar


@pytest.mark.parametrize(
    ("env", "size"), [("FrozenLake-v1", 16), ("Blackjack-v1", 45), ("Acrobot-v1", 6)]
)
def test_make_policy_of_other_environment_reads_all_entries(env: str, size: int) -> None:
    args = tutorial.Args(env=env, hidden_size=8)
    policy = tutorial.make_policy(args, tutorial.make_env(args, 1))
    assert policy[1].lstm.input_size == size
    assert tutorial.evaluate(args, policy, 2, seed=0).isfinite().all()


def test_evaluate_cuts_episodes_that_do_not_end() -> None:
    args = tutorial.Args(env="CliffWalking-v1", hidden_size=8, max_episode_steps=3)
    policy = tutorial.make_policy(args, tutorial.make_env(args, 1))
    assert (tutorial.evaluate(args, policy, 2, seed=0) <= -3).all()


def test_make_env_of_cart_pole_hides_velocities_unless_all_is_observed() -> None:
    for seed in range(3):
        everything, positions = (
            tutorial.make_env(tutorial.Args(observation=observation), 2)
            for observation in ("all", "auto")
        )
        for env in (everything, positions):
            env.set_seed(seed)
        expected = everything.reset()["observation"][:, [0, 2]] / torch.tensor([0.24, 0.02095])
        torch.testing.assert_close(positions.reset()["observation"], expected)


def test_make_policy_of_images_encodes_them() -> None:
    args = tutorial.Args(observation="pixels", hidden_size=8)
    env = tutorial.make_env(args, 2)
    policy = tutorial.make_policy(args, env)
    assert policy[1].lstm.input_size == 512
    env.append_transform(get_env_transforms_from_module(policy))
    assert policy(env.reset())["action_value"].isfinite().all()


def test_resume_with_more_frames_continues(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "runs" / "recurrent_dqn" / "result.json"
    other.parent.mkdir(parents=True)
    other.touch()
    folder = run(*SHORT)
    before, rows = read_checkpoint(folder), read_rows(folder)
    monkeypatch.chdir(tmp_path)  # where a run in the default output must stay
    tutorial.main(["--resume", str(folder / "checkpoint.pt"), "--frames", "2048"])
    after = read_checkpoint(folder)
    assert other.exists()
    assert_complete(folder, [512, 1024, 1536, 2048])
    assert read_rows(folder)[:2] == rows
    new = {"frames": 2048, "resume": str(folder / "checkpoint.pt")}
    assert after["args"] == {**before["args"], **new}
    # The buffer starts empty: the first gradient steps follow the warmup.
    assert count_gradient_steps(after) - count_gradient_steps(before) == 4 * 7
    assert after["explore"]["eps"] == pytest.approx(1 - 0.98 * 2048 / 15_000, abs=1e-4)
    assert after["episodes"] > before["episodes"]


def test_resume_of_a_finished_run_tests_the_same_weights(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(*SHORT)
    before, result = read_checkpoint(folder), read_result(folder)
    tutorial.main(["--resume", str(folder / "checkpoint.pt")])
    assert "This run is finished: a larger --frames continues it" in capsys.readouterr().out
    assert_same(read_checkpoint(folder)["loss"], before["loss"])
    assert read_result(folder)["test_returns"] == result["test_returns"]


def test_resume_restores_the_saved_state(run: Run) -> None:
    folder = run(*SHORT)
    saved, path = read_checkpoint(folder), str(folder / "checkpoint.pt")
    tutorial.main(["--resume", path])
    saved["args"]["resume"] = path
    assert_same(read_checkpoint(folder), saved)


def test_run_with_one_seed_repeats_itself(tmp_path: Path) -> None:
    rows = []
    for name in ("a", "b"):
        tutorial.main([*SHORT, "--output", str(tmp_path / name)])
        rows.append([{**row, "seconds": 0.0} for row in read_rows(tmp_path / name)])
    assert_same(rows[0], rows[1])


def test_run_in_a_folder_with_a_run_needs_resume_or_overwrite(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(*SHORT)
    saved = (folder / "checkpoint.pt").read_bytes()
    message = r"contains a run. Continue it with --resume .*--overwrite"
    assert_fails(capsys, message, lambda: run(*SHORT, "--seed", "1"))
    assert_fails(capsys, "doesn't exist", lambda: run(*SHORT, "--env", "Nowhere-v0", "--overwrite"))
    assert (folder / "checkpoint.pt").read_bytes() == saved
    run(*SHORT, "--seed", "1", "--overwrite")
    assert read_checkpoint(folder)["args"]["seed"] == 1
    assert read_result(folder)["args"]["seed"] == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cell", "gru"], "--cell must be lstm, as in"),
        (["--env", "Acrobot-v1"], "--env must be CartPole-v1, as in"),
        (["--seed", "3"], "--seed must be 0, as in"),
        (["--output", "elsewhere"], "--output must be "),
    ],
)
def test_resume_of_another_run_raises(
    run: Run, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(*SMALL, "--hidden-size", "8", "--frames", "257", "--eval-episodes", "1")
    assert_fails(
        capsys, message, lambda: tutorial.main(["--resume", str(folder / "checkpoint.pt"), *argv])
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--resume", "nowhere.pt"], "--resume is nowhere.pt: expected a checkpoint"),
        (["--resume", str(SCRIPT)], "expected a checkpoint of this program"),
        (["--batch-frames", "100"], "--batch-frames: expected a multiple of --num-envs"),
        (["--warmup", "100"], "--warmup is 100: expected at least 1024"),
        (["--updates", "0"], "--updates is 0: expected at least 1"),
        (["--frames", "1000", "--warmup", "9"], "--frames is 1000: expected at least 1025"),
        (["--frames", "2000"], "--frames is 2000: expected at least 2001"),
        (["--gamma", "1.5"], "--gamma is 1.5: expected a number from 0 to 1"),
        (["--env", "Pendulum-v1"], "Pendulum-v1 has the action space Box.*: expected Discrete"),
        (["--env", "Nowhere-v0"], "Nowhere-v0 cannot be made: .*doesn't exist"),
        (["--hide", "4"], r"hide is \(4,\): expected some of the entries 0 to 3"),
    ],
)
def test_main_with_a_bad_value_raises(
    tmp_path: Path,
    argv: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(tutorial, "Collector")  # before anything is collected
    assert_fails(capsys, message, lambda: tutorial.main([*argv, "--output", str(tmp_path)]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--frame", "3"], "--frame"),
        (["--cell", "esn"], "esn"),
        (["--frames", "many"], "--frames"),
    ],
)
def test_main_with_an_unknown_option_raises(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_exits(capsys, message, lambda: tutorial.main(argv))


@pytest.mark.parametrize("content", [{"weights": 1}, {"args": {"smell": 1}}, None])
def test_resume_of_another_file_raises(
    tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint.pt"
    if content is None:
        path.touch()
    else:
        torch.save(content, path)
    assert_fails(capsys, "expected a checkpoint", lambda: tutorial.main(["--resume", str(path)]))


@NEEDS_SIGNALS
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_script_after_a_signal_saves_the_run(tmp_path: Path, number: signal.Signals) -> None:
    argv = [*SMALL, "--frames", "10000000", "--eval-every", "512"]
    out = interrupt_script(SCRIPT, argv, tmp_path, number)
    checkpoint = read_checkpoint(tmp_path / "out")
    assert f"Stopped after {checkpoint['frames']} frames" in out
    assert "--resume out/checkpoint.pt" in out
    assert len(read_rows(tmp_path / "out")) == checkpoint["frames"] // 512


def test_script_in_another_folder_runs(tmp_path: Path) -> None:
    process = start_script(SCRIPT, SHORT, tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert_complete(tmp_path / "runs" / "recurrent_dqn", [512, 1024])


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


def test_run_with_infinite_loss_names_it(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert_fails(
        capsys, "the entry 'loss' is (nan|inf) after", lambda: run(*SHORT, "--reward-scale", "1e38")
    )


class PushTowardsTheLean(nn.Module):
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        right = tensordict["observation"][..., 1] > 0
        return tensordict.set("action", torch.stack([~right, right], -1).long())


@pytest.mark.parametrize("num_envs", [1, 3])
def test_evaluate_returns_the_returns_of_first_episodes(num_envs: int) -> None:
    args, policy = tutorial.Args(), PushTowardsTheLean()
    draws = torch.get_rng_state()
    returns = tutorial.evaluate(args, policy, num_envs, seed=7)
    assert torch.equal(torch.get_rng_state(), draws)
    env = tutorial.make_env(args, num_envs)
    env.set_seed(7)
    done = env.rollout(150, policy, break_when_any_done=False)["next", "done"]
    first_end = done.reshape(num_envs, -1).int().argmax(-1)
    assert len(set(returns.tolist())) == num_envs  # equal lengths would hide a mix-up
    torch.testing.assert_close(returns, first_end + 1.0)


def test_run_samples_sequences_with_the_states_of_the_policy(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unrolled from its first stored state, a sampled sequence gives every other stored state."""
    batches: list[tuple[Any, TensorDictBase]] = []

    def keep(learner: Any, batch: TensorDictBase, _: float) -> float:
        batches.append((learner, batch))
        return 0.0

    monkeypatch.setattr(tutorial.Learner, "learn", keep)
    argv = ["--slice-len", "32", "--warmup", "512", "--frames", "1024", "--eval-episodes", "1"]
    run(*SHORT, *argv)
    policy = batches[0][0].policy
    batch: Any = batches[0][1]
    starts = batch["is_init"].clone()
    assert starts[:, 0].all() and starts[:, 1:].any() and not starts[:, 1:].all()
    states = ["recurrent_state_h", "recurrent_state_c"]
    step: Any = batch[:, 0].select("observation", "is_init", *states)
    step["is_init"] = torch.zeros_like(step["is_init"])  # the sampler's flag: no episode starts
    for t in range(1, 32):
        with torch.no_grad(), set_recurrent_mode(False):
            policy(step)
        inside: Tensor = ~starts[:, t, 0]
        for key in states:
            torch.testing.assert_close(step["next", key][inside], batch[key][inside, t])
            assert not batch[key][~inside, t].any()
        step = batch[:, t].select("observation", "is_init", *states)
        step["is_init"] = starts[:, t]


def test_run_of_an_environment_with_action_masks_plays_allowed_actions(run: Run) -> None:
    folder = run(*SHORT, "--env", masked_id("entry", "Choice"))
    assert read_result(folder)["frames"] == 1024  # the environment raises at any other action


def test_readme_example_plays_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tutorial.main([*SHORT, "--output", str(tmp_path / "demo")])
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [example] = [block for block in blocks if "demo/checkpoint.pt" in block]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "tutorials"))
    exec(example, {})
    assert "poles fell in 499 steps of 8 environments" in capsys.readouterr().out
