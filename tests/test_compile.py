"""``torch.compile`` takes the modules whole, in graphs that do not grow with time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call, stack_module_state, vmap

import rnnkeys
from rnnkeys import set_recurrent_mode
from tests import recurrent
from tests.tolerances import assert_equal

F64 = torch.float64
of_both_cells = pytest.mark.parametrize("kind", ["lstm", "gru"])
in_both_modes = pytest.mark.parametrize("in_sequences", [False, True], ids=["step", "sequence"])


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled(function: Callable[..., Any], backend: Any = "aot_eager") -> Any:
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


def _call(module: Any, in_sequences: bool) -> Callable[[TensorDictBase], TensorDictBase]:
    def call(data: TensorDictBase) -> TensorDictBase:
        with set_recurrent_mode(in_sequences):
            return module(data)

    return call


def _assert_same(
    module: Any, actual: TensorDictBase, expected: TensorDictBase, parameters: bool = True
) -> None:
    """Compare outputs, states, and the gradients of a loss that reads the outputs."""
    for name, tensor in recurrent.outputs(module, expected).items():
        assert_equal(recurrent.outputs(module, actual)[name], tensor, F64, name)
    weights = [p for p in module.parameters() if p.requires_grad]
    d_y = torch.randn_like(expected["embed"])
    grads = [torch.autograd.grad(out["embed"], weights, d_y) for out in (actual, expected)]
    for i, (a, b) in enumerate(zip(*grads, strict=True)):
        assert_equal(a, b, F64, f"gradient {i}")


@pytest.mark.parametrize("backend", recurrent.BACKENDS)
@in_both_modes
@of_both_cells
def test_a_module_is_one_graph_and_agrees_with_the_loop(kind, in_sequences, backend):
    module = recurrent.make(kind, dtype=F64, recurrent_backend=backend, num_layers=2)
    reference = recurrent.make(kind, dtype=F64, recurrent_backend="loop", num_layers=2)
    reference.load_state_dict(module.state_dict())
    data = recurrent.batch(module, (3, 5))
    actual = _compiled(_call(module, in_sequences))(data.clone())
    expected = _call(reference, in_sequences)(data.clone())
    _assert_same(module, actual, expected)
