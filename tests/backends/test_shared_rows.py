"""The native LSTM over rows that segments share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rnnkeys.backends import onednn, ops, shared_rows
from rnnkeys.backends.packing import read_segments
from tests.support import problems
from tests.support.native_lstm import F32, NATIVE, assert_equals_reference, draw_flags_and_sizes
from tests.support.problems import WAYS, Problem, assert_same_run
from tests.support.tolerances import assert_equal

BAD = pytest.mark.parametrize("bad", [float("inf"), float("nan")])


@pytest.fixture(autouse=True)
def _needs_onednn() -> None:
    if not onednn.can_run(torch.zeros(1)):
        pytest.skip("This build of torch has no oneDNN.")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Collect what runs: a layer of ``"shared"`` rows, or a pass by ``"select"``."""
    seen: list[str] = []

    def spy(owner: Any, name: str, call: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a: seen.append(call) or original(*a))

    spy(shared_rows, "run", "shared")
    spy(ops, "layer", "select")
    return seen


def _episodes(flags: str | Tensor = "random", **sizes: Any) -> Problem:
    return problems.make("lstm", flags, dtype=F32, states="episodes", **sizes)


def _in_a_row() -> Problem:
    """Three episodes that share a row, beside one that fills its own."""
    is_init = torch.zeros(2, 24, dtype=torch.bool)
    is_init[0, [8, 16]] = True
    return _episodes(is_init, batch=2, steps=24)


def _run(problem: Problem) -> problems.Run:
    return problems.run(problem, NATIVE, *problem.cotangents(False))


def test_can_run_asks_for_the_place_of_rows_with_a_padding_entry(monkeypatch):
    monkeypatch.setattr(onednn, "is_place_known", lambda *sizes: sizes == (4, 7))
    assert shared_rows.can_run(torch.zeros(5, 3), 7)
    assert not shared_rows.can_run(torch.zeros(5, 6), 4)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("flags", ["two in a row", "at the last step", "random"])
def test_shared_rows_equal_the_reference(monkeypatch, flags, bias, pieces, calls):
    if pieces:
        monkeypatch.setattr(onednn, "_MOST_KEPT", 4000)
    assert_equals_reference(_episodes(flags, bias=bias, batch=6, steps=24, num_layers=2))
    assert calls == ["shared"] * 2


@given(data=st.data())
def test_shared_rows_equal_the_reference_for_any_flags_sizes_and_states(data):
    is_init, sizes = draw_flags_and_sizes(data)
    problem = _episodes(is_init, **sizes)
    for _ in range(data.draw(st.integers(0, 3))):  # some episodes start from a state
        b, t = (data.draw(st.integers(0, size - 1)) for size in is_init.shape)
        problem.reset_state[data.draw(st.integers(0, 1))][b, t] = 0.5
    assert_equals_reference(problem)


def test_shared_rows_equal_the_loop_in_float64():
    problem = _in_a_row()
    wide = problem._replace(
        rnn=problems.make("lstm", batch=2, steps=24).rnn,
        x=problem.x.detach().double().requires_grad_(),
        reset_state=tuple(s.double() for s in problem.reset_state),
    )
    wide.rnn.load_state_dict(problem.rnn.state_dict())
    d_y, d_states = problem.cotangents(False)
    expected = problems.run(wide, WAYS["loop"], d_y.double(), tuple(d.double() for d in d_states))
    assert_same_run(problems.run(problem, NATIVE, d_y, d_states), expected, F32)


def test_segments_that_start_from_stored_states_share_no_rows(calls):
    problem = _in_a_row()
    for state in problem.reset_state:
        state[0, [8, 16]] = 1e-30
    assert_equals_reference(problem)
    assert not calls


def test_segments_whose_initial_state_has_a_gradient_share_no_rows(calls):
    problem = _in_a_row()
    for state in problem.reset_state:
        state.requires_grad_()
    assert_equals_reference(problem)
    assert not calls


def test_segments_share_no_rows_where_states_have_gradients(calls):
    problem = _in_a_row()
    problems.outputs(problem, WAYS["pad"])
    assert calls == ["select"]  # the operator of "scan", over packed rows


def test_shared_rows_without_gradients_equal_those_with_gradients(calls):
    problem = _in_a_row()
    y, states = problems.outputs(problem, NATIVE)
    with torch.no_grad():
        again = problems.outputs(problem, NATIVE)
    for a, b in zip((again[0], *again[1]), (y, *states), strict=True):
        assert torch.equal(a, b)
    assert calls == ["shared"] * 2


def test_shared_rows_run_by_select_where_a_cell_state_is_not_found(monkeypatch, calls):
    monkeypatch.setattr(onednn, "find_cell_states", lambda block, inputs: None)
    assert_equals_reference(_in_a_row())
    assert calls == ["shared", "select"]


