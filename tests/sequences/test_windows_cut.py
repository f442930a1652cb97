"""Spans of rows, and the windows that are cut from them."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NonTensorStack, TensorDict

from rnnkeys.sequences import Spans, cut_windows, find_spans, flag_padding, shift_states

MASK = ("collector", "mask")


def test_find_spans_counts_pieces_from_the_start_of_each_run() -> None:
    cuts = torch.zeros(2, 7, dtype=torch.bool)
    cuts[0, 4] = True
    spans = find_spans(cuts, 3)
    rows, firsts, lengths = (entry.tolist() for entry in spans)
    assert rows == [0, 0, 0, 1, 1, 1]
    assert firsts == [0, 3, 4, 0, 3, 6]
    assert lengths == [3, 1, 3, 3, 3, 1]


def test_find_spans_with_a_mask_leaves_out_runs_without_a_valid_step() -> None:
    mask = torch.tensor([[True, False, False, False], [False, False, False, True]])
    spans = find_spans(torch.zeros(2, 4, dtype=torch.bool), 2, mask)
    assert (spans.row.tolist(), spans.first.tolist()) == ([0, 1], [0, 2])


def test_cut_windows_repeats_the_last_step_and_keeps_masks_and_other_entries() -> None:
    rows = TensorDict({"x": torch.arange(10).reshape(2, 5)}, [2, 5])
    stack: Any = NonTensorStack
    rows["name"] = stack(stack(*"abcde"), stack(*"fghij"))
    spans = Spans(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([4, 2]))
    windows, mask = cut_windows(rows, spans)
    assert windows["x"].tolist() == [[1, 2, 3, 4], [5, 6, 6, 6]]
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]
    names: Any = windows.get("name")
    assert names[1].tolist() == ["f", "g", "g", "g"]
    rows[MASK] = torch.tensor([[[True]] * 5, [[False]] + [[True]] * 4])
    assert cut_windows(rows, spans)[1].tolist() == [[True] * 4, [False, True, False, False]]


def test_flag_padding_flags_each_agent() -> None:
    windows = TensorDict({"is_init": torch.zeros(2, 3, 2, 1, dtype=torch.bool)}, [2, 3])
    flag_padding(windows, "is_init", torch.tensor([3, 1]))
    assert windows["is_init"][..., 0, 0].tolist() == [[False] * 3, [False, True, True]]
    assert torch.equal(windows["is_init"][..., 0, 0], windows["is_init"][..., 1, 0])


def test_shift_states_per_agent_starts_from_the_initial_state_of_each() -> None:
    after, initial = torch.randn(2, 4, 3, 1, 5), torch.randn(2, 4, 3, 1, 5)
    starts = torch.rand(2, 4, 3, 1) < 0.4
    shifted = shift_states(after, initial, starts, 1)
    for t in range(4):
        for agent in range(3):
            for b in range(2):
                first = t == 0 or bool(starts[b, t, agent])
                wanted = initial[b, t, agent] if first else after[b, t - 1, agent]
                assert torch.equal(shifted[b, t, agent], wanted)
