"""Every tutorial accepts every cell that ``recurrent_module`` makes, and trains with it."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from rnnkeys import CellName
from tests.support.odd_environments import action_id
from tests.support.tutorials import load_tutorial, read_result

CHOICE, BOX = action_id("Choice"), action_id("Box")
TINY = {
    "recurrent_ppo": (
        f"--env {CHOICE} --frames 32 --num-envs 2 --steps 16 --seq-len 8 --minibatch-steps 32 "
        "--epochs 1 --net-arch 8 --eval-episodes 2 --eval-every 32"
    ),
    "recurrent_sac": (
        f"--env {BOX} --frames 64 --num-envs 2 --batch-frames 32 --updates 1 --warmup 32 "
        "--slices 2 --slice-len 8 --burn-in 2 --net-arch 8 --eval-episodes 2 --eval-every 64"
    ),
    "recurrent_dqn": (
        f"--env {CHOICE} --frames 256 --warmup 128 --slices 2 --slice-len 8 --eval-episodes 2 "
        "--eval-every 256"
    ),
    "r2d2": (
        f"--env {CHOICE} --frames 64 --warmup 32 --num-envs 2 --batch-frames 32 --updates 1 "
        "--windows 2 --window-len 8 --period 4 --burn-in 2 --eval-episodes 2 --eval-every 64"
    ),
    "recurrent_reinforce": "--episodes 2 --num-envs 2",
    "recurrent_qmix": (
        "--frames 128 --num-envs 4 --warmup 64 --batch-frames 32 --slices 2 --eval-every 64"
    ),
}
TUTORIALS = {name: load_tutorial(name) for name in TINY}

pytestmark = pytest.mark.usefixtures("signal_handlers")


# The tutorials' own tests train with the others.
CELLS = [c for c in get_args(CellName) if c not in ("lstm", "gru", "lstm_ln", "feed_forward")]


@pytest.mark.parametrize("name", TINY)
def test_args_accept_every_cell(name: str) -> None:
    assert get_type_hints(TUTORIALS[name].Args)["cell"] is CellName


@pytest.mark.parametrize(("name", "cell"), [*zip(cycle(TINY), CELLS, strict=False)])
def test_main_linear_cell_trains(name: str, cell: str, tmp_path: Path) -> None:
    argv = [*TINY[name].split(), "--cell", cell, "--hidden-size", "8", "--output", str(tmp_path)]
    TUTORIALS[name].main(argv)
    assert read_result(tmp_path)["args"]["cell"] == cell
