"""oneDNN: its LSTM kernel, the cell states that hides, and its products."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rnnkeys.backends import onednn, products, workspace
from rnnkeys.backends.packing import Plan
from tests.support import problems
from tests.support.problems import WAYS, Problem, State, assert_same_run
from tests.support.tolerances import assert_equal

F32 = torch.float32
VENDOR = WAYS["vendor"]
SIZES: dict[str, Any] = {"batch": 6, "steps": 24, "num_layers": 2}


@pytest.fixture(autouse=True)
def _needs_onednn() -> None:
    if not onednn.runs(torch.zeros(1)):
        pytest.skip("This build of torch has no oneDNN.")


def _states(problem: Problem, only_starts: bool = False) -> State:
    options = VENDOR.options._replace(only_starts=only_starts)
    return problems.outputs(problem, VENDOR._replace(options=options))[1]


@pytest.mark.parametrize("marks", ["none", "random"])
@pytest.mark.parametrize("only_starts", [False, True])
def test_states_that_are_hidden_are_computed(monkeypatch, only_starts, marks):
    """Another version or processor may keep them elsewhere."""
    problem = problems.make("lstm", marks, dtype=F32, **SIZES)
    every = _states(problem)
    monkeypatch.setattr(workspace, "_is_known", lambda inputs, hidden: False)
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
    monkeypatch.setattr(workspace, "_is_known", lambda inputs, hidden: True)
    monkeypatch.setattr(workspace, "_checked", set())
    first_cell = workspace._first_cell
    monkeypatch.setattr(workspace, "_first_cell", lambda *sizes: first_cell(*sizes) + 16)
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
    seen = _plans(monkeypatch)
    problem = problems.make("lstm", "at 0", dtype=F32, batch=3, steps=5)
    _states(problem)
    assert [made.blocks for made in seen] == [[(0, 5, 3)]]


@pytest.mark.parametrize("states", ["random", "episodes"])
def test_both_biases_have_a_gradient_of_their_own(states):
    """Clipped in place, one must not change with the other."""
    problem = problems.make("lstm", dtype=F32, states=states, **SIZES)
    y, _ = problems.outputs(problem, VENDOR)
    biases = [problem.rnn.bias_ih_l0, problem.rnn.bias_hh_l0]
    one, other = torch.autograd.grad(y.sum(), biases)
    assert torch.equal(one, other)
    one.zero_()
    assert other.abs().sum() > 0


@pytest.mark.parametrize("states", ["random", "episodes"])
def test_a_backward_pass_may_be_run_twice(states):
    problem = problems.make("lstm", "random", dtype=F32, states=states, **SIZES)
    y, _ = problems.outputs(problem, VENDOR)
    leaves = [leaf for leaf in problem.leaves.values() if leaf.requires_grad]
    once, twice = (torch.autograd.grad(y.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize(
    ("marks", "states"), [("none", "random"), ("random", "random"), ("random", "episodes")]
)
def test_outputs_may_be_changed_in_place_before_the_backward_pass(marks, states):
    problem = problems.make("lstm", marks, dtype=F32, states=states, **SIZES)
    d_y, d_states = problem.cotangents(False)
    expected = problems.run(problem, VENDOR, d_y, d_states)
    y, states = problems.outputs(problem, VENDOR)
    leaves = {name: leaf for name, leaf in problem.leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(y.mul_(2.0), list(leaves.values()), d_y / 2)
    actual = expected._replace(y=y.detach() / 2, states=states)
    actual = actual._replace(grads=dict(zip(leaves, grads, strict=True)))
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


def test_products_with_part_of_a_weight_are_those_with_a_copy(monkeypatch):
    """Such as the states of one layer of several."""
    seen, wide, without_gaps = [], torch.randn(66, 256), products._without_gaps
    monkeypatch.setattr(products, "_LARGE", 0)
    monkeypatch.setattr(
        products, "_without_gaps", lambda w: seen.append(without_gaps(w)) or seen[-1]
    )
    x = torch.randn(384, 66)
    for weight in (wide[:, :128].t(), wide[:, :128].t().contiguous(), wide.t()):
        assert_equal(products.linear(x, weight), x @ weight.t(), F32)
        assert seen[-1].is_contiguous() or seen[-1].t().is_contiguous()
    assert seen[-1].data_ptr() == wide.data_ptr()


@pytest.mark.parametrize("only_starts", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_numbers_are_the_same(mode, only_starts):
    problem = problems.make("lstm", "random", dtype=F32, **SIZES)
    options = VENDOR.options._replace(only_starts=only_starts)
    way = VENDOR._replace(options=options)
    expected_y, expected = problems.outputs(problem, way)
    with mode():
        y, states = problems.outputs(problem, way)
        for a, b in zip((y, *states), (expected_y, *expected), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-6, equal_nan=True)


# Segments that share a row.


@pytest.fixture
def _never_by_select(monkeypatch) -> None:
    """Fail where finite numbers get through a gap, so that the rows run again by select."""

    def fail(*_: Any) -> Any:
        pytest.fail("A state got through a gap.")

    monkeypatch.setattr(onednn, "_run_with_resets", fail)


@pytest.fixture(params=["whole", "pieces"])
def _pieces(monkeypatch, request) -> None:
    """Cut the rows after few steps."""
    if request.param == "pieces":
        monkeypatch.setattr(onednn, "_MOST_KEPT", 4000)


def _plans(monkeypatch) -> list[Plan]:
    """Collect the plans of all that runs from now on."""
    seen: list[Plan] = []
    run = onednn.run

    def spy(weights, x, start, plan, *rest):
        seen.append(plan)
        return run(weights, x, start, plan, *rest)

    monkeypatch.setattr(onednn, "run", spy)
    return seen


def _check(problem: Problem) -> None:
    d_y, d_states = problem.cotangents(False)
    actual = problems.run(problem, VENDOR, d_y, d_states)
    assert_same_run(actual, problems.expect(problem, d_y, d_states), F32)


def _episodes(marks: str | Tensor = "random", **sizes: Any) -> Problem:
    return problems.make("lstm", marks, dtype=F32, states="episodes", **sizes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("marks", ["two in a row", "at the last step", "random"])
def test_shared_rows_equal_the_reference(monkeypatch, marks, bias, _never_by_select, _pieces):
    seen = _plans(monkeypatch)
    _check(_episodes(marks, bias=bias, batch=6, steps=24, num_layers=2))
    assert [made.clears for made in seen] == [True, True]


@given(data=st.data())
def test_shared_rows_equal_the_reference_whatever_is_drawn(data):
    batch, steps = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 30))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    is_init = torch.rand(batch, steps) < data.draw(st.sampled_from([0.05, 0.15, 0.3]))
    sizes = {name: data.draw(st.integers(4, 20)) for name in ("inputs", "hidden")}
    problem = _episodes(is_init, batch=batch, steps=steps, **sizes)
    if data.draw(st.booleans()):
        # Some episodes start from a state that is not zero.
        b, t = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, steps - 1))
        problem.reset_state[data.draw(st.integers(0, 1))][b, t] = 0.5
    _check(problem)


@pytest.mark.parametrize("known", [True, False])
def test_shared_rows_tell_states_at_starts(monkeypatch, known, _never_by_select, _pieces):
    problem = _episodes(**SIZES)
    every = _states(problem)
    if not known:
        monkeypatch.setattr(workspace, "_is_known", lambda inputs, hidden: False)
    seen = _plans(monkeypatch)
    starts = problem.starts
    for a, b in zip(_states(problem, only_starts=True), every, strict=True):
        assert_equal(a[starts], b[starts], F32)
        assert a[~starts].isnan().all()
    assert all(made.clears for made in seen)


def test_shared_rows_need_no_workspace_that_is_known(monkeypatch):
    problem = _episodes(**SIZES)
    monkeypatch.setattr(workspace, "_is_known", lambda inputs, hidden: False)
    _check(problem)


def _in_a_row() -> Problem:
    """Three episodes that share a row, beside one that fills its own."""
    is_init = torch.zeros(2, 24, dtype=torch.bool)
    is_init[0, [8, 16]] = True
    return _episodes(is_init, batch=2, steps=24)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_episode(monkeypatch, bad):
    problem = _in_a_row()
    others = torch.ones(2, 24, dtype=torch.bool)
    others[0, 8:16] = False
    d_y, d_states = problem.cotangents(False)
    d_y = d_y * others.unsqueeze(-1)
    before = problems.run(problem, VENDOR, d_y, d_states)
    with torch.no_grad():
        problem.x[0, 9] = bad
    seen = _plans(monkeypatch)
    after = problems.run(problem, VENDOR, d_y, d_states)
    assert [made.clears for made in seen] == [True]
    assert after.y[0, 9:16].isnan().any()
    for a, b in zip((after.y, *after.states), (before.y, *before.states), strict=True):
        assert_equal(a[others], b[others], F32)
    assert_equal(after.grads["x"][others], before.grads["x"][others], F32)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stays_in_its_episode(bad):
    problem = _in_a_row()
    d_y, d_states = problem.cotangents(False)
    before = problems.run(problem, VENDOR, d_y, d_states)
    d_y = d_y.clone()
    d_y[0, 18] = bad
    after = problems.run(problem, VENDOR, d_y, d_states)
    assert after.grads["x"][0, 16:18].isnan().any()
    others = torch.ones(2, 24, dtype=torch.bool)
    others[0, 16:] = False
    assert_equal(after.grads["x"][others], before.grads["x"][others], F32)


@pytest.mark.parametrize("factor", [1e6, 1e25])
def test_inputs_far_from_zero_do_not_open_gaps(factor, _never_by_select):
    problem = _in_a_row()
    with torch.no_grad():
        problem.x.mul_(factor)
    _check(problem)


# That the gradient of weights is NaN.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("last", [3.4e38, float("inf")])
def test_a_state_that_no_output_shows_stays_in_its_episode(last, _never_by_select):
    """At its last step an input opens all gates but the output's."""
    problem = _in_a_row()
    with torch.no_grad():
        problem.x[0, 15, 0] = last
        problem.rnn.weight_ih_l0[:, 0] = 1
        problem.rnn.weight_ih_l0[12:, 0] = -1
    d_y, d_states = problem.cotangents(False)
    actual = problems.run(problem, VENDOR, d_y, d_states)
    expected = problems.expect(problem, d_y, d_states)
    for a, b in zip((actual.y, *actual.states), (expected.y, *expected.states), strict=True):
        assert_equal(a, b.float(), F32)
    for name in ("x", "bias_hh_l0"):
        assert actual.grads[name].isfinite().all()
        assert_equal(actual.grads[name], expected.grads[name].float(), F32)


