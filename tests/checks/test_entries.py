"""Checks of entries: which problem each mistake yields, with which type, and where none is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict

from rnnkeys.checks import (
    Problem,
    find_done_problems,
    find_empty_mask_problems,
    find_finite_problems,
    find_init_problems,
    find_mask_problems,
    find_multi_step_problems,
    find_next_problems,
    find_step_problems,
    find_tensor_problems,
)
from rnnkeys.keys import MASK_KEY

DONE = ("next", "done")
NAN = float("nan")


def make_batch(**entries: Any) -> TensorDict:
    flags = torch.zeros(2, 5, 1, dtype=torch.bool)
    after = TensorDict({"done": flags, "reward": torch.zeros(2, 5, 1)}, [2, 5])
    batch = TensorDict({"is_init": flags.clone(), "next": after}, [2, 5])
    return batch.update(entries)


def names(problems: Iterator[Problem]) -> list[str]:
    return [problem.check for problem in problems]


def find_all(batch: TensorDict) -> list[str]:
    found = [
        find_step_problems(batch, "A loss"),
        find_next_problems(batch),
        find_init_problems(batch, "is_init"),
        find_done_problems(batch, DONE),
        find_mask_problems(batch, "A loss"),
        find_multi_step_problems(batch, "steps_to_next_obs", "n_steps="),
        find_finite_problems(batch, batch.keys(True, True)),
    ]
    return [name for problems in found for name in names(problems)]


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"is_init": torch.zeros(2, 5, 3, 1, dtype=torch.bool)},
        {"collector": TensorDict({"mask": torch.ones(2, 5, dtype=torch.bool)}, [2, 5])},
        {"collector": TensorDict({"mask": torch.ones(2, 5, 1, dtype=torch.bool)}, [2, 5])},
        {"count": torch.ones(2, 5, dtype=torch.int64)},
    ],
    ids=["plain", "flags per agent", "mask", "mask with a last dimension", "integers"],
)
def test_find_problems_of_a_right_batch_yields_none(entries: dict[str, Any]) -> None:
    assert find_all(make_batch(**entries)) == []


@pytest.mark.parametrize(
    ("shape", "check"), [([], "no-time"), ([0, 5], "no-steps"), ([2, 0], "no-steps")]
)
def test_find_step_problems_without_steps_names_the_reader(shape: list[int], check: str) -> None:
    [problem] = find_step_problems(TensorDict({}, shape), "DQNLoss")
    assert problem.check == check and problem.message.startswith("DQNLoss expects sequences")
    assert str(shape) in problem.message


def test_find_next_problems_without_next_lists_the_entries() -> None:
    [problem] = find_next_problems(make_batch().exclude("next"))
    assert problem.error is KeyError and "is_init" in problem.message


@pytest.mark.parametrize(
    ("flags", "checks"),
    [
        (torch.zeros(2, 5, 1), ["init-dtype"]),
        (torch.zeros(2, 5, dtype=torch.bool), ["init-shape"]),
        (torch.zeros(2, 5, 3, dtype=torch.bool), ["init-shape"]),
        (torch.zeros(2, 5), ["init-dtype", "init-shape"]),
    ],
)
def test_find_init_problems_of_wrong_flags_names_dtype_and_shape(
    flags: torch.Tensor, checks: list[str]
) -> None:
    problems = list(find_init_problems(make_batch(is_init=flags), "is_init"))
    assert [problem.check for problem in problems] == checks
    assert (problems[0].error is TypeError) == (checks[0] == "init-dtype")


def test_find_init_problems_with_flags_elsewhere_names_their_key() -> None:
    batch = make_batch().exclude("is_init")
    [problem] = find_init_problems(batch, "is_init")
    assert problem.error is KeyError and "InitTracker writes it" in problem.remedy
    batch["agents", "is_init"] = torch.zeros(2, 5, 3, 1, dtype=torch.bool)
    [problem] = find_init_problems(batch, "is_init")
    assert "pass init_key=('agents', 'is_init')" in problem.remedy


def test_find_done_problems_of_numbers_yields_the_dtype() -> None:
    batch = make_batch()
    batch[DONE] = torch.zeros(2, 5, 1)
    assert names(find_done_problems(batch, DONE)) == ["done-dtype"]
    assert names(find_done_problems(batch.exclude(DONE), DONE)) == []


@pytest.mark.parametrize(
    ("mask", "check", "error"),
    [
        (torch.ones(2, 5), "mask-dtype", TypeError),
        (torch.ones(2, 5, 3, dtype=torch.bool), "mask-shape", ValueError),
    ],
)
def test_find_mask_problems_of_a_wrong_mask_yields_its_name(
    mask: torch.Tensor, check: str, error: type[Exception]
) -> None:
    batch = make_batch().set(MASK_KEY, mask)
    [problem] = find_mask_problems(batch, "DQNLoss")
    assert (problem.check, problem.error) == (check, error)


@pytest.mark.parametrize(
    ("split", "checks"),
    [
        (torch.ones(2, 5, dtype=torch.bool), ["mask-key"]),
        (torch.ones(2, 5), []),
        (torch.ones(2, 5, 3, dtype=torch.bool), []),
    ],
)
def test_find_mask_problems_of_split_trajectories_names_the_other_key(
    split: torch.Tensor, checks: list[str]
) -> None:
    batch = make_batch()
    batch["mask"] = split
    assert names(find_mask_problems(batch, "DQNLoss")) == []
    batch["traj_ids"] = torch.zeros(2, 5, dtype=torch.int64)
    assert names(find_mask_problems(batch, "DQNLoss")) == checks


def test_find_empty_mask_problems_needs_one_valid_step() -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    assert names(find_empty_mask_problems(mask, "DQNLoss")) == ["mask-empty"]
    mask[1, 4] = True
    assert names(find_empty_mask_problems(mask, "DQNLoss")) == []


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_find_finite_problems_counts_valid_steps(value: float) -> None:
    observation = torch.zeros(2, 5, 3)
    observation[0, 3, 1] = observation[1, 2, 0] = observation[1, 2, 2] = value
    batch = make_batch(observation=observation)
    [problem] = find_finite_problems(batch, ["missing", "observation"])
    assert "at 2 of 10 valid steps, first at [0, 3]" in problem.message
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    [problem] = find_finite_problems(batch, ["observation"], mask)
    assert "at 1 of 8 valid steps, first at [1, 2]" in problem.message
    mask[1, 2] = False
    assert names(find_finite_problems(batch, ["observation"], mask)) == []


def test_find_finite_problems_on_the_meta_device_are_none() -> None:
    batch = make_batch(observation=torch.zeros(2, 5, 3, device="meta"))
    assert names(find_finite_problems(batch, ["observation"])) == []


def test_find_tensor_problems_of_stacked_texts_names_the_entry() -> None:
    batch = make_batch(note=NonTensorData("x", [2, 5])).unsqueeze(0)
    [problem] = find_tensor_problems(batch, ["is_init", "next", "note"])
    assert problem.check == "entry-type" and "'note' must be a tensor" in problem.message


@pytest.mark.parametrize("is_next", [False, True])
def test_find_finite_problems_of_next_names_environments_that_reset_themselves(
    is_next: bool,
) -> None:
    batch = make_batch(observation=torch.full((2, 5, 3), NAN))
    batch["next", "observation"] = batch["observation"]
    [problem] = find_finite_problems(batch, [("next", "observation") if is_next else "observation"])
    assert ("reset themselves" in problem.remedy) == is_next


def test_find_step_problems_of_another_type_names_the_reader_and_the_type() -> None:
    wrong: Any = {"is_init": torch.zeros(2, 1)}
    [problem] = find_step_problems(wrong, "DQNLoss")
    assert (
        problem.error is TypeError and "DQNLoss expects a TensorDict. Got dict" in problem.message
    )
