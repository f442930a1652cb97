"""The watch of memory over long use runs, and shows what is never freed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import soak

KEPT: list[torch.Tensor] = []


def keep_a_tensor_per_call(draw: random.Random) -> Iterator[None]:
    while True:
        KEPT.append(torch.zeros(1))
        yield


def test_soak_writes_a_table_of_steps_and_of_updates(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(soak, "PARTS", 4)
    page = tmp_path / "soak.md"
    soak.main(["--steps", "80", "--updates", "20", "--output", str(page)])
    text = page.read_text(encoding="utf-8")
    assert re.search(r"20 updates in \d+ minutes", text)
    assert re.search(r"80 single steps in \d+ minutes", text)
    assert text.count("growth in the second half") == 2


def test_watch_of_calls_that_keep_tensors_shows_their_growth(monkeypatch):
    monkeypatch.setattr(soak, "PARTS", 4)
    samples = soak.watch(keep_a_tensor_per_call, 200)
    assert [sample.done for sample in samples] == [50, 100, 150, 200]
    assert soak.growth([sample.tensors for sample in samples]) == 100
