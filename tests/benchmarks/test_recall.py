"""The count of gradient steps after which a cue is recalled."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import benchmarks.tasks  # noqa: F401 (registers the environments)
from benchmarks import recall


def test_make_batch_shows_what_the_shortest_path_of_the_maze_shows() -> None:
    observations, sides = recall.make_batch(8, 3)
    env = gym.make("PassiveTMaze-v0", length=3)
    seen = {}
    for seed in range(8):
        first, _ = env.reset(seed=seed)
        seen[int(first[1] > 0)] = [first] + [env.step(np.int64(0))[0] for _ in range(3)]
    for observation, side in zip(observations, sides.tolist(), strict=True):
        np.testing.assert_array_equal(observation, recall.MAGNIFY * np.array(seen[side]))


@pytest.mark.parametrize(("cell", "learns"), [("gru", True), ("feed_forward", False)])
def test_count_updates_finishes_for_cells_that_hold_a_state(cell: str, learns: bool) -> None:
    count = recall.count_updates(cell, seed=0, length=2, limit=120)
    assert (count is not None) == learns


def test_main_writes_a_row_for_each_cell(tmp_path: Path) -> None:
    output = tmp_path / "recall.md"
    recall.main(
        ["--cells", "lru", "--seeds", "0", "1", "--limit", "1", "--length", "2"]
        + ["--output", str(output)]
    )
    assert '| `"lru"` | more than 1, more than 1 |' in output.read_text()
