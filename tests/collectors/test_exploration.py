from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict
from torch import nn
from torchrl.data import Categorical, MultiCategorical, OneHot
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


def test_epsilon_greedy_first_visits_explores_each_observation_by_its_own_count() -> None:
    explore = EpsilonGreedy(OneHot(1000), 0.0, first_visits=3.0)
    best = nn.functional.one_hot(torch.tensor([7, 7]), 1000)
    often, zeros = torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 2.0], [-0.0, 2.0]])
    changed = torch.zeros(2)
    for _ in range(500):  # both environments see it: 1000 visits
        data = TensorDict({"action": best, "observation": often.expand(2, 2)}, [2])
        with set_exploration_type(ExplorationType.RANDOM):
            changed += (explore(data)["action"] != best).any(-1)
    # The sum of 3 / (3 + n) up to 1000 is 16.9, its deviation below 4.
    assert 3 < changed.sum() < 35
    with set_exploration_type(ExplorationType.RANDOM):
        new = explore(TensorDict({"action": best, "observation": zeros}, [2]))["action"]
    assert explore._visits[zeros[0].numpy().tobytes()] == 2  # -0.0 is 0.0
    assert not torch.equal(new[0], best[0])  # the first visit is random: 999 of 1000


def test_epsilon_greedy_first_visits_outside_of_random_exploration_counts_nothing() -> None:
    explore = EpsilonGreedy(OneHot(10), 0.0, first_visits=3.0)
    data = TensorDict(
        {"action": torch.zeros(2, 10, dtype=torch.int64), "observation": torch.zeros(2, 1)}, [2]
    )
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        explore(data)
    assert not explore._visits


def test_epsilon_greedy_first_visits_negative_raises() -> None:
    with pytest.raises(ValueError, match="first_visits must be a number from 0.0 to inf"):
        EpsilonGreedy(OneHot(10), 0.0, first_visits=-1)


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


@pytest.mark.parametrize("spec", [OneHot(4), Categorical(4), Categorical(4, shape=torch.Size([1]))])
def test_epsilon_greedy_with_a_mask_draws_all_allowed_actions_and_no_other(spec: Any) -> None:
    allowed = torch.tensor([[True, False, True, True], [False, False, True, False]])
    explore = EpsilonGreedy(spec, 1.0, action_mask_key="action_mask")
    counts = torch.zeros(2, 4)
    for _ in range(300):
        data = TensorDict({"action": spec.zero(torch.Size([2])), "action_mask": allowed}, [2])
        with set_exploration_type(ExplorationType.RANDOM):
            action = explore(data)["action"]
        assert spec.is_in(action[0]) and action.dtype == spec.dtype
        index = action.long().argmax(-1) if isinstance(spec, OneHot) else action.reshape(2)
        counts += nn.functional.one_hot(index, 4)
    assert torch.equal(counts > 0, allowed)
    assert counts[0, allowed[0]].min() > 70


@pytest.mark.parametrize("spec", [OneHot(4), Categorical(4)])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_epsilon_greedy_with_a_mask_takes_any_batch(spec: Any, shape: tuple[int, ...]) -> None:
    explore = EpsilonGreedy(spec, 1.0, action_mask_key="action_mask")
    allowed = torch.zeros(*shape, 4, dtype=torch.bool)
    allowed[..., 2] = True
    data = TensorDict({"action": spec.zero(torch.Size(shape)), "action_mask": allowed}, shape)
    with set_exploration_type(ExplorationType.RANDOM):
        action = explore(data)["action"]
    index = action.long().argmax(-1) if isinstance(spec, OneHot) else action
    assert index.shape == shape and (index == 2).all()


def test_epsilon_greedy_where_no_action_is_allowed_keeps_the_action() -> None:
    explore = EpsilonGreedy(OneHot(3), 1.0, action_mask_key="action_mask")
    best = nn.functional.one_hot(torch.tensor([1, 1]), 3)
    data = TensorDict({"action": best, "action_mask": torch.zeros(2, 3).bool()}, [2])
    with set_exploration_type(ExplorationType.RANDOM):
        assert torch.equal(explore(data)["action"], best)


def test_epsilon_greedy_masks_of_several_choices_raise() -> None:
    with pytest.raises(ValueError, match="one discrete action.*MultiCategorical"):
        EpsilonGreedy(MultiCategorical([2, 3]), 1.0, action_mask_key="action_mask")


def test_epsilon_greedy_first_visits_of_any_batch_has_a_rate_for_each_observation() -> None:
    explore = EpsilonGreedy(OneHot(1000), 0.0, first_visits=1.0)
    best = nn.functional.one_hot(torch.full((2, 3), 7), 1000)
    data = TensorDict({"action": best, "observation": torch.arange(6).reshape(2, 3, 1)}, [2, 3])
    with set_exploration_type(ExplorationType.RANDOM):
        explore(data)  # every first visit is random
    assert (data["action"].argmax(-1) != 7).sum() >= 5 and len(explore._visits) == 6


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda b: None, TypeError, "EpsilonGreedy expects a TensorDict"),
        (lambda b: b.exclude("action"), KeyError, "reads 'action'.*after the policy"),
        (lambda b: b.set("action", NonTensorData("up", [2])), TypeError, "'action' must be a ten"),
        (lambda b: b.set("action", b["action"][..., 0]), ValueError, r"\[2, 3\].*Got \[2\]"),
        (lambda b: b.to("meta"), ValueError, "'action' is on the meta device"),
    ],
)
def test_epsilon_greedy_of_a_wrong_batch_raises(change: Any, error: Any, text: str) -> None:
    explore = EpsilonGreedy(OneHot(3), 1.0)
    batch = TensorDict({"action": torch.zeros(2, 3, dtype=torch.int64)}, [2])
    with set_exploration_type(ExplorationType.RANDOM), pytest.raises(error, match=text):
        explore(change(batch))


def test_epsilon_greedy_first_visits_of_no_environment_counts_nothing() -> None:
    explore = EpsilonGreedy(OneHot(3), 0.0, first_visits=1.0)
    zeros = torch.zeros(0, 3)
    data = TensorDict({"action": zeros.long(), "observation": zeros}, [0])
    with set_exploration_type(ExplorationType.RANDOM):
        assert explore(data)["action"].shape == (0, 3)
    assert not explore._visits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_epsilon_greedy_first_visits_counts_observations_of_any_dtype(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    explore = EpsilonGreedy(OneHot(3), 0.0, first_visits=1.0)
    ones = torch.ones(2, *shape).to(dtype)
    with set_exploration_type(ExplorationType.RANDOM):
        for observation in (ones, torch.stack([ones[0], 0 * ones[0]])):
            action = torch.zeros(2, 3, dtype=torch.int64)
            explore(TensorDict({"action": action, "observation": observation}, [2]))
    assert sorted(explore._visits.values()) == [1, 3]
