"""Torch's native LSTM kernels over packed rows, oneDNN's workspace, and its matmul."""

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

from rnnkeys.backends import native, onednn, products
from rnnkeys.backends.packing import read_segments
from tests.support import problems
from tests.support.native_lstm import F32, NATIVE, assert_equals_reference, draw_flags_and_sizes
from tests.support.problems import WAYS, Problem, State, assert_same_run
from tests.support.tolerances import assert_equal

SIZES: dict[str, Any] = {"batch": 6, "steps": 24, "num_layers": 2}


@pytest.fixture(autouse=True)
def _needs_onednn() -> None:
    if not onednn.can_run(torch.zeros(1)):
        pytest.skip("This build of torch has no oneDNN.")


def _states(problem: Problem) -> State:
    return problems.outputs(problem, NATIVE)[1]


@given(data=st.data())
def test_native_lstm_equals_reference_for_any_flags_and_sizes(data):
    is_init, sizes = draw_flags_and_sizes(data)
    states = data.draw(st.sampled_from(["random", "episodes"]))
    assert_equals_reference(problems.make("lstm", is_init, dtype=F32, states=states, **sizes))


@pytest.mark.parametrize("flags", ["none", "random"])
def test_cell_states_equal_the_workspaces_when_its_layout_is_unknown(monkeypatch, flags):
    """Another version or processor may have another layout."""
    problem = problems.make("lstm", flags, dtype=F32, **SIZES)
    from_workspace = _states(problem)
    monkeypatch.setattr(onednn, "is_place_known", lambda inputs, hidden: False)
    for a, b in zip(_states(problem), from_workspace, strict=True):
        assert_equal(a, b, F32)


def test_cell_states_are_right_when_the_workspaces_layout_changes(monkeypatch):
    problem = problems.make("lstm", "random", dtype=F32, **SIZES)
    expected = _states(problem)
    monkeypatch.setattr(onednn, "is_place_known", lambda inputs, hidden: True)
    monkeypatch.setattr(onednn, "_checked", set())
    first_cell = onednn._first_cell
    monkeypatch.setattr(onednn, "_first_cell", lambda *sizes: first_cell(*sizes) + 16)
    for a, b in zip(_states(problem), expected, strict=True):
        assert_equal(a, b, F32)


def test_onednn_probe_does_not_depend_on_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert onednn.is_place_known.__wrapped__(5, 4)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("flags", ["none", "random"])
def test_native_lstm_without_onednn_equals_that_with_it(monkeypatch, flags):
    problem = problems.make("lstm", flags, dtype=F32, **SIZES)
    d_y, d_states = problem.cotangents(False)
    expected = problems.run(problem, NATIVE, d_y, d_states)
    monkeypatch.setattr(onednn, "can_run", lambda x: False)
    assert_same_run(problems.run(problem, NATIVE, d_y, d_states), expected, F32)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("bias", [True, False])
def test_values_that_are_not_finite_stay_in_their_segment(bad, bias):
    problem = problems.make("lstm", "random", dtype=F32, bias=bias, **SIZES)
    before = _states(problem)
    with torch.no_grad():
        problem.x[0, 0] = bad
    other_rows = slice(1, None)
    for a, b in zip(_states(problem), before, strict=True):
        assert torch.equal(a[other_rows], b[other_rows])


def test_batch_without_resets_runs_as_one_block():
    plan = read_segments(problems.FLAGS["at 0"](3, 5)).plan(block_rows=128)
    assert plan.blocks == [(5, 3)] and plan.is_dense


@pytest.mark.parametrize("states", ["random", "episodes"])
def test_gradients_of_both_biases_are_apart_in_memory(states):
    """Clipping one in place must not change the other."""
    problem = problems.make("lstm", dtype=F32, states=states, **SIZES)
    y, _ = problems.outputs(problem, NATIVE)
    biases = [problem.rnn.bias_ih_l0, problem.rnn.bias_hh_l0]
    one, other = torch.autograd.grad(y.sum(), biases)
    assert torch.equal(one, other)
    one.zero_()
    assert other.abs().sum() > 0


