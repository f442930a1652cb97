"""Checks of actions and action masks: which problem each mistake yields, and at which step."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import one_hot

from rnnkeys.checks import (
    Problem,
    find_action_mask_problems,
    find_action_problems,
    find_one_hot_problems,
)

B, T, A = 2, 4, 3
TAKEN = torch.full((B, T), 2)
BAD = (1, 3)  # the step that is wrong


def change(entry: Tensor, value: float | bool | list[float]) -> Tensor:
    entry = entry.clone()
    entry[BAD] = torch.as_tensor(value, dtype=entry.dtype)
    return entry


def mask_bad_step() -> Tensor:
    return change(torch.ones(B, T, dtype=torch.bool), False)


def describe(problems: Iterable[Problem]) -> list[str]:
    """Return the name of each problem, and whether its message has the step."""
    return [f"{one.check} {f'first at {list(BAD)}' in one.message}" for one in problems]


@pytest.mark.parametrize("action", [one_hot(TAKEN, A), one_hot(TAKEN, A).bool(), TAKEN])
def test_find_action_problems_of_right_actions_yields_none(action: Tensor) -> None:
    batch = TensorDict({"action": action}, [B, T])
    assert not list(find_action_problems(batch, "action", A))
    if action.ndim == 2:
        batch = TensorDict({"action": action.unsqueeze(-1)}, [B, T])
        assert not list(find_action_problems(batch, "action", A))


@pytest.mark.parametrize(
    ("action", "problem"),
    [
        (change(one_hot(TAKEN, A).double(), [0.5, 0.0, 0.5]), "action-one-hot"),
        (change(one_hot(TAKEN, A), [1, 0, 1]), "action-one-hot"),
        (change(one_hot(TAKEN, A), [0, 0, 0]), "action-one-hot"),
        (change(TAKEN, -1), "action-range"),
        (change(TAKEN, A).unsqueeze(-1), "action-range"),
    ],
)
def test_find_action_problems_of_wrong_values_names_the_first_valid_step(
    action: Tensor, problem: str
) -> None:
    batch = TensorDict({"action": action}, [B, T])
    assert describe(find_action_problems(batch, "action", A)) == [f"{problem} True"]
    assert not list(find_action_problems(batch, "action", A, mask_bad_step()))
    assert not list(find_action_problems(batch, "action", A, read_values=False))


def test_find_action_problems_of_several_ones_names_the_function_that_mends_it() -> None:
    batch = TensorDict({"action": torch.ones(B, T, A)}, [B, T])
    [problem] = find_action_problems(batch, "action", A)
    assert "choose_one_action" in problem.remedy


@pytest.mark.parametrize("agents", [(), (2,)], ids=str)
def test_find_one_hot_problems_names_the_first_valid_step(agents: tuple[int, ...]) -> None:
    right = one_hot(torch.full((B, T, *agents), 2), A)
    batch = TensorDict({"action": right}, [B, T])
    assert not list(find_one_hot_problems(batch, "action"))
    wrong = right.clone()
    wrong[BAD] = 1
    batch = TensorDict({"action": wrong}, [B, T])
    [problem] = find_one_hot_problems(batch, "action")
    assert problem.check == "action-one-hot" and f"first at [{BAD[0]}, {BAD[1]}" in problem.message
    assert not list(find_one_hot_problems(batch, "action", mask_bad_step()))


@pytest.mark.parametrize("action", [TAKEN, TAKEN.unsqueeze(-1), TAKEN.float()])
def test_find_one_hot_problems_of_indices_names_the_action_space(action: Tensor) -> None:
    [problem] = find_one_hot_problems(TensorDict({"action": action}, [B, T]), "action")
    assert problem.check == "action-shape" and 'action_space="categorical"' in problem.remedy


@pytest.mark.parametrize(
    ("action", "problem"),
    [
        (torch.zeros(B, T, A - 1), "action-shape"),
        (TAKEN.float(), "action-dtype"),
        (TAKEN > 0, "action-dtype"),
        (TAKEN + 0j, "action-dtype"),
    ],
)
def test_find_action_problems_of_a_wrong_shape_or_dtype_needs_no_values(
    action: Tensor, problem: str
) -> None:
    batch = TensorDict({"action": action}, [B, T])
    assert describe(find_action_problems(batch, "action", A, read_values=False)) == [
        f"{problem} False"
    ]


@pytest.mark.parametrize("action", [one_hot(TAKEN, A), TAKEN, TAKEN.unsqueeze(-1)])
def test_find_action_mask_problems_names_the_first_step_of_an_action_not_allowed(
    action: Tensor,
) -> None:
    allowed = one_hot(TAKEN, A).bool()
    batch = TensorDict({"action": action, "mask": allowed}, [B, T])
    assert not list(find_action_mask_problems(batch, "mask", "action"))
    batch["mask"] = change(allowed, [1, 1, 0])
    assert describe(find_action_mask_problems(batch, "mask", "action")) == ["action-masked True"]
    assert not list(find_action_mask_problems(batch, "mask", "action", mask_bad_step()))
    assert not list(find_action_mask_problems(batch, "mask", "action", read_values=False))


def test_find_action_mask_problems_of_an_index_out_of_range_reads_the_last_action() -> None:
    entries = {"action": change(TAKEN, A + 5), "mask": one_hot(TAKEN, A).bool()}
    assert not list(find_action_mask_problems(TensorDict(entries, [B, T]), "mask", "action"))


def test_find_action_mask_problems_of_several_choices_compares_none() -> None:
    entries = {"action": TAKEN.new_zeros(B, T, 2), "mask": one_hot(TAKEN, A).bool()}
    assert not list(find_action_mask_problems(TensorDict(entries, [B, T]), "mask", "action"))


@pytest.mark.parametrize("agents", [(), (5,)])
def test_find_action_mask_problems_names_a_next_step_without_actions(
    agents: tuple[int, ...],
) -> None:
    allowed = torch.ones(B, T, *agents, A, dtype=torch.bool)
    allowed[BAD] = False
    ends = torch.zeros(B, T, 1, dtype=torch.bool)
    after = TensorDict({"mask": allowed, "terminated": ends}, [B, T])
    batch = TensorDict({"next": after}, [B, T])

    def find(valid: Tensor | None = None, terminated_key: str | None = "terminated") -> list[str]:
        found = find_action_mask_problems(
            batch, "mask", "action", valid, terminated_key=terminated_key
        )
        return [one.message.partition(", first at ")[2] for one in found]

    [text] = find()
    assert text.startswith(f"{[*BAD, *(0 for _ in agents)]}")
    assert not find(mask_bad_step()) and not find(terminated_key=None)
    after["terminated"] = change(ends, True)
    assert not find()
