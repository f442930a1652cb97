"""The table of what bad batches lead to, and how it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts import fuzz
from tests.support.fuzzed_calls import Call


def test_read_table_returns_what_was_written(tmp_path: Path) -> None:
    rows: fuzz.Rows = {
        "DQN": ("1,003", "1,000", "3", "none"),
        "Windows": ("7", "2", "5", "a KeyError: a | b"),
    }
    fuzz.write_table(rows, tmp_path / "table.md")
    assert fuzz.read_table(tmp_path / "table.md") == rows
    assert "| all | 1,010 | 1,002 | 8 | 1 |" in (tmp_path / "table.md").read_text()
    assert fuzz.read_table(tmp_path / "absent.md") == {}


def test_write_table_keeps_what_was_written_below_it(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    rows: fuzz.Rows = {"DQN": ("1,003", "1,000", "3", "none")}
    fuzz.write_table(rows, path)
    text = path.read_text() + f"\n{fuzz.FOUND}\n- One thing.\n"
    path.write_text(text)
    fuzz.write_table(fuzz.read_table(path), path)
    assert path.read_text() == text


def test_fuzz_call_counts_outcomes_and_returns_the_smallest_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def call(batch: Any) -> Any:
        return batch["next", "done"] if "action" in batch.keys() else batch["action"]

    monkeypatch.setitem(fuzz.CALLS, "mine", Call(call, ["action"]))
    counts, problem = fuzz.fuzz_call("mine", 200, 0)
    assert counts["result"] and counts["error"]
    assert problem.startswith(("[without 'action']: a", "[empty]: a", "['action' nested]: a"))
    monkeypatch.setitem(fuzz.CALLS, "mine", Call(lambda batch: None, ["action"]))
    counts, problem = fuzz.fuzz_call("mine", 20, 0)
    assert counts["result"] > 10 and problem == ""