def test_biases_that_open_gaps_are_noticed():
    """However firmly others shut the output gate in all other steps."""
    problem = _in_a_row()
    with torch.no_grad():
        problem.rnn.bias_ih_l0[:4] = 3.3e38
        problem.rnn.bias_ih_l0[12:] = -1e38
    _, c = problems.expect(problem, *problem.cotangents(False)).states
    assert_equal(_states(problem)[1], c.float(), F32)


@pytest.mark.parametrize("name", ["bias_ih_l0", "weight_hh_l0"])
def test_large_weights_do_not_open_gaps(monkeypatch, name, _never_by_select):
    """Neither for states nor for gradients: forget gates that nothing else would shut."""
    problem = _in_a_row()
    with torch.no_grad():
        getattr(problem.rnn, name)[4:8] = 5e4 if name == "bias_ih_l0" else 1e5
    seen = _plans(monkeypatch)
    _check(problem)
    assert [made.clears for made in seen] == [True]


@pytest.mark.parametrize("only_starts", [False, True])
def test_layers_with_a_projection_share_no_rows(only_starts):
    problem = _episodes(proj_size=3, **SIZES)
    way = VENDOR._replace(options=VENDOR.options._replace(only_starts=only_starts))
    d_y, d_states = problem.cotangents(False)
    actual = problems.run(problem, way, d_y, d_states)
    expected = problems.expect(problem, d_y, d_states)
    if only_starts:
        starts = problem.starts
        for a, b in zip(actual.states, expected.states, strict=True):
            assert_equal(a[starts], b[starts].float(), F32)
        actual, expected = actual._replace(states=()), expected._replace(states=())
    assert_same_run(actual, expected, F32)


