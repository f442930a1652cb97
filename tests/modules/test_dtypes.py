"""Every dtype computes what float64 does within its tolerance, and states keep the parameters'."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor

from rnnkeys import set_recurrent_mode
from tests.support import recurrent
from tests.support.tolerances import assert_equal

BF16 = torch.bfloat16
DTYPES = [torch.float64, torch.float32, BF16]
of_both_cells = pytest.mark.parametrize("kind", ["lstm", "gru"])
in_every_backend = pytest.mark.parametrize("backend", recurrent.BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _as_double(module: Any, data: TensorDictBase) -> tuple[Any, TensorDictBase]:
    """Return the same problem in float64."""
    doubled = data.apply(lambda t: t.double() if t.is_floating_point() else t)
    assert doubled is not None
    return copy.deepcopy(module).double(), doubled


def _gradients(module: Any, out: TensorDictBase) -> dict[str, Tensor]:
    torch.manual_seed(5)
    d_y = torch.randn(out["embed"].shape, dtype=torch.float64)
    loss = (out["embed"].double() * d_y).sum()
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def _assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype | str
) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert_equal(tensor, expected[name], dtype, name)


@in_every_dtype
@in_every_backend
@of_both_cells
def test_sequences_equal_those_in_float64(kind, backend, dtype):
    module = recurrent.make(kind, dtype=dtype, recurrent_backend=backend, num_layers=2)
    data = recurrent.batch(module, (4, 12), flag_rate=0.2)
    exact, exact_data = _as_double(module, data)
    out, expected = recurrent.recurrently(module, data), recurrent.by_hand(exact, exact_data)
    _assert_same(recurrent.outputs(module, out), recurrent.outputs(module, expected), dtype)
    _assert_same(_gradients(module, out), _gradients(exact, expected), dtype)


@in_every_dtype
@in_every_backend
@of_both_cells
def test_sequences_equal_single_steps(kind, backend, dtype):
    """What a policy saw while it collected is what its loss sees."""
    module = recurrent.make(kind, dtype=dtype, recurrent_backend=backend)
    data = recurrent.batch(module, (4, 12), flag_rate=0.2)
    out, steps = recurrent.recurrently(module, data), recurrent.by_hand(module, data)
    _assert_same(recurrent.outputs(module, out), recurrent.outputs(module, steps), dtype)


@pytest.mark.parametrize("in_sequences", [False, True], ids=["step", "sequence"])
@in_every_dtype
@of_both_cells
def test_outputs_and_states_have_the_dtype_of_the_parameters(kind, dtype, in_sequences):
    module = recurrent.make(kind, dtype=dtype, num_layers=2)
    for states in (True, False):
        data = recurrent.batch(module, (4, 12), states=states, flag_rate=1.0)
        with set_recurrent_mode(in_sequences):
            out = module(data)
        assert {t.dtype for t in recurrent.outputs(module, out).values()} == {dtype}
    primer = module.make_tensordict_primer().primers
    assert {spec.dtype for spec in primer.values(True, True)} == {dtype}


@pytest.mark.parametrize("in_sequences", [False, True], ids=["step", "sequence"])
@of_both_cells
def test_stored_states_of_another_dtype_are_cast(kind, in_sequences):
    """A buffer filled before the module was halved can still be learned from."""
    module = recurrent.make(kind, dtype=BF16)
    data = recurrent.batch(module, (4, 12))
    wide = data.clone()
    for key in module.state_keys:
        wide.set(key, data.get(key).float())
    with set_recurrent_mode(in_sequences):
        out, expected = module(wide), module(data)
    for name, tensor in recurrent.outputs(module, out).items():
        assert tensor.dtype == BF16
        assert torch.equal(tensor, recurrent.outputs(module, expected)[name])


@pytest.mark.parametrize("in_sequences", [False, True], ids=["step", "sequence"])
@of_both_cells
def test_input_of_another_dtype_raises_by_name(kind, in_sequences):
    module = recurrent.make(kind)
    data = recurrent.batch(module, (4, 12))
    data["observation"] = data["observation"].double()
    with (
        set_recurrent_mode(in_sequences),
        pytest.raises(RuntimeError, match=r"float64.*float32.*DoubleToFloat"),
    ):
        module(data)


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=BF16)


@in_every_backend
@of_both_cells
def test_autocast_computes_in_bfloat16_and_keeps_states_in_float32(kind, backend):
    """States are written as the primer made them: a collector's entries do not change dtype."""
    module = recurrent.make(kind, recurrent_backend=backend, num_layers=2)
    data = recurrent.batch(module, (4, 12), flag_rate=0.2)
    exact, exact_data = _as_double(module, data)
    with _autocast():
        out, steps = recurrent.recurrently(module, data), recurrent.by_hand(module, data)
    expected = recurrent.by_hand(exact, exact_data)
    for ran in (out, steps):
        assert ran["embed"].dtype == BF16
        assert {ran.get(("next", key)).dtype for key in module.state_keys} == {torch.float32}
        _assert_same(recurrent.outputs(module, ran), recurrent.outputs(module, expected), BF16)
    gradients = _gradients(module, out)
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    _assert_same(gradients, _gradients(exact, expected), BF16)


@in_every_backend
@of_both_cells
def test_autocast_leaves_float64_alone(kind, backend):
    module = recurrent.make(kind, recurrent_backend=backend, dtype=torch.float64)
    data = recurrent.batch(module, (4, 12), flag_rate=0.2)
    expected = recurrent.recurrently(module, data)
    with _autocast():
        out, steps = recurrent.recurrently(module, data), recurrent.by_hand(module, data)
    for name, tensor in recurrent.outputs(module, out).items():
        assert torch.equal(tensor, recurrent.outputs(module, expected)[name])
        assert_equal(recurrent.outputs(module, steps)[name], tensor, torch.float64, name)


@of_both_cells
def test_autocast_is_on_again_after_a_call(kind):
    module = recurrent.make(kind)
    data = recurrent.batch(module, (4, 12))
    with _autocast():
        recurrent.recurrently(module, data)
        assert torch.is_autocast_enabled("cpu")
