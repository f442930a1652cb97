"""Agents that share a recurrent module have a memory each: none sees what another one saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rnnkeys import recurrent_module
from tests.recurrent import BACKENDS, F64, batch, recurrently

AGENTS = 3
GROUP: Any = {
    "lstm": ("h", "c"),
    "gru": ("h",),
    "lstm_ln": ("h", "c"),
}


def make_agents(cell: str, backend: str) -> Any:
    """One module for a group of agents, with nested keys and marks of the group's own."""
    states = [("agents", name) for name in GROUP[cell]]
    return recurrent_module(
        cell,
        3,
        5,
        num_layers=2,
        dtype=F64,
        in_keys=[("agents", "observation"), *states],
        out_keys=[("agents", "embed"), *(("next", *key) for key in states)],
        init_key=("agents", "is_init"),
        recurrent_backend=backend,
    )


def everything(module: Any, data: Any, cotangent: Tensor) -> list[Tensor]:
    """Outputs, states, and the gradients of inputs and stored states, agents third."""
    leaves = [data.get(key).detach().requires_grad_() for key in module.in_keys[:-1]]
    data = data.copy()
    for key, leaf in zip(module.in_keys[:-1], leaves, strict=True):
        data.set(key, leaf)
    out = recurrently(module, data)
    (out["agents", "embed"] * cotangent).sum().backward()
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [*(out.get(key).detach() for key in module.out_keys), *grads]


@pytest.mark.parametrize("change", ["observation", "h", "is_init", "nan"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", GROUP)
def test_what_happens_to_one_agent_reaches_no_other(cell, backend, change):
    module = make_agents(cell, backend)
    data = batch(module, (2, 7), agents=(AGENTS,), shared_marks=False)
    cotangent = torch.randn(2, 7, AGENTS, 5, dtype=F64)
    before = everything(module, data, cotangent)
    changed = data.clone()
    entry = changed.get(("agents", "observation" if change == "nan" else change))
    if change == "is_init":
        entry[:, 1:, 0] = ~entry[:, 1:, 0]
    else:
        entry[:, :, 0] = float("nan") if change == "nan" else entry[:, :, 0] + 1
    after = everything(module, changed, cotangent)
    assert any(not torch.equal(a[:, :, 0], b[:, :, 0]) for a, b in zip(before, after, strict=True))
    for a, b in zip(before, after, strict=True):
        # To rounding: rows are packed in another order when starts are moved.
        torch.testing.assert_close(a[:, :, 1:], b[:, :, 1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", GROUP)
def test_marks_that_are_shared_start_every_agent(cell):
    module = make_agents(cell, "auto")
    own = batch(module, (2, 7), agents=(AGENTS,), shared_marks=False)
    marks = own["agents", "is_init"][:, :, :1]
    every = own.clone()
    every["agents", "is_init"] = marks.expand(2, 7, AGENTS, 1).clone()
    shared = own.clone()
    shared["agents", "is_init"] = marks[:, :, 0]
    for key in module.out_keys:
        expected = recurrently(module, every).get(key)
        assert torch.equal(recurrently(module, shared).get(key), expected)
