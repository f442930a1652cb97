"""``torch.compile`` takes the modules whole, in graphs that do not grow with time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from torch.func import functional_call, stack_module_state, vmap

import rnnkeys
from rnnkeys import set_recurrent_mode
from tests.support import recurrent
from tests.support.compiled import assert_same, in_mode, run_with_gradients
from tests.support.tolerances import assert_equal

F64 = torch.float64
of_both_cells = pytest.mark.parametrize("kind", ["lstm", "gru"])


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled(function: Callable[..., Any], backend: Any = "aot_eager") -> Any:
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


class _Graphs:
    """A backend that runs graphs as they are and counts their nodes, backward graphs apart."""

    def __init__(self) -> None:
        self.forward: list[int] = []
        self.backward: list[int] = []
        self.backend = aot_autograd(
            fw_compiler=self._into(self.forward), bw_compiler=self._into(self.backward)
        )

    @staticmethod
    def _into(counts: list[int]) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            counts.append(len(graph.graph.nodes))
            return make_boxed_func(graph.forward)

        return compiler


def _pair(kind: str, **arguments: Any) -> tuple[Any, Any]:
    """Return a module and one with the same parameters that runs the plain loop."""
    arguments = {"dtype": F64, **arguments}
    module = recurrent.make(kind, **arguments)
    loop = recurrent.make(kind, **{**arguments, "recurrent_backend": "loop"})
    loop.load_state_dict(module.state_dict())
    return module, loop


@pytest.mark.parametrize(
    ("backend", "in_sequences"), [("auto", False), ("auto", True), ("pad", True), ("loop", True)]
)
@of_both_cells
def test_compiled_module_is_one_graph_and_agrees_with_the_loop(kind, backend, in_sequences):
    module, loop = _pair(kind, recurrent_backend=backend, num_layers=2)
    data = recurrent.batch(module, (3, 4))
    actual = run_with_gradients(module, _compiled(in_mode(module, in_sequences)), data)
    assert_same(actual, run_with_gradients(loop, in_mode(loop, in_sequences), data))


@of_both_cells
def test_compiled_graph_does_not_grow_with_time(kind):
    module, _ = _pair(kind, num_layers=2)
    nodes = []
    for steps in (8, 64):
        torch._dynamo.reset()
        graphs = _Graphs()
        data = recurrent.batch(module, (3, steps))
        run_with_gradients(module, _compiled(in_mode(module), graphs.backend), data)
        nodes.append((graphs.forward, graphs.backward))
    assert nodes[0] == nodes[1]
    assert [len(counts) for counts in nodes[0]] == [1, 1]


@of_both_cells
def test_compiled_module_with_other_flags_is_not_recompiled(kind):
    """Where episodes end changes with every batch, and must not cost a compilation."""
    module, loop = _pair(kind)
    graphs = _Graphs()
    compiled = _compiled(in_mode(module), graphs.backend)
    for flag_rate in (0.0, 0.3, 1.0):
        data = recurrent.batch(module, (3, 6), flag_rate=flag_rate)
        assert_same(
            run_with_gradients(module, compiled, data),
            run_with_gradients(loop, in_mode(loop), data),
        )
    assert len(graphs.forward) == len(graphs.backward) == 1


@pytest.mark.parametrize(
    "arguments",
    [{"state_grad": True}, {"recurrent_backend": "scan", "recurrent_recompute": "full"}],
    ids=["state_grad", "recompute"],
)
@of_both_cells
def test_compiled_module_options_hold_in_one_graph(kind, arguments):
    module, loop = _pair(kind, **arguments)
    data = recurrent.batch(module, (3, 4))
    assert_same(
        run_with_gradients(module, _compiled(in_mode(module)), data),
        run_with_gradients(loop, in_mode(loop), data),
    )
    out = _compiled(in_mode(module))(data.clone())
    for key in module.state_keys:
        assert out.get(("next", key)).requires_grad == module.state_grad


@of_both_cells
def test_compiled_family_of_modules_in_vmap_is_one_graph(kind):
    """As TD3's two critics are run."""
    family = [recurrent.make(kind, dtype=F64) for _ in range(2)]
    parameters, _ = stack_module_state(family)
    data = recurrent.batch(family[0], (3, 4))

    def call(parameters: dict[str, Tensor]) -> Tensor:
        with set_recurrent_mode(True):
            return functional_call(family[0], parameters, (data.clone(),))["embed"]

    # functional_call walks over all modules, and dynamo may not look at an nn.LSTM without leave.
    with torch._dynamo.config.patch(allow_rnn=True):
        actual = _compiled(lambda: vmap(call)(parameters))()
    assert_equal(actual, torch.stack([in_mode(m)(data.clone())["embed"] for m in family]), F64)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "LSTM", "GRU"])
def test_pure_pytorch_class_is_one_graph(name):
    module = getattr(rnnkeys, name)(3, 4, dtype=F64)
    x = torch.randn(*((2, 3) if name.endswith("Cell") else (2, 4, 3)), dtype=F64)
    for a, b in zip(_tensors(_compiled(module)(x)), _tensors(module(x)), strict=True):
        assert_equal(a, b, F64)


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for output in outputs for tensor in _tensors(output)]


# Inductor itself reaches for what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_inductor_compiles_forward_and_backward():
    module, loop = _pair("gru", dtype=torch.float32)
    data = recurrent.batch(module, (3, 4))
    compiled = _compiled(in_mode(module), "inductor")
    assert_same(
        run_with_gradients(module, compiled, data),
        run_with_gradients(loop, in_mode(loop), data),
        torch.float32,
    )
