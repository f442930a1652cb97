"""The table of cells, with budgets that measure nothing."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from benchmarks import cells
from rnnkeys import CellName


def test_main_writes_a_row_for_every_cell_and_block(tmp_path: Path) -> None:
    output = tmp_path / "cells.md"
    cells.main(["--rounds", "1", "--steps", "2", "--updates", "1", "--output", str(output)])
    rows = [line.split(" | ") for line in output.read_text().splitlines() if line.startswith("| ")]
    names = [row[0].removeprefix("| ") for row in rows[2:]]
    assert names == [*get_args(CellName), *cells.LINEAR]
    assert all(len(row) == len(cells.HEADER) for row in rows)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_walk_decays_and_adds_steps(decay: float) -> None:
    total = cells._walk(cells.torch.ones(1, 3, 1), decay)
    assert total.flatten().tolist() == [1, 1 + decay, 1 + decay * (1 + decay)]
