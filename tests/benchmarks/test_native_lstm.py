"""Calls without a part of the LSTM's path: the part is away, and comes back."""

from __future__ import annotations

import pytest
import torch

from benchmarks.native_lstm import PARTS, main, without
from rnnkeys.backends import native, onednn

needs_onednn = pytest.mark.skipif(not onednn.can_run(torch.zeros(1)), reason="needs oneDNN")


@needs_onednn
@pytest.mark.parametrize("part", PARTS)
def test_without_a_part_switches_it_off_for_the_call_alone(part: str) -> None:
    owner, name = PARTS[part]
    before = getattr(owner, name)
    assert without(part, lambda: getattr(owner, name)(1, 2))() is False
    assert getattr(owner, name) is before


@needs_onednn
def test_main_computes_cell_states_without_the_workspace_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[bool] = []
    compute = native.compute_cell_states
    monkeypatch.setattr(
        native,
        "compute_cell_states",
        lambda *args: (known.append(onednn.is_place_known(64, 128)), compute(*args))[1],
    )
    main(["--seconds", "0.01", "--cases", "2"])
    assert "(1, 64, 64, 128)" in capsys.readouterr().out
    assert known and not any(known)