def test_rows_are_not_shared_where_cell_states_are_never_found(monkeypatch, calls):
    monkeypatch.setattr(onednn, "is_place_known", lambda inputs, hidden: False)
    assert_equals_reference(_in_a_row())
    assert not calls


@BAD
def test_values_that_are_not_finite_do_not_pass_a_gap(bad, calls):
    problem = _in_a_row()
    others = torch.ones(2, 24, dtype=torch.bool)
    others[0, 8:16] = False
    d_y, d_states = problem.cotangents(False)
    d_y = d_y * others.unsqueeze(-1)
    before = problems.run(problem, NATIVE, d_y, d_states)
    with torch.no_grad():
        problem.x[0, 9] = bad
    after = problems.run(problem, NATIVE, d_y, d_states)
    assert after.y[0, 9:16].isnan().any() and calls == ["shared", "shared", "select"]
    for a, b in zip((after.y, *after.states), (before.y, *before.states), strict=True):
        assert_equal(a[others], b[others], F32)
    assert_equal(after.grads["x"][others], before.grads["x"][others], F32)


@BAD
def test_gradients_that_are_not_finite_do_not_pass_a_gap(bad, calls):
    problem = _in_a_row()
    d_y, d_states = problem.cotangents(False)
    before = problems.run(problem, NATIVE, d_y, d_states)
    d_y = d_y.clone()
    d_y[0, 18] = bad
    after = problems.run(problem, NATIVE, d_y, d_states)
    assert after.grads["x"][0, 16:18].isnan().any() and calls[-1] == "select"
    others = torch.ones(2, 24, dtype=torch.bool)
    others[0, 16:] = False
    assert_equal(after.grads["x"][others], before.grads["x"][others], F32)


@pytest.mark.parametrize("factor", [2.0**20, 2.0**83])
def test_inputs_far_from_zero_do_not_open_gaps(factor, calls):
    problem = _in_a_row()
    with torch.no_grad():
        # Products and sums are exact: rounding a sum that nearly cancels would move a gate.
        problem.x.sign_().mul_(factor)
        problem.rnn.weight_ih_l0.mul_(4).round_().div_(4)
    assert_equals_reference(problem)
    assert calls == ["shared"]


@pytest.mark.parametrize("name", ["bias_ih_l0", "weight_hh_l0"])
def test_large_weights_do_not_open_gaps(name, calls):
    problem = _in_a_row()
    with torch.no_grad():
        getattr(problem.rnn, name)[4:8] = 5e4 if name == "bias_ih_l0" else 1e5
    assert_equals_reference(problem)
    assert calls == ["shared"]


def test_biases_that_open_gaps_are_noticed(calls):
    """However firmly others shut the output gate in all other steps."""
    problem = _in_a_row()
    with torch.no_grad():
        problem.rnn.bias_ih_l0[:4] = 3.3e38
        problem.rnn.bias_ih_l0[12:] = -1e38
    _, c = problems.expect(problem, *problem.cotangents(False)).states
    assert_equal(problems.outputs(problem, NATIVE)[1][1], c.float(), F32)
    assert calls == ["shared", "select"]


def test_several_gradients_at_once_equal_one_after_the_other(calls):
    problem = _in_a_row()
    y, _ = problems.outputs(problem, NATIVE)
    d_y = torch.randn(2, *y.shape)
    both = torch.autograd.grad(y, problem.x, d_y, retain_graph=True, is_grads_batched=True)[0]
    for batched, d in zip(both, d_y, strict=True):
        (one,) = torch.autograd.grad(y, problem.x, d, retain_graph=True)
        assert_equal(batched, one, F32)
    assert calls == ["shared", "select"]


def test_second_derivative_of_shared_rows_is_an_error_that_names_loop(calls):
    problem = _in_a_row()
    y, _ = problems.outputs(problem, NATIVE)
    with pytest.raises(RuntimeError, match="recurrent_backend='loop'"):
        torch.autograd.grad(y.sum(), problem.x, create_graph=True)
    assert calls == ["shared"]


def test_find_nonzero_starts_reads_states_of_any_layout():
    is_init = torch.zeros(3, 8, dtype=torch.bool)
    is_init[1, [2, 5]] = True
    state = torch.zeros(3, 8, 1, 2)
    state[1, 5, 0, 1] = float("nan")
    state[1, 4] = 1.0  # is not read
    strided = state.transpose(0, 1).contiguous().transpose(0, 1)
    for given_state in (state, strided):
        nonzero = read_segments(is_init).find_nonzero_starts((torch.zeros_like(state), given_state))
        assert nonzero.tolist() == [False, False, False, True, False]
