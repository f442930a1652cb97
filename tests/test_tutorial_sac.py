"""The recurrent-SAC tutorial, run with small budgets as a reader would run it.

That it learns to swing the pendulum up takes minutes, and is measured by ``make learn``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase

from .support.shared_tutorials import (
    assert_complete,
    gradient_steps,
    make_trainer,
    read_checkpoint,
    read_rows,
)

SCRIPT = Path(__file__).parents[1] / "tutorials" / "recurrent_sac.py"
# Episodes have 200 steps: those of the 4 environments end before the first evaluation.
SHORT = [
    *("--frames", "1792", "--num-envs", "4", "--batch-frames", "128", "--updates", "1"),
    *("--warmup", "256", "--slices", "4", "--slice-len", "12", "--burn-in", "4"),
    *("--hidden-size", "8", "--head-size", "8", "--eval-every", "896", "--eval-episodes", "2"),
]

pytestmark = pytest.mark.usefixtures("tutorial")
Run = Callable[..., Path]


@pytest.mark.parametrize("layer", [["--cell", "gru"], ["--cell", "lstm"], ["--memoryless"]])
def test_a_run_leaves_its_files(run: Run, layer: list[str]) -> None:
    folder = run(*SHORT, *layer)
    assert_complete(folder, [896, 1792])
    assert gradient_steps(read_checkpoint(folder)) == 13


def test_resume_goes_on(run: Run) -> None:
    folder = run(*SHORT)
    rows, before = read_rows(folder), read_checkpoint(folder)
    run("--resume", str(folder / "checkpoint.pt"), "--frames", "2688")
    assert_complete(folder, [896, 1792, 2688])
    assert read_rows(folder)[:2] == rows
    after = read_checkpoint(folder)
    assert after["settings"] == {**before["settings"], "frames": 2688}
    assert gradient_steps(after) == 13 + 6  # the buffer is filled again first


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--burn-in", "32"], "--burn-in is 32: expected less than --slice-len, 32"),
        (["--alpha", "0"], "--alpha is 0.0: expected more"),
        (["--env", "Ant-v5"], "it is not known which entries are positions in Ant-v5"),
        (["--env", "CartPole-v1"], "expected continuous actions, and CartPole-v1 has"),
        (["--env", "Pendulum-v9", "--observation", "all"], "--env is Pendulum-v9: "),
        (["--frames", "1600"], "--frames is 1600: expected more than --warmup, 1600"),
        (["--batch-frames", "30"], "expected a multiple of --num-envs, 8"),
        (["--observation", "pixels"], "invalid choice: 'pixels'"),
    ],
)
def test_bad_options_are_refused(
    tutorial: ModuleType, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tutorial.main(argv)
    assert message in capsys.readouterr().err


@pytest.fixture
def trainer(tutorial: ModuleType, tmp_path: Path) -> Any:
    return make_trainer(tutorial, tmp_path, *SHORT)


def draw(trainer: Any, folder: Path, rounds: int = 4) -> TensorDictBase:
    """Collect, and draw sequences ``[slices, slice_len]``."""
    replay = import_module("replay").make_replay(
        trainer.settings, str(folder / str(trainer.frames)), trainer.draws
    )
    collector = trainer.make_collector()
    for _ in range(rounds):
        trainer.collect(collector, replay)
    batch = replay.sample().reshape(trainer.settings.slices, -1)
    collector.shutdown()
    replay.shutdown()
    return batch


def loss_of(trainer: Any, batch: TensorDictBase) -> torch.Tensor:
    torch.manual_seed(0)  # the same actions are drawn
    with torch.no_grad():
        losses = trainer.learner.find_losses(batch.clone())
    return torch.stack([losses["loss_actor"], losses["loss_qvalue"]])


def test_nothing_is_learned_from_the_burn_in(trainer: Any, tmp_path: Path) -> None:
    """Its rewards do not count; its observations do, through the memories that they warm up."""
    batch = draw(trainer, tmp_path)
    before = loss_of(trainer, batch)
    batch["next", "reward"][:, :4] += 100
    assert torch.equal(loss_of(trainer, batch), before)
    batch["next", "reward"][:, 4] += 100
    assert not torch.equal(loss_of(trainer, batch), before)
    batch = draw(trainer, tmp_path)
    before = loss_of(trainer, batch)
    batch["observation"][:, 2] += 1
    assert not torch.equal(loss_of(trainer, batch), before)


def test_the_actor_starts_from_the_states_it_had(trainer: Any, tmp_path: Path) -> None:
    batch = draw(trainer, tmp_path)
    before = loss_of(trainer, batch)
    for key in ("actor_h", ("next", "actor_h")):
        changed = batch.clone()
        changed[key][:, 0] += 1
        assert not torch.equal(loss_of(trainer, changed), before)


def test_an_action_changes_no_later_value(trainer: Any, tmp_path: Path) -> None:
    """Otherwise the loss would ask what a sequence of other actions is worth, seeing the old."""
    batch = draw(trainer, tmp_path).select("observation", "action", "is_init")
    critic = trainer.learner.loss.qvalue_network
    params = trainer.learner.loss.qvalue_network_params[0]
    with torch.no_grad(), params.to_module(critic), import_module("rnnkeys").set_recurrent_mode():
        value = critic(batch.clone())["state_action_value"]
        batch["action"][:, 5] += 1
        changed = critic(batch)["state_action_value"] != value
    assert changed[:, 5].all()
    assert not changed[:, :5].any() and not changed[:, 6:].any()


def test_cut_episodes_are_not_taken_for_terminated(trainer: Any) -> None:
    """Their last step knows the observation that they were cut at, and bootstraps from it."""
    trainer.settings.batch_frames = 4 * 210
    data = trainer.make_collector().next()
    assert data["next", "done"][:, 199].all() and not data["next", "terminated"].any()
    moved = (data["next", "observation"] - data["observation"]).abs().amax((-1, -2))
    assert (moved < 2.5).all()  # it turns by less than 0.4 in a step, and that is magnified
    assert data["is_init"][:, 200].all()
    jumped = (data["observation"][:, 200] - data["next", "observation"][:, 199]).abs()
    assert (jumped > 0.01).any()
