"""The check of a batch as sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict

from rnnkeys.sequences import find_sequence_problems


@pytest.mark.parametrize("name", ["done", "terminated"])
@pytest.mark.parametrize("group", [(), ("agents",)])
def test_find_sequence_problems_of_an_end_that_is_no_tensor_names_it(name: str, group: Any) -> None:
    flags = torch.zeros(2, 5, 1, dtype=torch.bool)
    batch = TensorDict({}, [2, 5]).set((*group, "is_init"), flags)
    batch.set(("next", *group, name), NonTensorData("yes", batch_size=[2, 5]))
    [problem] = find_sequence_problems(batch, [(*group, "is_init")])
    assert problem.check == "entry-type" and repr(name) in problem.message
