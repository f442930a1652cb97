"""Calls of modules that can be compiled, and what they give, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from rnnkeys import set_recurrent_mode
from tests.support import recurrent
from tests.support.recurrent import F64
from tests.support.tolerances import assert_equal


def in_mode(module: Any, in_sequences: bool = True) -> Callable[[TensorDictBase], TensorDictBase]:
    def call(data: TensorDictBase) -> TensorDictBase:
        with set_recurrent_mode(in_sequences):
            return module(data)

    return call


def run_with_gradients(
    module: Any, call: Callable[..., Any], data: TensorDictBase
) -> dict[str, Tensor]:
    """Return outputs, states, and the gradients of a loss that reads the outputs."""
    out = call(data.clone())
    torch.manual_seed(5)
    names, weights = zip(*module.named_parameters(), strict=True)
    d_y = torch.randn(out["embed"].shape, dtype=out["embed"].dtype)
    grads = torch.autograd.grad(out["embed"], weights, d_y)
    return recurrent.outputs(module, out) | dict(zip(names, grads, strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype=F64) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(actual[name], tensor, dtype, name)
