"""The scan of linear cells as an operator: values, gradients, vmap, compile, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from rnnkeys import linear_scan
from rnnkeys.backends import linear_steps, scan_ops
from rnnkeys.cells.linear import mix_coefficients
from tests.support.tolerances import assert_equal

SHAPES = [(1, 1, 1), (5, 2, 3), (33, 3, 5), (70, 2, 3), (100, 50, 60)]
DTYPES = [torch.float64, torch.complex128]


def unroll(a: Tensor, b: Tensor, start: Tensor, reset: Tensor) -> Tensor:
    """One step after the other, time-major; the state is selected where a segment starts."""
    h, out = start[0], []
    for t in range(len(b)):
        h = torch.where((reset[t] | (t == 0))[:, None], start[t], h)
        h = (a[t] if a.ndim == 3 else a) * h + b[t]
        out.append(h)
    return torch.stack(out)


def draw(shape: tuple[int, ...], dtype: torch.dtype, rate: float, constant: bool) -> Any:
    steps, rows, features = shape
    a = torch.rand((features,) if constant else shape, dtype=dtype).requires_grad_()
    b, start = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    return a, b, start, torch.rand(steps, rows) < rate


def grads_of(h: Tensor, leaves: Any) -> Any:
    torch.manual_seed(1)
    weight = torch.randn(h.shape, dtype=h.dtype)
    return torch.autograd.grad((h * weight.conj()).real.sum(), leaves)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["real", "complex"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scan_equals_unrolling_with_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, constant: bool, rate: float
):
    a, b, start, reset = draw(shape, dtype, rate, constant)
    h, expected = scan_ops.run(a, b, start, reset), unroll(a, b, start, reset)
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-12)
    pairs = zip(grads_of(h, (a, b, start)), grads_of(expected, (a, b, start)), strict=True)
    for actual, grad in pairs:
        torch.testing.assert_close(actual, grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 300, 1 << 16])
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_scan_equals_unrolling_with_gradients(
    shape: tuple[int, ...], rate: float, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(linear_steps, "_CHUNK", chunk)
    _, _, start, reset = draw(shape, torch.float64, rate, False)
    p = torch.randn(*shape[:2], 2 * shape[2], dtype=torch.float64, requires_grad=True)
    h = scan_ops.gated(p, start, reset)
    a, b = mix_coefficients(*p.chunk(2, -1))
    expected = unroll(a, b, start, reset)
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-12)
    pairs = zip(grads_of(h, (p, start)), grads_of(expected, (p, start)), strict=True)
    for actual, grad in pairs:
        torch.testing.assert_close(actual, grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(70, 2, 3), (70, 50, 60)], ids=["blocks", "loop"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scan_value_that_is_not_finite_does_not_pass_a_reset(shape: tuple[int, ...], bad: float):
    a, b, start, reset = draw(shape, torch.float64, 0.1, False)
    reset[20, 0] = True
    clean = scan_ops.run(a, b, start, reset)
    spoiled = b.detach().clone()
    spoiled[18, 0] = bad
    h = scan_ops.run(a, spoiled, start, reset)
    assert_equal(h[20:], clean[20:], torch.float64)
    grad = torch.randn_like(clean)
    expected = scan_ops.scan_backward(grad, a, clean, start, reset, True, False)[1]
    grad[20, 0] = bad
    actual = scan_ops.scan_backward(grad, a, clean, start, reset, True, False)[1]
    assert_equal(actual[:20], expected[:20], torch.float64)


def test_scan_whose_products_of_decays_overflow_is_right():
    a = torch.full((64, 1, 1), 1e30, dtype=torch.float64)
    b = torch.zeros(64, 1, 1, dtype=torch.float64)
    reset = torch.zeros(64, 1, dtype=torch.bool)
    assert not scan_ops.run(a, b, b, reset).any()


def test_scan_operators_pass_opcheck():
    a, b, start, reset = draw((40, 3, 4), torch.float64, 0.2, False)
    p = torch.randn(40, 3, 8, dtype=torch.float64, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(scan_ops.scan, (a, b, start, reset, False), test_utils=tests)
    opcheck(scan_ops.gated, (p, start, reset), test_utils=tests)


@pytest.mark.parametrize("constant", [False, True])
def test_linear_scan_maps_over_decays(constant: bool):
    a = torch.rand((5, 4) if constant else (5, 2, 40, 4), dtype=torch.float64)
    b = torch.randn(2, 40, 4, dtype=torch.float64)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return linear_scan(a, b).square().sum()

    for function in (linear_scan, loss, torch.func.grad(loss), torch.func.grad(loss, 1)):
        expected = torch.stack([function(one, b) for one in a])
        assert_equal(torch.vmap(function, (0, None))(a, b), expected, torch.float64)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("mapped", [0, 1])
def test_linear_scan_maps_over_initial_states_or_flags_alone(mapped: int, constant: bool):
    a = torch.rand((4,) if constant else (2, 40, 4), dtype=torch.float64)
    b = torch.randn(2, 40, 4, dtype=torch.float64)
    given = [torch.randn(5, 2, 4, dtype=torch.float64), torch.rand(5, 2, 40) < 0.1]
    given[1 - mapped] = given[1 - mapped][0]
    dims = (None, None, *((0, None) if mapped == 0 else (None, 0)))
    single = [(one, given[1]) if mapped == 0 else (given[0], one) for one in given[mapped]]
    expected = torch.stack([linear_scan(a, b, *one) for one in single])
    assert_equal(torch.vmap(linear_scan, dims)(a, b, *given), expected, torch.float64)


def test_linear_scan_under_vmap_has_gradients():
    a = torch.rand(5, 2, 40, 4, dtype=torch.float64, requires_grad=True)
    constant = torch.rand(5, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 40, 4, dtype=torch.float64, requires_grad=True)
    for decay in (a, constant):
        mapped = torch.vmap(linear_scan, (0, None))(decay, b)
        listed = torch.stack([linear_scan(one, b) for one in decay])
        pairs = zip(grads_of(mapped, (decay, b)), grads_of(listed, (decay, b)), strict=True)
        for actual, expected in pairs:
            assert_equal(actual, expected, torch.float64)


@pytest.mark.parametrize("with_start", [False, True])
@pytest.mark.parametrize("kind", ["constant", "steps", "gated"])
def test_scan_gradients_of_several_cotangents_at_once_are_those_of_each(
    kind: str, with_start: bool
):
    options: Any = {"dtype": torch.float64, "requires_grad": True}
    shapes = {"constant": (4,), "steps": (40, 2, 4), "gated": (40, 2, 8)}
    first, b = torch.rand(shapes[kind], **options), torch.randn(40, 2, 4, **options)
    start = torch.randn(40, 2, 4, dtype=torch.float64, requires_grad=with_start)
    reset = torch.rand(40, 2) < 0.2
    if kind == "gated":
        leaves, y = [first], scan_ops.run_gated(first, start, reset)
    else:
        leaves, y = [first, b], scan_ops.run(first, b, start, reset)
    leaves += [start] if with_start else []
    cotangents = torch.randn(3, *y.shape, dtype=torch.float64)

    def pull_back(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, cotangent, retain_graph=True)

    actual = torch.vmap(pull_back)(cotangents)
    listed = map(pull_back, cotangents)
    for found, *expected in zip(actual, *listed, strict=True):
        assert_equal(found, torch.stack(expected), torch.float64)


def _gated_sine(p: Tensor, start: Tensor) -> Tensor:
    reset = torch.zeros(p.shape[:2], dtype=torch.bool)
    return scan_ops.run_gated(p, start, reset).sin()


@pytest.mark.parametrize(
    ("function", "sizes"),
    [(lambda a, b: linear_scan(a, b).sin(), (4, 4)), (_gated_sine, (8, 4))],
    ids=["linear", "gated"],
)
def test_scan_compiles_to_one_graph(function: Any, sizes: tuple[int, int]):
    first, second = (torch.rand(2, 40, size, requires_grad=True) for size in sizes)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    pairs = zip(
        torch.autograd.grad(compiled(first, second).sum(), (first, second)),
        torch.autograd.grad(function(first, second).sum(), (first, second)),
        strict=True,
    )
    for actual, expected in pairs:
        assert_equal(actual, expected, torch.float32)


def test_scan_compiled_graph_does_not_grow_with_time():
    graphs: list[torch.fx.Graph] = []

    def keep_graph(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    for steps in (4, 200):
        a, b = torch.rand(2, steps, 3), torch.rand(2, steps, 3)
        compiled = torch.compile(linear_scan, fullgraph=True, dynamic=False, backend=keep_graph)
        assert_equal(compiled(a, b), linear_scan(a, b), torch.float32)
    short, long = ([str(node.target) for node in graph.nodes] for graph in graphs)
    assert short == long
    assert sum("linear_scan" in target for target in short) == 1


def test_linear_scan_starts_from_initial_states():
    a, b = torch.rand(2, 3, 4), torch.randn(2, 3, 4)
    initial, is_init = torch.randn(2, 4), torch.tensor([[False, True, False], [False] * 3])
    h = linear_scan(a, b, initial, is_init)
    assert_equal(h[:, 0], a[:, 0] * initial + b[:, 0], torch.float32)
    assert torch.equal(h[0, 1], b[0, 1])
    stored = torch.randn(2, 3, 4)
    h = linear_scan(a, b, stored, is_init)
    assert_equal(h[0, 1], a[0, 1] * stored[0, 1] + b[0, 1], torch.float32)
    assert linear_scan(a[:, :0], b[:, :0]).shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"b": torch.zeros(2, 3)}, ValueError, r"b must have the shape \[B, T, F\]"),
        ({"a": torch.zeros(2, 3, 5)}, ValueError, r"a must have the shape of b"),
        ({"a": torch.zeros(4).double()}, TypeError, r"a must have the dtype of b"),
        ({"initial": torch.zeros(4)}, ValueError, r"initial must have the shape \[B, F\]"),
        ({"is_init": torch.zeros(2, 3)}, TypeError, r"is_init must be bool.*\.bool\(\)"),
        ({"is_init": torch.zeros(3, 2).bool()}, ValueError, r"is_init must have the shape"),
        ({"b": [1.0]}, TypeError, r"b must be a tensor. Got a list"),
        ({"b": torch.zeros(2, 3, 4).bool()}, TypeError, r"b must be floating or complex.*bool"),
        ({"a": torch.zeros(4, device="meta")}, ValueError, "a must be on the device of b, cpu"),
        ({"is_init": [True]}, TypeError, r"is_init must be a tensor. Got a list"),
    ],
)
def test_linear_scan_names_a_bad_argument(change: dict[str, Any], error: Any, text: str):
    arguments: Any = {"a": torch.zeros(2, 3, 4), "b": torch.zeros(2, 3, 4), **change}
    with pytest.raises(error, match=text):
        linear_scan(**arguments)


def test_scan_second_derivative_names_the_backend_that_has_it():
    a, b, start, reset = draw((5, 2, 3), torch.float64, 0.2, False)
    (grad,) = torch.autograd.grad(
        scan_ops.run(a, b, start, reset).square().sum(), a, create_graph=True
    )
    with pytest.raises(RuntimeError, match="recurrent_backend='loop'"):
        grad.sum().backward()