def test_states_at_starts_alone_share_no_rows_without_gradients(monkeypatch):
    """Those of segments side by side are known after one step, without a workspace."""
    problem = _episodes(**SIZES)
    every, seen = _states(problem), _plans(monkeypatch)
    with torch.no_grad():
        few = _states(problem, only_starts=True)
    assert [made.clears for made in seen] == [False, False]
    starts = problem.starts
    assert all(torch.allclose(a[starts], b[starts]) for a, b in zip(few, every, strict=True))


def test_the_probe_of_the_workspace_has_a_dtype_of_its_own():
    torch.set_default_dtype(torch.float64)
    try:
        assert workspace._is_known.__wrapped__(5, 4)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_state_with_a_gradient_shares_no_row(monkeypatch):
    problem = _in_a_row()
    for state in problem.reset_state:
        state.requires_grad_()
    seen = _plans(monkeypatch)
    _check(problem)
    assert [made.clears for made in seen] == [False]


def test_large_rows_run_in_pieces(monkeypatch):
    """However long, a pass asks for no piece of memory that the system wants back after it."""
    steps, largest = [], []
    run_block = onednn.run_block

    def spy(weights, x, *rest):
        ran = run_block(weights, x, *rest)
        steps.append(len(x))
        largest.append(ran.workspace.nbytes / 2**20)
        return ran

    monkeypatch.setattr(onednn, "run_block", spy)
    sizes: dict[str, Any] = {"batch": 8, "steps": 600, "hidden": 256}
    _states(problems.make("lstm", "none", dtype=F32, **sizes))
    assert steps == [200] * 3 and all(16 < size < 32 for size in largest)
    steps.clear()
    with torch.no_grad():  # nothing is kept, and no cell state wanted
        _states(problems.make("lstm", "none", dtype=F32, **sizes), only_starts=True)
    assert steps == [600]


