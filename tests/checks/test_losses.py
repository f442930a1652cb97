"""Checks of the batches of losses and value estimators."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.objectives.value import GAE

from rnnkeys.checks.losses import find_batch_problems


@pytest.mark.parametrize(("dim", "is_time"), [(-1, True), (1, True), (0, False), (-2, False)])
def test_find_batch_problems_of_chunks_along_time_yields_one(dim: int, is_time: bool) -> None:
    critic = TensorDictModule(
        torch.nn.Linear(3, 1), in_keys=["observation"], out_keys=["state_value"]
    )
    gae = GAE(gamma=0.9, lmbda=0.9, value_network=critic, num_chunks=2, value_chunk_dim=dim)
    flags = torch.zeros(4, 6, 1, dtype=torch.bool)
    after = {"done": flags, "terminated": flags, "reward": torch.ones(4, 6, 1)}
    batch = TensorDict({"observation": torch.ones(4, 6, 3), "next": after}, [4, 6])
    checks = [problem.check for problem in find_batch_problems(gae, batch, [])]
    assert checks == ["chunks-of-time"] * is_time