@pytest.mark.parametrize("states", ["random", "episodes"])
def test_backward_pass_may_run_twice(states):
    problem = problems.make("lstm", "random", dtype=F32, states=states, **SIZES)
    y, _ = problems.outputs(problem, NATIVE)
    leaves = [leaf for leaf in problem.leaves.values() if leaf.requires_grad]
    once, twice = (torch.autograd.grad(y.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("flags", ["none", "random"])
def test_outputs_changed_in_place_leave_gradients_right(monkeypatch, flags, pieces):
    if pieces:
        monkeypatch.setattr(onednn, "_MOST_KEPT", 4000)
    problem = problems.make("lstm", flags, dtype=F32, **SIZES)
    d_y, d_states = problem.cotangents(False)
    expected = problems.run(problem, NATIVE, d_y, d_states)
    y, states = problems.outputs(problem, NATIVE)
    leaves = {name: leaf for name, leaf in problem.leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(y.mul_(2.0), list(leaves.values()), d_y / 2)
    actual = expected._replace(y=y.detach() / 2, states=states)
    actual = actual._replace(grads=dict(zip(leaves, grads, strict=True)))
    assert_same_run(actual, expected, F32)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_outputs_without_gradients_equal_those_with_gradients(mode):
    problem = problems.make("lstm", "random", dtype=F32, **SIZES)
    expected_y, expected = problems.outputs(problem, NATIVE)
    with mode():
        y, states = problems.outputs(problem, NATIVE)
        for a, b in zip((y, *states), (expected_y, *expected), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("flags", ["none", "two in a row", "random"])
def test_blocks_cut_into_pieces_equal_the_reference(monkeypatch, flags):
    monkeypatch.setattr(onednn, "_MOST_KEPT", 4000)
    assert_equals_reference(problems.make("lstm", flags, dtype=F32, **SIZES))


def test_large_blocks_are_cut_so_that_no_workspace_exceeds_the_limit(monkeypatch):
    assert onednn.is_place_known(5, 256)  # probes with a block of its own
    steps, largest = [], []
    run_block = onednn.run_block

    def spy(parameters, x, *rest):
        block = run_block(parameters, x, *rest)
        steps.append(len(x))
        largest.append(block.workspace.nbytes / 2**20)
        return block

    monkeypatch.setattr(onednn, "run_block", spy)
    sizes: dict[str, Any] = {"batch": 8, "steps": 600, "hidden": 256}
    _states(problems.make("lstm", "none", dtype=F32, **sizes))
    assert steps == [200] * 3 and all(16 < size < 32 for size in largest)


@pytest.mark.parametrize("inputs", [7, 64, 65, 300])
@pytest.mark.parametrize("hidden", [16, 100, 256])
def test_workspace_size_equals_the_kernels_up_to_a_few_pages(inputs, hidden):
    draw = torch.rand
    parameters = [draw(4 * hidden, inputs), draw(4 * hidden, hidden), *draw(2, 4 * hidden)]
    for steps, rows in ((1, 1), (5, 3), (34, 50)):
        state = draw(rows, hidden)
        block = onednn.run_block(parameters, draw(steps, rows, inputs), state, state)
        beyond = block.workspace.nbytes / 4 - onednn.count_workspace(steps, rows, inputs, hidden)
        assert 0 <= beyond < 16 * 1024


def test_native_cell_states_equal_a_loops_for_packed_rows():
    problem = problems.make("lstm", "random", batch=4, steps=9)
    plan = read_segments(problem.is_init).plan()
    x, h, c = (
        plan.pack(t.detach()) for t in (problem.x, *(s[:, :, 0] for s in problem.reset_state))
    )
    y, states = problems.outputs(problem, WAYS["loop"])
    size = plan.sizes[0]
    actual = native.compute_cell_states(
        problem.layers[0], x, plan.pack(y.detach()), h[:size], c[:size], plan.sizes
    )
    assert_equal(actual.detach(), plan.pack(states[1][:, :, 0]).detach(), torch.float64)


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_equals_float64_for_any_strides(monkeypatch, transposed, rows):
    x, weight, bias = torch.randn(rows, 96)[:, :64], torch.randn(64, 80), torch.randn(80)
    weight = weight.t() if transposed else weight.t().contiguous()
    expected = x.double() @ weight.t().double() + bias
    for least in (0, 1 << 40):
        monkeypatch.setattr(products, "_LARGE", least)
        assert_equal(products.linear(x, weight, bias), expected.float(), F32)
        assert products.linear(x, weight).is_contiguous()


def test_linear_copies_a_weight_with_gaps_between_rows(monkeypatch):
    """Such a weight would take oneDNN a thousand times as long."""
    seen, wide, without_gaps = [], torch.randn(66, 256), products._make_dense
    monkeypatch.setattr(products, "_LARGE", 0)
    monkeypatch.setattr(products, "_make_dense", lambda w: seen.append(without_gaps(w)) or seen[-1])
    x = torch.randn(384, 66)
    for weight in (wide[:, :128].t(), wide[:, :128].t().contiguous(), wide.t()):
        assert_equal(products.linear(x, weight), x @ weight.t(), F32)
        assert seen[-1].is_contiguous() or seen[-1].t().is_contiguous()
    assert seen[-1].data_ptr() == wide.data_ptr()


_COUNT_PAGES = """
import resource, torch
from rnnkeys import GRUModule
from rnnkeys.backends import keep_freed_memory
from tensordict import TensorDict
keep_freed_memory()
torch.set_num_threads(1)
torch.manual_seed(0)
module = GRUModule(64, 64, in_key="x", out_key="y", default_recurrent_mode=True)
count = 0
# Several shapes, since one may keep its memory by luck.
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
def test_keep_freed_memory_lets_the_next_pass_use_the_same_pages():
    """Without the call, a process that has just started maps pages again in every pass."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", _COUNT_PAGES]
    child = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
    assert int(child.stdout) < 12 * 500
