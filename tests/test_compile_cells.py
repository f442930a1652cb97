"""``torch.compile`` runs cells that torch has no class for, and R2D2's loss, as eager does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor

from rnnkeys import set_recurrent_mode
from tests.recurrent import F64, batch, outputs
from tests.test_custom_cells import KINDS
from tests.test_r2d2 import make_loss, make_network, make_windows
from tests.tolerances import assert_equal


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _call(module: Any, in_sequences: bool) -> Callable[[TensorDictBase], TensorDictBase]:
    def call(data: TensorDictBase) -> TensorDictBase:
        with set_recurrent_mode(in_sequences):
            return module(data)

    return call


def _run(module: Any, call: Callable[..., Any], data: TensorDictBase) -> dict[str, Tensor]:
    """Return outputs, states, and the gradients of parameters."""
    out = call(data.clone())
    torch.manual_seed(5)
    names, weights = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(out["embed"], weights, torch.randn_like(out["embed"]))
    return outputs(module, out) | dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("in_sequences", [False, True])
@pytest.mark.parametrize("kind", ["lstm_ln", "cell", "step"])
def test_a_module_is_one_graph_and_agrees_with_eager(kind, in_sequences):
    module = KINDS[kind]().double()
    call, data = _call(module, in_sequences), batch(module, (3, 4))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=False)
    actual, expected = _run(module, compiled, data), _run(module, call, data)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(actual[name], tensor, F64, name)


# Dynamo breaks the graph where episodes' ends are counted, and warns of it.
@pytest.mark.filterwarnings("ignore")
def test_the_loss_of_r2d2_agrees_with_eager():
    # One network and no burn-in: fewer graphs, which take seconds each.
    online = make_network(0)
    loss = make_loss(online, online, burn_in=0, double_dqn=False, delay_value=False)
    compiled: Any = torch.compile(loss, backend="aot_eager")
    results = []
    for call in (loss, compiled):
        windows = make_windows()
        loss.zero_grad()
        value = call(windows)["loss"]
        value.backward()
        grads = [p.grad for p in loss.parameters() if p.grad is not None]
        results.append([value.detach(), windows["td_error"], *grads])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_equal(actual, expected, F64)
    other = make_windows()
    other["next", "reward"] *= 2
    assert_equal(compiled(other.clone())["loss"], loss(other)["loss"], F64)
