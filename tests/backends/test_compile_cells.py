"""``torch.compile`` runs cells that torch has no class for, and R2D2's loss, as eager does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.modules.test_custom_cells import KINDS
from tests.support.compiled import assert_same, in_mode, run_with_gradients
from tests.support.r2d2 import make_loss, make_network, make_windows
from tests.support.recurrent import F64, batch
from tests.support.tolerances import assert_equal


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("in_sequences", [False, True])
@pytest.mark.parametrize("kind", ["lstm_ln", "cell", "step"])
def test_compiled_module_is_one_graph_and_agrees_with_eager(kind, in_sequences):
    module = KINDS[kind]().double()
    call, data = in_mode(module, in_sequences), batch(module, (3, 4))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=False)
    actual, expected = (
        run_with_gradients(module, compiled, data),
        run_with_gradients(module, call, data),
    )
    assert_same(actual, expected)


# Dynamo breaks the graph where episodes' ends are counted, and warns of it.
@pytest.mark.filterwarnings("ignore")
def test_compiled_r2d2_loss_agrees_with_eager():
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
