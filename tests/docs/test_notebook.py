"""The notebook runs, with few frames; it was saved after a run with all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "first_recurrent_policy.ipynb"


def read_code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_notebook_runs_from_the_first_cell_to_the_last(monkeypatch):
    monkeypatch.setenv("RNNKEYS_NOTEBOOK_FRAMES", "512")
    matplotlib.use("Agg")
    threads = torch.get_num_threads()
    names: dict[str, Any] = {}
    for cell in read_code_cells():
        exec("".join(cell["source"]), names)
    torch.set_num_threads(threads)
    pyplot.close("all")
    assert [seen for seen, _ in names["curves"]["gru"]] == [512]


def test_notebook_was_saved_with_the_outputs_of_a_run_that_learned():
    cells = read_code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    text = "".join("".join(output.get("text", [])) for output in outputs)
    assert "gru: 500 of 500" in text
    assert "image/png" in outputs[-1]["data"]


def test_docs_have_no_other_notebook():
    assert list(NOTEBOOK.parent.rglob("*.ipynb")) == [NOTEBOOK]
