"""What the Triton kernels do; run by ``tests/backends/test_triton.py`` in its own process.

There they run in Triton's interpreter on the CPU. ``make test-gpu`` runs this file on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from rnnkeys import precision, set_recurrent_mode
from rnnkeys.backends import Options, contract, triton
from rnnkeys.backends.triton.config import Config, Device
from rnnkeys.backends.triton.ordering import order_segments
from rnnkeys.cells import LSTM_CELL, Weights
from tests.support import problems, recurrent
from tests.support.emulated import tensor_cores
from tests.support.problems import FLAGS, WAYS, Problem, Way, assert_same_run
from tests.support.together import programs_together
from tests.support.tolerances import assert_equal
from tests.support.waiting import Waits, never_waiting

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WAY = WAYS["triton"]
INTERPRETED = not torch.cuda.is_available()
# What each mode of the products is held to, relative to the whole tensor; a key of the tolerances.
# float16 has as many bits of mantissa as TF32.
TOLERANCES: dict[str | torch.dtype, torch.dtype | str] = {
    "ieee": F32,
    "tf32x3": F32,
    "tf32": "tf32",
    F16: "tf32",
    BF16: BF16,
}
both_cells = pytest.mark.parametrize("cell", ["lstm", "gru"])


def _split(direction: str) -> Config:
    return Config(True, 4, 8, 32, 4, 3, 1 if direction == "forward" else 4)


def _in_chunks(direction: str) -> Config:
    return Config(True, 4, 32, 32, 4, 1, 2)


def _stepwise(direction: str) -> Config:
    return Config(False, 4, 16, 16, 4)


# Launches for 17 to 24 columns; "split" on three programs. What small layers are
# launched with, one program without chunks, runs in the contract test.
FORMS: dict[str, Callable[[str], Config]] = {
    "in chunks": _in_chunks,
    "split": _split,
    "stepwise": _stepwise,
}


def _set_form(form: str, monkeypatch: pytest.MonkeyPatch, processors: int = 3) -> None:
    from rnnkeys.backends.triton import launch

    monkeypatch.setattr(launch, "choose_config", lambda direction, *_: FORMS[form](direction))
    if INTERPRETED:
        monkeypatch.setattr(launch, "_device", lambda tensor: Device(processors))


@pytest.fixture(params=["split", "stepwise"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run all in one form of the kernels."""
    _set_form(request.param, monkeypatch)
    with _together(request.param):
        yield request.param


def _together(form: str, seed: int = 0) -> AbstractContextManager[Any]:
    return programs_together(seed) if INTERPRETED and form == "split" else nullcontext()


def _make(cell: str, flags: str | Tensor = "random", **sizes: Any) -> Problem:
    sizes = {"dtype": F32, "hidden": 18, "steps": 3, **sizes}
    return problems.for_way("triton", cell, flags, **sizes)


def _check(problem: Problem, way: Way = WAY, tolerance: torch.dtype | str = F32) -> None:
    d_y, d_states = problem.cotangents()
    expected = problems.expect(problem, d_y, d_states)
    assert_same_run(problems.run(problem, way, d_y, d_states), expected, tolerance)


@pytest.mark.parametrize("flags", ["random", "one long among short"])
@both_cells
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_form_equals_the_reference(form, cell, flags):
    _check(_make(cell, flags, batch=5))


@both_cells
def test_form_without_biases_and_with_sizes_of_one_runs(form, cell):
    _check(_make(cell, bias=False, hidden=17, inputs=3))
    _check(_make(cell, batch=1, steps=1))


