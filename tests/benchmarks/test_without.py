"""What benchmarks/without.py takes from a tutorial, and that it keeps the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.modules import QValueModule
from torchrl.objectives import DQNLoss

from benchmarks import without
from benchmarks.experiments import Experiment
from rnnkeys import GRUModule


@pytest.fixture
def policy() -> TensorDictSequential:
    modules: list[Any] = [
        GRUModule(3, 2, in_key="observation", out_key="embed"),
        TensorDictModule(torch.nn.Linear(2, 2), ["embed"], ["action_value"]),
        QValueModule(action_space="categorical"),
    ]
    return TensorDictSequential(*modules)


def test_keep_plain_loss_reads_the_state_before_the_next_step(policy: Any) -> None:
    loss: Any = DQNLoss(policy, action_space="categorical", delay_value=True)
    assert without.keep_plain(loss) is loss
    states = torch.arange(8.0).reshape(1, 4, 1, 2)
    batch = TensorDict(recurrent_state=states, batch_size=[1, 4])
    without.add_next_states(loss, (batch,))
    torch.testing.assert_close(batch["next", "recurrent_state"][:, :3], states[:, 1:])


def test_add_next_states_keeps_states_that_are_stored(policy: Any) -> None:
    stored = torch.ones(1, 4, 1, 2)
    batch = TensorDict(recurrent_state=torch.zeros(1, 4, 1, 2), batch_size=[1, 4])
    batch["next", "recurrent_state"] = stored
    without.add_next_states(policy, (batch,))
    assert batch["next", "recurrent_state"] is stored


def test_zero_start_minibatches_start_from_zeros_and_keep_the_rollout(policy: Any) -> None:
    states = torch.rand(2, 4, 1, 2) + 1
    rollout = TensorDict(
        observation=torch.rand(2, 4, 3),
        is_init=torch.zeros(2, 4, 1, dtype=torch.bool),
        recurrent_state=states.clone(),
        batch_size=[2, 4],
    )
    minibatches = without.ZeroStartMinibatches(4, 2, networks=policy)
    assert all(not batch["recurrent_state"].any() for batch in minibatches(rollout))
    torch.testing.assert_close(rollout["recurrent_state"], states)


@pytest.mark.parametrize(
    ("removed", "name", "replacement"),
    [
        ("recurrent_loss", "recurrent_loss", without.keep_plain),
        ("stored_states", "SequenceMinibatches", without.ZeroStartMinibatches),
    ],
)
def test_main_runs_the_tutorial_with_one_name_replaced(
    removed: str, name: str, replacement: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    tutorial = SimpleNamespace(main=seen.append)
    monkeypatch.setattr(without, "import_module", {"some_tutorial": tutorial}.__getitem__)
    without.main([removed, "some_tutorial", "--seed", "3"])
    assert seen == [["--seed", "3"]]
    assert getattr(tutorial, name) is replacement


def test_main_with_an_unknown_word_names_what_can_be_removed() -> None:
    with pytest.raises(SystemExit, match="recurrent_loss, stored_states"):
        without.main(["memory", "recurrent_dqn"])


def test_program_of_a_variant_without_something_runs_it_through_the_module() -> None:
    one = Experiment("r2d2", "", "", {"zeros": ("--x", "1")}, without={"zeros": "stored_states"})
    words = one.program("zeros")
    assert words == ["-m", "benchmarks.without", "stored_states", "r2d2", "--x", "1"]
