"""Runs of a policy on a batch, which are compared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor

from rnnkeys.diagnostics.runs import (
    _choose_value,
    evaluating,
    largest_difference,
    relative_difference,
    select_part,
)
from rnnkeys.modules.network import RecurrentNetwork
from tests.support.recurrent import chain, make


def test_largest_difference_is_relative_to_single_steps() -> None:
    def count_dimensions(x: Tensor) -> Tensor:
        return torch.full_like(x, 8.0 if x.ndim == 3 else 2.0)

    policy = chain(make("gru"), TensorDictModule(count_dimensions, ["embed"], ["value"]))
    batch = TensorDict({"observation": torch.randn(2, 4, 3)}, [2, 4])
    batch["is_init"] = torch.zeros(2, 4, 1, dtype=torch.bool)
    with evaluating(policy):
        found = largest_difference(RecurrentNetwork(policy), batch)
    assert found == ("value", 3.0)


def test_relative_difference_of_small_values_and_of_zeros_is_finite() -> None:
    small = torch.tensor([1.0, 3.0]) / 1024
    assert relative_difference(small, torch.tensor([1.0, 4.0]) / 1024) == 0.25
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.parametrize(
    ("keys", "chosen"),
    [
        (["embed", "loc", "action_value"], "action_value"),
        (["loc", ("team", "agents", "state_value")], ("team", "agents", "state_value")),
        ([("agents", "loc"), "embed"], ("agents", "loc")),
        (["value_of_team", "embed"], "embed"),
    ],
)
def test_choose_value_prefers_values_to_parameters_to_the_last_entry(
    keys: list[Any], chosen: Any
) -> None:
    assert _choose_value(keys) == chosen


@pytest.mark.parametrize(
    ("shape", "part"),
    [((300,), (256,)), ((20, 100), (16, 64)), ((3, 7, 70), (16, 64)), ((2, 3), (2, 3))],
)
def test_select_part_of_a_batch_has_its_first_rows_and_steps(
    shape: tuple[int, ...], part: tuple[int, ...]
) -> None:
    number = torch.arange(math.prod(shape)).reshape(shape)
    found = select_part(TensorDict({"number": number}, shape))
    assert found.shape == part
    rows = number.reshape(-1, shape[-1])[: part[0] if len(part) == 2 else 1, : part[-1]]
    assert torch.equal(found["number"], rows.reshape(part))