@pytest.mark.parametrize("inputs", [7, 64, 65, 300])
@pytest.mark.parametrize("hidden", [16, 100, 256])
def test_the_size_of_a_workspace_is_known_before(inputs, hidden):
    draw = torch.rand
    weights = draw(4 * hidden, inputs), draw(4 * hidden, hidden), draw(4 * hidden), draw(4 * hidden)
    for steps, rows in ((1, 1), (5, 3), (34, 50)):
        state = draw(rows, hidden)
        ran = workspace.run_block(weights, draw(steps, rows, inputs), state, state, True)
        beyond = ran.workspace.nbytes / 4 - workspace.size_of(steps, rows, inputs, hidden)
        assert 0 <= beyond < 16 * 1024


_COUNT_PAGES = """
import resource, torch
from rnnkeys import GRUModule
from tensordict import TensorDict
torch.set_num_threads(1)
torch.manual_seed(0)
module = GRUModule(64, 64, in_key="x", out_key="y", default_recurrent_mode=True)
count = 0
# Several, since by luck one keeps its memory without help.
for batch, steps in (256, 32), (128, 96), (512, 32):
    is_init = torch.rand(batch, steps, 1) < 0.05
    x = torch.rand(batch, steps, 64)
    data = TensorDict({"x": x, "is_init": is_init}, [batch, steps])
    for k in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        y = module(data.clone(False))["y"]
        torch.autograd.grad(y.sum(), list(module.parameters()))
        del y
        if k >= 4:
            count += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(count)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_a_pass_takes_the_memory_that_the_last_one_freed():
    """The system maps next to no pages anew, though a process begins with glibc's low limits."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", _COUNT_PAGES]
    child = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
    assert int(child.stdout) < 12 * 500
