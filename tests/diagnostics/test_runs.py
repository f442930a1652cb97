"""Runs of a policy on a batch, which are compared."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor

from rnnkeys.diagnostics.runs import evaluating, largest_difference
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
