"""oneDNN: its LSTM kernel, the cell states that hides, and its products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rnnkeys.backends import onednn, products
from tests import problems
from tests.problems import WAYS, Problem, State, assert_same_run
from tests.tolerances import assert_equal

F32 = torch.float32
VENDOR = WAYS["vendor"]
SIZES: dict[str, Any] = {"batch": 6, "steps": 24, "num_layers": 2}


@pytest.fixture(autouse=True)
def _needs_onednn() -> None:
    if not onednn.runs(torch.zeros(1)):
        pytest.skip("This build of torch has no oneDNN.")


def _states(problem: Problem, only_starts: bool = False) -> State:
    options = replace(VENDOR.options, only_starts=only_starts)
    return problems.outputs(problem, VENDOR._replace(options=options))[1]


@pytest.mark.parametrize("marks", ["none", "random"])
@pytest.mark.parametrize("only_starts", [False, True])
def test_states_that_are_hidden_are_computed(monkeypatch, only_starts, marks):
    """Another version or processor may keep them elsewhere."""
    problem = problems.make("lstm", marks, dtype=F32, **SIZES)
    every = _states(problem)
    monkeypatch.setattr(onednn, "_workspace_is_known", lambda inputs, hidden: False)
    starts = problem.is_init.clone() if only_starts else torch.ones_like(problem.is_init)
    starts[:, 0] = True
    for a, b in zip(_states(problem, only_starts), every, strict=True):
        assert_equal(a[starts], b[starts], F32)
        assert a[~starts].isnan().all()


@pytest.mark.parametrize("marks", ["none", "random"])
def test_without_onednn_torchs_own_kernel_gives_the_same(monkeypatch, marks):
    problem = problems.make("lstm", marks, dtype=F32, **SIZES)
    d_y, d_states = problem.cotangents(False)
    expected = problems.run(problem, VENDOR, d_y, d_states)
    monkeypatch.setattr(onednn, "runs", lambda x: False)
    assert_same_run(problems.run(problem, VENDOR, d_y, d_states), expected, F32)


def test_a_wrong_place_of_hidden_states_is_noticed(monkeypatch):
    problem = problems.make("lstm", "random", dtype=F32, **SIZES)
    every = _states(problem)
    monkeypatch.setattr(onednn, "_workspace_is_known", lambda inputs, hidden: True)
    monkeypatch.setattr(onednn, "_PAGE", onednn._PAGE + 16)
    for a, b in zip(_states(problem), every, strict=True):
        assert_equal(a, b, F32)


def test_states_that_are_not_finite_change_nothing_else():
    problem = problems.make("lstm", "random", dtype=F32, **SIZES)
    before = _states(problem)
    with torch.no_grad():
        problem.x[0, 0] = float("inf")
    other_rows = slice(1, None)
    for a, b in zip(_states(problem), before, strict=True):
        assert torch.equal(a[other_rows], b[other_rows])


def test_a_batch_that_nothing_cuts_goes_to_the_kernel_in_one_piece(monkeypatch):
    seen = []
    run = onednn.run

    def spy(weights, x, start, blocks, only_starts):
        seen.append(blocks)
        return run(weights, x, start, blocks, only_starts)

    monkeypatch.setattr(onednn, "run", spy)
    problem = problems.make("lstm", "at 0", dtype=F32, batch=3, steps=5)
    _states(problem)
    assert seen == [[(0, 5, 3)]]


def test_both_biases_have_a_gradient_of_their_own():
    """Clipped in place, one must not change with the other."""
    problem = problems.make("lstm", dtype=F32)
    y, _ = problems.outputs(problem, VENDOR)
    biases = [problem.rnn.bias_ih_l0, problem.rnn.bias_hh_l0]
    one, other = torch.autograd.grad(y.sum(), biases)
    assert torch.equal(one, other)
    one.zero_()
    assert other.abs().sum() > 0


def test_a_backward_pass_may_be_run_twice():
    problem = problems.make("lstm", "random", dtype=F32, **SIZES)
    y, _ = problems.outputs(problem, VENDOR)
    leaves = list(problem.leaves.values())
    once, twice = (torch.autograd.grad(y.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_outputs_may_be_changed_in_place_before_the_backward_pass():
    problem = problems.make("lstm", "none", dtype=F32)
    d_y, d_states = problem.cotangents(False)
    expected = problems.run(problem, VENDOR, d_y, d_states)
    y, states = problems.outputs(problem, VENDOR)
    grads = torch.autograd.grad(y.mul_(2.0), list(problem.leaves.values()), d_y / 2)
    actual = expected._replace(y=y.detach() / 2, states=states)
    actual = actual._replace(grads=dict(zip(problem.leaves, grads, strict=True)))
    assert_same_run(actual, expected, F32)


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_those_of_torch(monkeypatch, transposed, rows):
    """Of rows that are part of wider ones and of weights in any order, large and small."""
    x, weight, bias = torch.randn(rows, 96)[:, :64], torch.randn(64, 80), torch.randn(80)
    weight = weight.t() if transposed else weight.t().contiguous()
    expected = x.double() @ weight.t().double() + bias
    for least in (0, 1 << 40):
        monkeypatch.setattr(products, "_LARGE", least)
        assert_equal(products.linear(x, weight, bias), expected.float(), F32)
        assert products.linear(x, weight).is_contiguous()


@pytest.mark.parametrize("only_starts", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_numbers_are_the_same(mode, only_starts):
    problem = problems.make("lstm", "random", dtype=F32, **SIZES)
    options = replace(VENDOR.options, only_starts=only_starts)
    way = VENDOR._replace(options=options)
    expected_y, expected = problems.outputs(problem, way)
    with mode():
        y, states = problems.outputs(problem, way)
        for a, b in zip((y, *states), (expected_y, *expected), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-6, equal_nan=True)
