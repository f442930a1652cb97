"""What every test gets: a seed, a deterministic hypothesis, and a skip where there is no GPU."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

# "ci" (the default) draws the same examples every time, so that a red test is red again. "explore"
# draws new and more ones: HYPOTHESIS_PROFILE=explore pytest. Examples have no deadline: the first
# one pays for imports and compilation.
settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# Another seed, which also sets the order of the tests, shows which ones pass by luck:
# RNNKEYS_TEST_SEED=7 pytest.
SEED = int(os.environ.get("RNNKEYS_TEST_SEED", "0"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(SEED)
    np.random.seed(SEED)  # TorchRL's samplers draw from all three
    random.seed(SEED)


@pytest.fixture
def float64() -> Iterator[None]:
    """Make new tensors, parameters and specs float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shuffle the tests if there is a seed; skip those marked ``gpu`` without a CUDA device."""
    if SEED:
        draw = random.Random(SEED).random
        files = defaultdict(draw)  # a file stays whole, so that its fixtures are made once
        items.sort(key=lambda item: (files[item.path], draw()))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