@both_cells
def test_form_writes_all_of_its_outputs(form, cell):
    """Buffers come filled with NaN, which nothing may be left of."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan() and torch.ones(1).new_empty(1).isnan()
        assert torch.empty_like(torch.ones(1)).isnan()
        for recompute in ("none", "full"):
            options = WAY.options._replace(recompute=recompute)
            _check(_make(cell), WAY._replace(options=options))
    finally:
        torch.use_deterministic_algorithms(False)


@both_cells
def test_form_reads_no_stale_state(form, cell):
    """What is stored where no segment starts may be NaN, and inputs of other segments too."""
    problem = _make(cell, "two in a row")
    d_y, d_states = problem.cotangents()
    clean = problems.run(problem, WAY, d_y, d_states)
    starts = problem.is_init.clone()
    starts[:, 0] = True
    with torch.no_grad():
        for state in problem.reset_state:
            state[~starts] = float("nan")
    stale = problems.run(problem, WAY, d_y, d_states)
    assert_same_run(stale, clean, F32)


@both_cells
def test_unroll_with_strides_beyond_32_bits_equals_contiguous_states(form, cell):
    """In 4 GB that are asked for and, on a CPU, never touched."""
    problem, apart = _make(cell, "everywhere", batch=1), 2**30
    lake = torch.empty(2 * apart + 18, dtype=BF16, device=problem.x.device)
    far = lake.as_strided((1, 3, 18), (0, apart, 1)).normal_()
    (y, _), (expected, _) = (
        triton.unroll(
            problem.cell,
            problem.layers[0],
            problem.x,
            (state,) * len(problem.cell.state_names),
            problem.is_init,
            WAY.options,
        )
        for state in (far, far.contiguous())
    )
    assert torch.equal(y, expected)


@pytest.mark.parametrize("form", ["stepwise"], indirect=True)
@both_cells
def test_form_with_another_default_dtype_returns_the_same(form, cell):
    problem = _make(cell)
    torch.set_default_dtype(F16)
    try:
        _check(problem)
    finally:
        torch.set_default_dtype(F32)


@both_cells
def test_form_keeps_segments_apart(form, cell):
    """A segment that is not finite changes no bit of the others."""
    problem = _make(cell, batch=4, steps=4)
    problem.is_init[1] = torch.tensor([1, 0, 0, 1]).bool()
    d_y, d_states = problem.cotangents()
    clean = problems.run(problem, WAY, d_y, d_states)
    with torch.no_grad():
        problem.x[1, 1] = float("nan")
    spoilt = problems.run(problem, WAY, d_y, d_states)
    assert spoilt.y[1, 1:3].isnan().all()
    spoilt_at = torch.zeros_like(problem.is_init)
    spoilt_at[1, :3] = True
    for a, b in ((spoilt.y, clean.y), *zip(spoilt.states, clean.states, strict=True)):
        assert torch.equal(a[~spoilt_at], b[~spoilt_at])
    for name in ("x", *(f"state {n}" for n in problem.cell.state_names)):
        assert torch.equal(spoilt.grads[name][~spoilt_at], clean.grads[name][~spoilt_at])


@pytest.mark.skipif(not INTERPRETED, reason="emulates in the interpreter")
@pytest.mark.parametrize("mode", ["tf32x3", "tf32"])
@both_cells
def test_form_multiplies_in_the_mode_it_is_given(form, cell, mode):
    way = WAY._replace(options=WAY.options._replace(precision=mode))
    with tensor_cores() as modes:
        _check(_make(cell), way, TOLERANCES[mode])
    assert modes == {mode}


@pytest.mark.skipif(not INTERPRETED, reason="emulates in the interpreter")
@both_cells
def test_rounded_products_differ_from_exact_ones(cell):
    way = WAY._replace(options=WAY.options._replace(precision="tf32"))
    with tensor_cores(), pytest.raises(AssertionError, match="relative error"):
        _check(_make(cell), way, F32)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds nothing")
@pytest.mark.parametrize("mode", ["ieee", "tf32x3", "tf32"])
@both_cells
def test_mode_keeps_its_tolerance(cell, mode):
    way = WAY._replace(options=WAY.options._replace(precision=mode))
    _check(_make(cell), way, TOLERANCES[mode])


@pytest.mark.parametrize(("dtype", "recompute"), [(BF16, "none"), (F16, "full")])
@both_cells
def test_form_in_half_precision_is_within_tolerance(form, cell, dtype, recompute):
    options = WAY.options._replace(compute_dtype=dtype, recompute=recompute)
    problem = _make(cell)
    with tensor_cores() if INTERPRETED else nullcontext():
        _check(problem, WAY._replace(options=options), TOLERANCES[dtype])
        y, states = problems.outputs(problem, WAY._replace(options=options))
    assert {t.dtype for t in (y, *states)} == {F32}


@pytest.mark.parametrize("size", [1e-9, 1e7])
@both_cells
def test_form_in_float16_returns_gradients_beyond_its_range(form, cell, size):
    """Those of a mean over a large batch are smaller than its least number."""
    way = WAY._replace(options=WAY.options._replace(compute_dtype=F16))
    problem = _make(cell)
    d_y, d_states = problem.cotangents()
    d_y, d_states = d_y * size, tuple(d * size for d in d_states)
    with tensor_cores() if INTERPRETED else nullcontext():
        actual = problems.run(problem, way, d_y, d_states)
    assert_same_run(actual, problems.expect(problem, d_y, d_states), TOLERANCES[F16])


@pytest.mark.parametrize("dtype", [BF16, F16])
@both_cells
def test_form_with_parameters_of_half_precision_runs(cell, dtype):
    problem = _make(cell, dtype=dtype, hidden=8)
    with tensor_cores() if INTERPRETED else nullcontext():
        _check(problem, tolerance=BF16)
        y, states = problems.outputs(problem, WAY)
    assert {t.dtype for t in (y, *states)} == {dtype}


@pytest.mark.skipif(not INTERPRETED, reason="schedules programs itself")
@pytest.mark.parametrize("seed", range(3))
@both_cells
def test_programs_that_share_rows_in_any_order_equal_the_reference(cell, seed, monkeypatch):
    _set_form("split", monkeypatch, processors=3 + 3 * (seed % 2))
    with programs_together(seed) as launches:
        _check(_make(cell, batch=4))
    assert launches == [3 + 3 * (seed % 2)] * 2


@pytest.mark.skipif(not INTERPRETED, reason="schedules programs itself")
def test_schedule_without_progress_raises(monkeypatch):
    """With an arrival more to wait for than programs arrive."""
    from triton.runtime.errors import InterpreterError

    from rnnkeys.backends.triton import lstm

    _set_form("split", monkeypatch)
    kernel = lstm.forward

    class OneProgramLess:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            return kernel[(grid[0], grid[1] - 1)]

    monkeypatch.setattr(lstm, "forward", OneProgramLess())
    with pytest.raises(InterpreterError, match="wait for each other"), programs_together():
        problems.outputs(_make("lstm"), WAY)


def test_order_puts_the_longest_segments_first():
    for name, flags in FLAGS.items():
        is_init = flags(4, 6)
        starts, lengths, count = order_segments(is_init).split([24, 24, 1])
        lengths_by_start = dict(zip(starts.tolist(), lengths.tolist(), strict=True))
        expected = {}
        for b, row in enumerate(is_init.tolist()):
            cuts = [0, *(t for t in range(1, 6) if row[t]), 6]
            expected |= {6 * b + s: e - s for s, e in zip(cuts[:-1], cuts[1:], strict=True)}
        assert {s: n for s, n in lengths_by_start.items() if n} == expected, name
        assert count.item() == len(expected)
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_dropout_between_layers_equals_that_of_other_backends(kind, monkeypatch):
    """With a mask that is known: the same units, in whatever order a backend lays time out."""
    keep = torch.tensor([1.0, 0, 1, 1, 0], device=problems.DEVICE)
    monkeypatch.setattr(contract.F, "dropout", lambda rows, p: rows * keep / (1 - p))
    modules = [
        recurrent.make(kind, num_layers=2, dropout=0.4, recurrent_backend=name)
        for name in ("loop", "triton")
    ]
    modules[1].load_state_dict(modules[0].state_dict())
    modules = [module.to(problems.DEVICE).train() for module in modules]
    data = recurrent.batch(modules[0]).to(problems.DEVICE)
    plain, fused = (recurrent.recurrently(module, data) for module in modules)
    for key in modules[0].out_keys:
        assert_equal(fused.get(key), plain.get(key), F32, str(key))
    without = recurrent.recurrently(modules[1].eval(), data)
    assert not torch.allclose(without["embed"], fused["embed"])


@both_cells
def test_backward_on_any_thread_uses_the_precision_of_its_forward(cell, monkeypatch):
    from rnnkeys.backends.triton import launch, products

    seen: list[tuple[str, str]] = []
    for name in ("forward", "backward"):
        kernel = getattr(launch, name)
        monkeypatch.setattr(
            launch, name, lambda *a, k=kernel, n=name, **kw: (seen.append((n, a[-1])), k(*a, **kw))
        )
    for name in ("project", "weight_grads"):
        product = getattr(products, name)

        def spied(*args: Any, product: Any = product, name: str = name) -> Any:
            seen.append((name, str(torch.backends.cuda.matmul.fp32_precision)))
            return product(*args)

        monkeypatch.setattr(products, name, spied)
    way = WAY._replace(options=WAY.options._replace(precision="auto"))
    problem = _make(cell, hidden=4)
    with precision.set_recurrent_matmul_precision("tf32"):
        y, _ = problems.outputs(problem, way)
    with precision.set_recurrent_matmul_precision("ieee"):
        thread = threading.Thread(target=lambda: y.sum().backward())
        thread.start()
        thread.join()
    assert seen == [
        ("project", "tf32"), ("forward", "tf32"), ("backward", "tf32"), ("weight_grads", "tf32"),
    ]  # fmt: skip


@pytest.mark.skipif(not INTERPRETED, reason="the GPU itself is asked below")
@pytest.mark.parametrize(("dtype", "recompute"), [(F32, "none"), (F16, "full")])
@both_cells
def test_call_does_not_wait_for_a_device(cell, dtype, recompute, monkeypatch):
    """Outside of the operators, and inside, without the kernels: those run on the host here."""
    from rnnkeys.backends.triton import launch, ops

    options = WAY.options._replace(compute_dtype=dtype, recompute=recompute)
    problem, kept = _make(cell, hidden=4), recompute == "none"
    with never_waiting():
        y, _ = problems.outputs(problem, WAY._replace(options=options))
        y.sum().backward()
    for name in ("forward", "backward"):
        monkeypatch.setattr(launch, name, lambda *_: None)
    reset_h, reset_c, *_ = *(s[:, :, 0] for s in problem.reset_state), None
    inputs = (problem.x, *problem.layers[0][:4], reset_h, reset_c, problem.is_init)
    with torch.no_grad(), never_waiting():
        inputs = (*inputs, order_segments(problem.is_init), dtype, "ieee")
        h, c, act = ops.layer._init_fn(cell, *inputs, kept)
        ops.layer_backward._init_fn(h, None, cell, *inputs, h, c, act, kept, True, True, True)


def test_watch_of_waits_raises_at_each_operation_that_waits():
    flags = torch.ones(3, dtype=torch.bool)
    for waits in (lambda: bool(flags.any()), lambda: flags[flags], flags.nonzero):
        with pytest.raises(Waits), never_waiting():
            waits()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@both_cells
def test_call_on_a_gpu_does_not_wait_for_it(cell):
    for dtype in (F32, F16):
        way = WAY._replace(options=WAY.options._replace(compute_dtype=dtype))
        problem = _make(cell)
        for mode in ("default", "error"):  # the first run compiles
            torch.cuda.set_sync_debug_mode(mode)
            try:
                problems.run(problem, way, *problem.cotangents())
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@both_cells
def test_cuda_graph_replays_a_layer(cell):
    problem = _make(cell, hidden=200, batch=9, steps=20)
    with torch.no_grad():
        problems.outputs(problem, WAY)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, states = problems.outputs(problem, WAY)
        problem.x.mul_(2)
        problem.is_init.logical_not_()
        graph.replay()
        expected, expected_states = problems.outputs(problem, WAY)
    for a, b in zip((y, *states), (expected, *expected_states), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@both_cells
def test_layer_on_a_gpu_that_is_not_the_current_one_runs(cell, monkeypatch):
    monkeypatch.setattr(problems, "DEVICE", "cuda:1")
    assert torch.cuda.current_device() == 0
    _check(_make(cell, hidden=200))


@both_cells
def test_second_derivative_raises_and_names_loop(cell):
    problem = _make(cell, hidden=4)
    y, _ = problems.outputs(problem, WAY)
    (grad,) = torch.autograd.grad(y.sum(), problem.x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*recurrent_backend='loop'"):
        grad.sum().backward()


def _unroll(problem: Problem, x: Tensor, is_init: Tensor, w_hh: Tensor) -> tuple[Tensor, ...]:
    weights = problem.layers[0]._replace(w_hh=w_hh)
    states = tuple(s[:, :, 0] for s in problem.reset_state)
    return triton.unroll(problem.cell, weights, x, states, is_init, WAY.options)[1]


@pytest.mark.parametrize("mapped", ["x", "flags", "parameters"])
@both_cells
def test_vmap_equals_a_loop_and_has_gradients(cell, mapped):
    problem = _make(cell, hidden=4, steps=4)
    device = problem.x.device
    x = torch.randn(2, *problem.x.shape, device=device, requires_grad=True)
    flags = torch.rand(2, *problem.is_init.shape, device=device) < 0.4
    w_hh = problem.layers[0].w_hh.detach().repeat(2, 1, 1)
    w_hh[1] *= 0.5
    w_hh.requires_grad_()
    each = {"x": (x, flags[:1].expand(2, -1, -1), w_hh[:1].expand(2, -1, -1))}
    each["flags"] = (x, flags, w_hh[:1].expand(2, -1, -1))
    each["parameters"] = (x, flags, w_hh)
    in_dims = {"x": (0, None, None), "flags": (0, 0, None), "parameters": (0, 0, 0)}[mapped]
    shown = (a if d == 0 else a[0] for a, d in zip(each[mapped], in_dims, strict=True))
    actual = torch.vmap(lambda x, m, w: _unroll(problem, x, m, w), in_dims)(*shown)
    each_x, each_marks, each_w = each[mapped]
    loop = [_unroll(problem, each_x[i], each_marks[i], each_w[i]) for i in range(2)]
    expected = tuple(torch.stack(entry) for entry in zip(*loop, strict=True))
    d = [torch.randn_like(e) for e in expected]
    grads = torch.autograd.grad(actual, (x, w_hh), d)
    expected_grads = torch.autograd.grad(expected, (x, w_hh), d)
    for a, b in zip((*actual, *grads), (*expected, *expected_grads), strict=True):
        assert_equal(a, b, F32)


def test_transform_that_differentiates_raises_with_its_name():
    problem = _make("gru", hidden=4)

    def loss(x: Tensor) -> Tensor:
        return _unroll(problem, x, problem.is_init, problem.layers[0].w_hh)[0].sum()

    with pytest.raises(RuntimeError, match="not inside torch.func.grad.*recurrent_backend='loop'"):
        torch.func.grad(loss)(problem.x)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_compiled_module_is_one_graph_with_one_node_for_time(kind):
    module = recurrent.make(kind, recurrent_backend="triton").to(problems.DEVICE)
    data = recurrent.batch(module).to(problems.DEVICE)
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with set_recurrent_mode(True):
        expected = module(data.clone())
        compiled = torch.compile(lambda d: module(d), backend=keep, fullgraph=True)
        actual = compiled(data.clone())
    for key in module.out_keys:
        assert torch.equal(actual.get(key), expected.get(key))
    assert len(graphs) == 1
    nodes = [node for node in graphs[0].graph.nodes if "triton_layer" in str(node.target)]
    assert len(nodes) == 1


def _call(**changes: Any) -> None:
    weights = Weights(torch.zeros(8, 3), torch.zeros(8, 2))
    arguments: dict[str, Any] = {
        "cell": LSTM_CELL,
        "weights": weights,
        "x": torch.zeros(2, 4, 3),
        "reset_state": (torch.zeros(2, 4, 2), torch.zeros(2, 4, 2)),
        "is_init": torch.zeros(2, 4, dtype=torch.bool),
        "options": Options(),
    }
    triton.unroll(**(arguments | changes))


@pytest.mark.skipif(not INTERPRETED, reason="the errors are the same, and made on a CPU")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"is_init": torch.zeros(2, 4)}, TypeError,
         r"is_init must be bool .* got float32. Pass is_init.bool\(\)"),
        ({"is_init": torch.zeros(2, 5, dtype=torch.bool)}, ValueError,
         r"is_init must have shape \[2, 4\] beside x \[2, 4, 3\], got \[2, 5\]"),
        ({"reset_state": (torch.zeros(2, 4, 2), torch.zeros(2, 4, 3))}, ValueError,
         r"reset state 'c' must have shape \[2, 4, 2\] .* got \[2, 4, 3\]"),
        ({"is_init": torch.zeros(2, 4, dtype=torch.bool, device="meta")}, ValueError,
         r"is_init is on 'meta' and x on 'cpu'.*\.to\(x\.device\)"),
        ({"weights": Weights(torch.zeros(8, 3), torch.zeros(8, 2, device="meta"))}, ValueError,
         "w_hh is on 'meta' and x on 'cpu'"),
        ({"options": Options(compute_dtype=torch.float64)}, RuntimeError,
         "got recurrent_compute_dtype=float64. Use recurrent_backend='pad' or 'auto'"),
        ({"weights": Weights(torch.zeros(8, 3).double(), torch.zeros(8, 2).double())}, RuntimeError,
         "takes parameters in float32, bfloat16 or float16, got float64.*'pad' or 'auto'"),
    ],
)  # fmt: skip
def test_unroll_with_bad_input_raises(changes, error, message):
    _call()
    with pytest.raises(error, match=message):
        _call(**changes)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [64, 200, 512, 1024])
@pytest.mark.parametrize("batch", [1, 33, 300])
@both_cells
def test_form_at_full_size_equals_the_reference(cell, batch, hidden):
    """In every mode, beside one run of the reference, which takes longest."""
    is_init = torch.rand(batch, 130) < 0.02
    problem = _make(cell, is_init, batch=batch, steps=130, hidden=hidden, inputs=64)
    d_y, d_states = problem.cotangents()
    expected = problems.expect(problem, d_y, d_states)
    for mode, tolerance in TOLERANCES.items():
        changes = {"precision" if isinstance(mode, str) else "compute_dtype": mode}
        way = WAY._replace(options=WAY.options._replace(**changes))
        assert_same_run(problems.run(problem, way, d_y, d_states), expected, tolerance)
