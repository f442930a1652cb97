from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type

from rnnkeys.collectors import EpsilonGreedy, epsilon_ladder


def test_epsilon_ladder_of_eight_is_that_of_the_paper() -> None:
    ladder = epsilon_ladder(8)
    assert torch.allclose(ladder, torch.tensor([0.4 ** (1 + i) for i in range(8)]))
    assert epsilon_ladder(1).tolist() == pytest.approx([0.4])


def test_epsilon_greedy_explores_in_each_environment_at_its_own_rate() -> None:
    explore = EpsilonGreedy(OneHot(1000), torch.tensor([0.0, 1.0]))
    best = nn.functional.one_hot(torch.tensor([[7] * 50, [7] * 50]), 1000)
    for row in range(50):
        with set_exploration_type(ExplorationType.RANDOM):
            played = explore(TensorDict({"action": best[:, row].clone()}, [2]))["action"]
        assert torch.equal(played[0], best[0, row])
        best[:, row] = played
    assert (best[1].argmax(-1) == 7).sum() < 5


def test_epsilon_greedy_floor_is_a_lower_bound_of_all_rates() -> None:
    explore = EpsilonGreedy(OneHot(1000), torch.tensor([0.0, 1.0]))
    explore.floor.fill_(1.0)
    best = nn.functional.one_hot(torch.tensor([7, 7]), 1000)
    with set_exploration_type(ExplorationType.RANDOM):
        rows = [explore(TensorDict({"action": best}, [2]))["action"][0] for _ in range(50)]
    assert torch.stack(rows).argmax(-1).unique().numel() > 30


def test_epsilon_greedy_outside_of_random_exploration_keeps_actions() -> None:
    explore = EpsilonGreedy(OneHot(1000), 1.0)
    best = nn.functional.one_hot(torch.tensor([7, 7]), 1000)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        same = explore(TensorDict({"action": best}, [2]))["action"]
    assert torch.equal(same, best)


def test_epsilon_greedy_reads_a_nested_action_key() -> None:
    explore = EpsilonGreedy(OneHot(1000), 1.0, action_key=("agents", "action"))
    tensordict = TensorDict({"agents": {"action": torch.zeros(20, 1000).long()}}, [20])
    with set_exploration_type(ExplorationType.RANDOM):
        explore(tensordict)
    assert (tensordict["agents", "action"].sum(-1) == 1).all()
