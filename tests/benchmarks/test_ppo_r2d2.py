"""The table of PPO against R2D2 shows finished runs alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import ppo_r2d2


def write_run(folder: Path, returns: list[float], evaluations: list[float]) -> None:
    """Write the files of a finished run with an evaluation every 10 frames."""
    folder.mkdir(parents=True)
    result = {"test_returns": returns, "frames": 10 * len(evaluations), "seconds": 1.0}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "cpu_seconds.txt").write_text("90.0\n")
    with (folder / "learning_curve.csv").open("w", newline="") as file:
        rows = [(10 * (i + 1), value, -1.0) for i, value in enumerate(evaluations)]
        csv.writer(file).writerows([("frames", "evaluation", "training_return"), *rows])


def test_main_shows_the_tasks_that_both_algorithms_have_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo_r2d2, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["ppo_r2d2", "--runs", str(tmp_path)])
    write_run(tmp_path / "popgym_repeat_previous" / "GRU_0", [1.0, 0.5], [0.25, 0.5, 1.0])
    write_run(tmp_path / "popgym_repeat_previous" / "GRU_1", [0.25], [0.25, 0.25, 0.25])
    write_run(tmp_path / "r2d2_memory" / "LSTM_0", [0.5], [0.75])
    write_run(tmp_path / "t_maze_50" / "GRU_0", [1.0], [1.0])  # PPO has not run on it
    ppo_r2d2.main()
    text = (tmp_path / "ppo_r2d2.md").read_text()
    assert "GRU | 0.50 [0.25, 0.75] | 0.75, 0.25 | 30 | 1.5 | 0.5 | 20; - |" in text
    assert "LSTM | 0.50 [0.50, 0.50] | 0.50 | 10 | 1.5 | 0.5 | 10 |" in text
    assert "t_maze_50" not in text


def test_show_table_reads_returns_and_frames_of_an_older_run(tmp_path: Path) -> None:
    side = ppo_r2d2.Side("R2D2", "r2d2", "LSTM")
    assert ppo_r2d2.show_table(side, tmp_path) == []
    with (tmp_path / "r2d2.csv").open("w", newline="") as file:
        header = ("variant", "seed", "fresh episodes: mean", "frames")
        csv.writer(file).writerows([header, ("LSTM", 0, 100.0, 80), ("GRU", 0, 5.0, 90)])
    cells = ["100.0 [100.0, 100.0]", "100.0", "80", "", ""]
    assert ppo_r2d2.show_table(side, tmp_path) == cells
    assert ppo_r2d2.show_table(side._replace(variant="FFM"), tmp_path) == []
