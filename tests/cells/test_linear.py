"""Linear cells: their equations, and sequences against single steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from rnnkeys import recurrent_module, set_recurrent_mode
from rnnkeys.backends import why_not
from rnnkeys.cells import (
    FFM_CELL,
    LRU_CELL,
    MIN_GRU_CELL,
    MIN_LSTM_CELL,
    S5_CELL,
    S6,
    S6_CELL,
    LinearCell,
    ResidualBlock,
)
from rnnkeys.modules import CellModule, RecurrentModule
from tests.support.reference_linear import STEPS
from tests.support.tolerances import assert_equal, relative_error

PLAIN = [MIN_GRU_CELL, MIN_LSTM_CELL, LRU_CELL, S5_CELL, S6_CELL, FFM_CELL]
CELLS = [*PLAIN, *(ResidualBlock(cell) for cell in (MIN_GRU_CELL, S5_CELL, S6_CELL))]
NAMES = [cell.name for cell in CELLS]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_module(cell: LinearCell, backend: str = "auto") -> RecurrentModule:
    return CellModule(
        cell, 3, 6, 2, in_key="x", out_key="y", state_grad=True, recurrent_backend=backend
    )


def make_batch(module: RecurrentModule, steps: int, rate: float = 0.2) -> TensorDict:
    sizes = zip(module.state_keys, module.state_sizes, strict=True)
    states = {key: torch.randn(4, steps, 2, size).requires_grad_() for key, size in sizes}
    x = torch.randn(4, steps, 3).requires_grad_()
    is_init = torch.rand(4, steps, 1) < rate
    return TensorDict({"x": x, "is_init": is_init, **states}, [4, steps])


def run_sequence(module: RecurrentModule, batch: TensorDict) -> tuple[Tensor, ...]:
    """Return outputs and the states after every step."""
    with set_recurrent_mode(True):
        out = module(batch.copy())
    return out["y"], *(out.get(("next", key)) for key in module.state_keys)


def run_steps(module: RecurrentModule, batch: TensorDict) -> tuple[Tensor, ...]:
    """One time step after the other, the state selected by hand where a segment starts."""
    steps: list[tuple[Tensor, ...]] = []
    for t in range(batch.shape[1]):
        is_start = batch["is_init"][:, t, :, None] | (t == 0)
        step = TensorDict({"x": batch["x"][:, t], "is_init": torch.zeros(4, 1).bool()}, [4])
        for i, key in enumerate(module.state_keys):
            stored = batch.get(key)[:, t]
            step.set(key, torch.where(is_start, stored, steps[-1][1 + i]) if t else stored)
        out = module(step)
        steps.append((out["y"], *(out.get(("next", key)) for key in module.state_keys)))
    return tuple(torch.stack(entry, 1) for entry in zip(*steps, strict=True))


# A window of two steps is the shortest that a convolution has.
@pytest.mark.parametrize(
    "cell", [*PLAIN, S6(window_len=2)], ids=[*NAMES[: len(PLAIN)], "s6 of two steps"]
)
def test_linear_cell_step_equals_numpy(cell: LinearCell):
    module = make_module(cell)
    shapes = cell.parameter_shapes(3, 6)
    weights = {name: torch.randn(shape) / 2 for name, shape in shapes.items()}
    x, state = torch.randn(5, 3), tuple(torch.randn(5, size) for size in module.state_sizes)
    arrays = {name: value.numpy() for name, value in weights.items()}
    expected = STEPS[cell.name](arrays, x.numpy(), *(s.numpy() for s in state))
    y, after = cell(weights, x, state)
    for actual, reference in zip((y, *after), expected, strict=True):
        assert_equal(actual, torch.from_numpy(np.ascontiguousarray(reference)), torch.float64)


@pytest.mark.parametrize("steps", [1, 7, 70])
@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_linear_module_sequence_equals_single_steps(cell: LinearCell, steps: int):
    module = make_module(cell)
    batch = make_batch(module, steps)
    leaves = [batch["x"], *(batch.get(key) for key in module.state_keys), *module.parameters()]
    results = []
    for run in (run_sequence, run_steps):
        out = run(module, batch)
        torch.manual_seed(1)
        grads = torch.autograd.grad(out, leaves, [torch.randn_like(value) for value in out])
        results.append((*out, *grads))
    for actual, expected in zip(*results, strict=True):
        if expected.any():  # with one step, decays of zero states have no gradient
            assert_equal(actual, expected, torch.float64)


@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_linear_module_scan_equals_loop(cell: LinearCell):
    module = make_module(cell, "loop")
    batch = make_batch(module, 40)
    expected, *_ = run_sequence(module, batch)
    module.recurrent_backend = "scan"
    assert_equal(run_sequence(module, batch)[0], expected, torch.float64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps", [20, 70])
@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_linear_module_bad_input_stays_in_its_episode(cell: LinearCell, steps: int, bad: float):
    module = make_module(cell)
    batch = make_batch(module, steps, 0.0)
    batch["is_init"][:, 12] = True
    expected, *_ = run_sequence(module, batch)
    with torch.no_grad():
        batch["x"][0, 9] = bad
    y, *_ = run_sequence(module, batch)
    assert_equal(y[1:], expected[1:], torch.float64)
    assert_equal(y[0, 12:], expected[0, 12:], torch.float64)
    grad = torch.autograd.grad(y[:, 12:].sum(), batch["x"])[0]
    assert grad[:, 12:].isfinite().all()
    assert not grad[1:, :12].any()


@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_linear_module_maps_over_parameters(cell: LinearCell):
    module = make_module(cell)
    batch = make_batch(module, 9).detach()
    values = {k: torch.stack([v.detach(), v.detach() / 2]) for k, v in module.named_parameters()}

    def call(parameters: dict[str, Tensor]) -> Tensor:
        with set_recurrent_mode(True):
            out = torch.func.functional_call(module, parameters, (batch.copy(),))
        return out["y"]

    expected = torch.stack([call({k: v[i] for k, v in values.items()}) for i in range(2)])
    assert_equal(torch.vmap(call)(values), expected, torch.float64)


def draw_parameters(cell: LinearCell, hidden_size: int) -> dict[str, Tensor]:
    shapes = cell.parameter_shapes(3, hidden_size)
    parameters = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    cell.reset_parameters(parameters, hidden_size)
    return parameters


@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_linear_cell_gives_every_parameter_a_finite_value(cell: LinearCell):
    assert all(value.isfinite().all() for value in draw_parameters(cell, 32).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_s5_frequencies_are_those_of_the_normal_part_of_hippo_legs(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    n = np.arange(128)
    root, low_rank = np.sqrt(2 * n + 1), np.sqrt(n + 0.5)
    hippo = -np.tril(np.outer(root, root), -1) - np.diag(n + 1)
    eigenvalues = np.linalg.eigvals(hippo + np.outer(low_rank, low_rank))
    np.testing.assert_allclose(eigenvalues.real, -0.5, atol=1e-9)
    expected = torch.from_numpy(np.sort(eigenvalues.imag)[64:])
    frequency = draw_parameters(S5_CELL, 128)["frequency"].sort().values
    # Computed in float64, whatever the dtype of the parameters.
    error = (frequency / expected - 1).abs().max().item()
    assert error < max(2 * torch.finfo(dtype).eps, 1e-10)


def test_s5_starts_with_one_rate_and_steps_in_their_range():
    parameters = draw_parameters(S5_CELL, 256)
    torch.testing.assert_close(parameters["rate_log"].exp(), torch.full((128,), 0.5))
    steps = parameters["step_log"].exp()
    assert S5_CELL.min_step <= steps.min() < 2 * S5_CELL.min_step
    assert S5_CELL.max_step / 2 < steps.max() <= S5_CELL.max_step


@pytest.mark.parametrize(("drawn", "radius", "phase"), [(0.0, 0.9, np.pi / 10), (0.999, 0.999, 0)])
def test_lru_draws_decays_on_its_ring_and_scales_that_fit(
    monkeypatch: pytest.MonkeyPatch, drawn: float, radius: float, phase: float
):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, drawn))
    parameters = draw_parameters(LRU_CELL, 4)
    found = torch.exp(-parameters["nu_log"].exp())
    assert found[0].item() == pytest.approx(radius, abs=1e-4)
    assert parameters["theta_log"][0].exp().item() == pytest.approx(phase, abs=1e-3)
    torch.testing.assert_close(parameters["gamma_log"].exp(), (1 - found**2).sqrt())


def test_diagonal_cell_starts_with_maps_of_the_papers_variance():
    """``1 / (2 I)`` into the ``N`` complex modes, ``1 / N`` out of them."""
    parameters = draw_parameters(LRU_CELL, 256)
    variances = {"weight_ih": 1 / 6, "weight_out": 1 / 256, "weight_skip": 1 / 3}
    for name, variance in variances.items():
        assert parameters[name].var().item() == pytest.approx(variance, rel=0.2)
    assert not parameters["bias_skip"].any()


def test_ffm_starts_with_rates_and_periods_spread_evenly():
    parameters = draw_parameters(FFM_CELL, 12)
    rates, longest = parameters["rate"], FFM_CELL.max_period
    assert rates[0].item() == 0.67 and torch.exp(-rates[-1] * longest).item() == pytest.approx(0.01)
    periods = 2 * np.pi / parameters["frequency"]
    torch.testing.assert_close(periods, torch.linspace(1, longest, FFM_CELL.num_contexts))
    for values in (rates, periods):
        torch.testing.assert_close(values.diff(), values.diff()[:1].expand(len(values) - 1))


def test_s6_starts_with_rates_of_whole_numbers_and_steps_in_their_range():
    parameters = draw_parameters(S6_CELL, 64)
    assert (parameters["skip"] == 1).all()
    rates = torch.arange(1.0, S6_CELL.state_size + 1)
    torch.testing.assert_close(parameters["rate_log"].exp(), rates.expand(64, -1))
    steps = torch.nn.functional.softplus(parameters["bias_step"])
    assert S6_CELL.min_step <= steps.min() < 2 * S6_CELL.min_step
    assert S6_CELL.max_step / 2 < steps.max() <= S6_CELL.max_step


MAPS: list[tuple[LinearCell, dict[str, int]]] = [
    (FFM_CELL, {"weight_ih": 3, "bias_ih": 64, "weight_out": 128, "bias_out": 128}),
    (S6_CELL, {"weight_ih": 3, "weight_conv": 4, "weight_select": 64, "weight_step": 4}),
    (S6_CELL, {"bias_ih": 3, "bias_conv": 4, "weight_out": 64, "bias_out": 64}),
]


@pytest.mark.parametrize(("cell", "fan_ins"), MAPS)
def test_linear_cell_starts_with_uniform_maps(cell: LinearCell, fan_ins: dict[str, int]):
    parameters = draw_parameters(cell, 64)
    for name, fan_in in fan_ins.items():
        largest = parameters[name].abs().max().item() * fan_in**0.5
        assert 0.9 < largest <= 1, name


@pytest.mark.parametrize(("hidden_size", "rank"), [(16, 1), (64, 4), (65, 5)])
def test_s6_step_has_a_rank_of_a_sixteenth_rounded_up(hidden_size: int, rank: int):
    shapes = S6_CELL.parameter_shapes(3, hidden_size)
    assert shapes["weight_step"] == (hidden_size, rank)
    assert shapes["weight_select"] == (rank + 2 * S6_CELL.state_size, hidden_size)


def test_ffm_state_holds_two_numbers_for_each_trace_and_context():
    assert FFM_CELL.num_contexts == 4 and FFM_CELL.state_sizes(10) == (2 * 3 * 4,)


def test_linear_cells_name_what_they_cannot_do():
    with pytest.raises(RuntimeError, match="'mingru' has none.*Use 'scan' or 'auto'"):
        make_module(MIN_GRU_CELL, "pad")
    with pytest.raises(ValueError, match="hidden_size=5: use 6"):
        CellModule(S5_CELL, 3, 5, in_key="x", out_key="y")
    weights = make_module(LRU_CELL).layers
    assert "recurrent_recompute='full'" in str(why_not("scan", LRU_CELL, weights, "full"))
    assert "Use 'scan' or 'auto'" in str(why_not("triton", LRU_CELL, weights))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("mingru", {"block": "deep"}, "block must be one of 'plain', 'residual'. Got 'deep'"),
        ("gru", {"block": "residual"}, "Got block='residual' with kind='gru'"),
        ("mingru", {"proj_size": 2}, "MinGRUModule has no such argument. Got proj_size=2"),
        ("lru", {"bidirectional": True}, "LRUModule has no such argument. Got bidirectional=True"),
        ("s6", {"batch_first": False}, "S6Module has no such argument. Got batch_first=False"),
        ("s5", {"hidden_size": 5}, "hidden_size=5: use 6"),
        ("s5", {"min_step": 0.0}, "min_step must be above 0. Got min_step=0.0"),
        ("s6", {"min_step": 1.0}, "Got min_step=1.0, max_step=0.1"),
        ("s6", {"window_len": 1}, "window_len must be an int of at least 2. Got window_len=1"),
        ("s6", {"state_size": 0}, "state_size must be an int of at least 1. Got state_size=0"),
        ("lru", {"max_radius": 1.0}, "Got min_radius=0.9, max_radius=1.0"),
        ("lru", {"min_radius": -0.1}, "min_radius must be a number from 0.0 to 1.0. Got min_rad"),
        ("lru", {"max_phase": 0.0}, "max_phase must be above 0. Got max_phase=0.0"),
        ("ffm", {"num_contexts": 0}, "num_contexts must be an int of at least 1"),
        ("ffm", {"max_period": 1.0}, "max_period must be above 1 step. Got max_period=1.0"),
        ("rnn", {"nonlinearity": "gelu"}, "nonlinearity must be one of 'tanh', 'relu'. Got 'gelu'"),
        ("esn", {}, "kind must be one of 'lstm', .* Got 'esn'"),
    ],
)
def test_recurrent_module_bad_argument_raises_by_name(kind: str, arguments: Any, message: str):
    sizes = {"input_size": 3, "hidden_size": 6, **arguments}
    with pytest.raises(ValueError, match=message):
        recurrent_module(kind, **sizes, in_key="x", out_key="y")


def test_recurrent_module_accepts_torchs_arguments_at_their_defaults():
    torchs = {"batch_first": True, "proj_size": 0, "python_based": False}
    module = recurrent_module("mingru", 3, 6, in_key="x", out_key="y", **torchs)
    assert module.cell.name == "mingru_residual"


@pytest.mark.parametrize("cell", PLAIN, ids=NAMES[: len(PLAIN)])
def test_linear_cell_in_float32_stays_close_over_4096_steps(cell: LinearCell):
    """A state that lasts 1,000 steps multiplies a decay's rounding, 6e-8, by as much.

    The norm of an output divides by what may be small, and so has no such bound.
    """
    module = make_module(cell)
    x = torch.randn(2, 4096, 3)
    batch = TensorDict({"x": x, "is_init": torch.zeros(2, 4096, 1).bool()}, [2, 4096])
    _, *expected = run_sequence(module, batch)
    _, *actual = run_sequence(module.float(), batch.set("x", x.float()))
    for state, right in zip(actual, expected, strict=True):
        assert relative_error(state.double(), right) < 1000 * 2 * 6e-8


@pytest.mark.parametrize("name", ["mingru", "minlstm", "lru", "s5", "s6", "ffm"])
def test_linear_cell_whose_norm_has_one_feature_is_rejected(name: str) -> None:
    """LayerNorm makes a single feature zero, so no state would reach the output."""
    with pytest.raises(ValueError, match=r"hidden_size must be at least 2 .*'plain'.*\[argument\]"):
        recurrent_module(name, 3, 1, in_key="x", out_key="y")


def test_linear_cell_of_one_feature_without_a_norm_reads_its_states() -> None:
    module = recurrent_module("mingru", 3, 1, in_key="x", out_key="y", block="plain")
    batch = TensorDict({"x": torch.randn(4, 5, 3)}, [4, 5])
    batch["is_init"] = torch.zeros(4, 5, 1, dtype=torch.bool)
    before = run_sequence(module, batch)[0]
    batch["x"][:, 0] += 1.0
    assert (run_sequence(module, batch)[0][:, -1] - before[:, -1]).abs().min() > 0
