"""The check of a batch as sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict

from rnnkeys.sequences import find_sequence_problems
from rnnkeys.sequences.check_sequences import find_state_problems


@pytest.mark.parametrize("name", ["done", "terminated"])
@pytest.mark.parametrize("group", [(), ("agents",)])
def test_find_sequence_problems_of_an_end_that_is_no_tensor_names_it(name: str, group: Any) -> None:
    flags = torch.zeros(2, 5, 1, dtype=torch.bool)
    batch = TensorDict({}, [2, 5]).set((*group, "is_init"), flags)
    batch.set(("next", *group, name), NonTensorData("yes", batch_size=[2, 5]))
    [problem] = find_sequence_problems(batch, [(*group, "is_init")])
    assert problem.check == "entry-type" and repr(name) in problem.message


@pytest.mark.parametrize(
    ("flags", "state", "checks"),
    [
        ((2, 5, 1), (2, 5, 1, 4), []),
        ((2, 5, 1), (2, 5, 3, 1, 4), []),
        ((2, 5, 3, 1), (2, 5, 3, 1, 4), []),
        (None, (2, 5, 1, 4), []),
        ((2, 5, 1), (2, 5, 4), ["state-shape"]),
        ((2, 5, 3, 1), (2, 5, 1, 4), ["state-shape"]),
        ((2, 5, 3, 1), (2, 5, 2, 1, 4), ["state-shape"]),
        (None, (2, 5, 4), ["state-shape"]),
    ],
)
def test_find_state_problems_of_a_shape_compares_flags_and_agents(
    flags: Any, state: tuple[int, ...], checks: list[str]
) -> None:
    batch = TensorDict({"h": torch.zeros(state)}, [2, 5])
    if flags is not None:
        batch["is_init"] = torch.zeros(flags, dtype=torch.bool)
    problems = find_state_problems(batch, "h", "is_init")
    assert [problem.check for problem in problems] == checks
