"""The fused loops as operators: derivatives, meta data, vmap, and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from rnnkeys.backends import Options, fused, ops, unroll_layers
from rnnkeys.cells import Weights
from tests.support import problems
from tests.support.problems import CELLS, TORCHS, WAYS, Problem, State
from tests.support.tolerances import assert_equal

F64 = torch.float64
H, I = 3, 2
# Rows of every step: the same number, as in a dense batch, or fewer and fewer, as packed.
SIZES = {"dense": [3, 3, 3], "packed": [4, 2, 2, 1]}
of_both_cells = pytest.mark.parametrize("cell", TORCHS)
in_fused_ways = pytest.mark.parametrize("backend", ["scan", "pad"])


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def _arguments(cell: str, sizes: str, resets: bool) -> list[Any]:
    """Arguments of an operator, tensors first; ``sizes`` are those of dense rows with resets."""
    steps = SIZES[sizes]
    gates, states = CELLS[cell][0].num_gates, len(CELLS[cell][0].state_names)
    sizes_of_weights = ((gates * H, I), (gates * H, H), (gates * H,), (gates * H,))
    given = [_leaf(sum(steps), I), *(_leaf(*size) for size in sizes_of_weights)]
    start = [_leaf(steps[0], H) for _ in range(states)]
    no_c = [None] * (2 - states)
    if not resets:
        return [*given, *start, *no_c, steps, None, None, None, True]
    where = torch.tensor([[0, 1, 0], [1, 0, 0], [1, 1, 0]]).bool()
    return [*given, *start, *no_c, [], where, *(_leaf(3, 3, H) for _ in start), *no_c, True]


FORMS = [("dense", False), ("packed", False), ("dense", True)]
in_every_form = pytest.mark.parametrize(("sizes", "resets"), FORMS)


@in_every_form
@of_both_cells
def test_gradients_equal_finite_differences(cell, sizes, resets):
    arguments = _arguments(cell, sizes, resets)
    places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]

    def states(*leaves: Tensor) -> State:
        given = list(arguments)
        for place, leaf in zip(places, leaves, strict=True):
            given[place] = leaf
        return ops.layer(*given)[: len(CELLS[cell][0].state_names)]

    assert torch.autograd.gradcheck(states, [arguments[i] for i in places])


@in_every_form
@of_both_cells
def test_forward_operators_keep_torchs_rules(cell, sizes, resets):
    torch.library.opcheck(ops.layer, tuple(_arguments(cell, sizes, resets)))


@of_both_cells
def test_forward_operator_that_keeps_nothing_keeps_torchs_rules(cell):
    given = [a.detach() if isinstance(a, Tensor) else a for a in _arguments(cell, "packed", False)]
    torch.library.opcheck(ops.layer, (*given[:-1], False))


@in_every_form
@of_both_cells
def test_states_do_not_depend_on_what_is_kept(monkeypatch, cell, sizes, resets):
    """Without a backward pass no more than a chunk of activations is held at a time."""
    monkeypatch.setattr(fused, "_MOST_ELEMENTS", 1)
    *arguments, _ = _arguments(cell, sizes, resets)
    count = len(CELLS[cell][0].state_names)
    kept, few = ops.layer(*arguments, True), ops.layer(*arguments, False)
    for a, b in zip(few[:count], kept[:count], strict=True):
        assert_equal(a, b, F64)
    assert all(rest.numel() == 0 for rest in few[count:])


@pytest.mark.parametrize("wanted", [False, True])
@in_every_form
@of_both_cells
def test_backward_operators_keep_torchs_rules(cell, sizes, resets, wanted):
    arguments = [
        a.detach() if isinstance(a, Tensor) else a for a in _arguments(cell, sizes, resets)
    ]
    count = len(CELLS[cell][0].state_names)
    outputs = ops.layer(*arguments)
    grads = [torch.randn_like(s) for s in outputs[:count]] + [None] * (2 - count)
    x, w_ih, w_hh, _, b_hh, h0, c0, *rest = arguments[:-1]
    given = [*grads, x, w_ih, w_hh, b_hh, h0, c0, *outputs, *rest]
    torch.library.opcheck(ops.layer_backward, (*given, wanted, wanted and resets))


@of_both_cells
def test_weights_may_have_any_strides(cell):
    """Compiled code believes the strides that the operator promises."""
    arguments = _arguments(cell, "dense", True)
    for k in (1, 2):
        arguments[k] = arguments[k].detach().t().contiguous().t().requires_grad_()
    torch.library.opcheck(ops.layer, tuple(arguments))


class _Calls(TorchDispatchMode):
    """Collects the outputs of the package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "rnnkeys":
            self.outputs.append(out)
        return out


def _kept(problem: Problem, backend: str) -> int:
    """Numbers kept for a backward pass by all operators called."""
    with _Calls() as calls:
        problems.outputs(problem, WAYS[backend])
    assert len(calls.outputs) == problem.rnn.num_layers
    return sum(out[-1].numel() for out in calls.outputs)


@in_fused_ways
@of_both_cells
def test_activations_are_kept_only_where_a_backward_pass_may_follow(cell, backend):
    problem = problems.make(cell, num_layers=2)
    assert _kept(problem, backend) > 0
    with torch.no_grad():
        assert _kept(problem, backend) == 0
    for leaf in problem.leaves.values():
        leaf.requires_grad_(False)
    assert _kept(problem, backend) == 0


@pytest.mark.parametrize(
    ("way", "cell"),
    [("scan", "lstm"), ("scan", "gru"), ("pad", "lstm"), ("pad", "gru"), ("native", "lstm")],
)
@pytest.mark.parametrize("flags", ["none", "random"])
def test_second_derivative_raises_and_names_the_loop(way, cell, flags):
    problem = problems.make(cell, flags, steps=24, dtype=WAYS[way].dtypes(cell)[0])
    with pytest.raises(RuntimeError, match="recurrent_backend='loop'"):
        y, _ = problems.outputs(problem, WAYS[way])
        (first,) = torch.autograd.grad(y.sum(), problem.x, create_graph=True)
        first.sum().backward()


def test_native_gradients_in_a_batch_equal_those_one_by_one():
    problem = problems.make("lstm", "random", steps=24, dtype=torch.float32)
    y, _ = problems.outputs(problem, WAYS["native"])
    d_y = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, problem.x, d_y, retain_graph=True, is_grads_batched=True)[0]
    for actual, one in zip(batched, d_y, strict=True):
        (expected,) = torch.autograd.grad(y, problem.x, one, retain_graph=True)
        assert_equal(actual, expected, torch.float32)


@of_both_cells
def test_loop_has_derivatives_of_any_order(cell):
    problem = problems.make(cell, batch=2, steps=3, inputs=2, hidden=2, num_layers=2)

    def y_and_states(x: Tensor, *reset_state: Tensor) -> State:
        y, states = problems.outputs(problem._replace(x=x, reset_state=reset_state), WAYS["loop"])
        return (y, *states)

    assert torch.autograd.gradgradcheck(y_and_states, (problem.x, *problem.reset_state))


# A module in vmap: which arguments differ between its elements (parameters, and data).
BATCHED = {"data": (None, 0, 0, 0), "weights": (0, None, None, None), "both": (0, 0, 0, 0)}
over_anything = pytest.mark.parametrize("batched", BATCHED)
in_every_backend = pytest.mark.parametrize("backend", ["loop", "scan", "pad", "auto"])
Arguments = tuple[list[Tensor], Tensor, State, Tensor]


def _loss(cell: str, backend: str, d_y: Tensor, d_states: State) -> Callable[..., Tensor]:
    """Return a loss of two layers' parameters, inputs, states and flags that reads all outputs."""

    def loss(parameters: list[Tensor], x: Tensor, reset_state: State, is_init: Tensor) -> Tensor:
        layers = [Weights(*parameters[:4]), Weights(*parameters[4:])]
        y, states = unroll_layers(
            CELLS[cell][0], layers, x, reset_state, is_init, Options(), backend
        )
        pairs = zip((y, *states), (d_y, *d_states), strict=True)
        return torch.stack([(a * d).sum() for a, d in pairs]).sum()

    return loss


def _family(cell: str, batched: str) -> tuple[list[Arguments], Arguments]:
    """Draw three sets of arguments that share what is not batched: one by one, and stacked."""
    drawn = [problems.make(cell, num_layers=2) for _ in range(3)]
    of_parameters, of_data, *_ = BATCHED[batched]

    def shared(i: int, dim: int | None) -> Problem:
        return drawn[0] if dim is None else drawn[i]

    family = []
    for i in range(3):
        data = shared(i, of_data)
        parameters = list(shared(i, of_parameters).rnn.parameters())
        family.append((parameters, data.x, data.reset_state, data.is_init))

    def stack(dim: int | None, tensors: tuple[Tensor, ...]) -> Tensor:
        return tensors[0] if dim is None else torch.stack(tensors).detach()

    def stacked(dim: int | None, entries: list[tuple[Tensor, ...]]) -> list[Tensor]:
        return [stack(dim, group) for group in zip(*entries, strict=True)]

    parameters = stacked(of_parameters, [tuple(a[0]) for a in family])
    (x,), (is_init,) = (stacked(of_data, [(a[k],) for a in family]) for k in (1, 3))
    states = tuple(stacked(of_data, [a[2] for a in family]))
    for leaf in (*parameters, x, *states):
        leaf.requires_grad_()
    return family, (parameters, x, states, is_init)


def _leaves(arguments: Any) -> list[Tensor]:
    parameters, x, states, *_ = arguments
    return [*parameters, x, *states]


@over_anything
@in_every_backend
@of_both_cells
def test_operator_gradients_within_vmap_equal_those_one_by_one(cell, backend, batched):
    family, stacked = _family(cell, batched)
    d_y, d_states = problems.make(cell, num_layers=2).cotangents()
    gradients = grad(_loss(cell, backend, d_y, d_states), argnums=(0, 1, 2))
    actual = _leaves(vmap(gradients, in_dims=BATCHED[batched])(*stacked))
    loss = _loss(cell, "loop", d_y, d_states)
    for i, alone in enumerate(family):
        expected = torch.autograd.grad(loss(*alone), _leaves(alone))
        for k, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_equal(a[i], b, F64, f"leaf {k} of element {i}")


@over_anything
@in_every_backend
@of_both_cells
def test_values_of_vmap_and_gradients_through_it_equal_those_one_by_one(cell, backend, batched):
    family, stacked = _family(cell, batched)
    d_y, d_states = problems.make(cell, num_layers=2).cotangents()
    values = vmap(_loss(cell, backend, d_y, d_states), in_dims=BATCHED[batched])(*stacked)
    alone = torch.stack([_loss(cell, "loop", d_y, d_states)(*a) for a in family])
    assert_equal(values, alone, F64)
    actual = torch.autograd.grad(values.sum(), _leaves(stacked))
    singles = [leaf for arguments in family for leaf in _leaves(arguments)]
    expected = torch.autograd.grad(alone.sum(), singles)
    count = len(actual)
    for k, a in enumerate(actual):
        of_leaf = expected[k::count]
        # The gradient of what all elements share is one sum, already.
        is_shared = singles[k] is singles[count + k]
        assert_equal(a, of_leaf[0] if is_shared else torch.stack(of_leaf), F64, f"leaf {k}")


@pytest.mark.parametrize("backend", ["loop", "scan"])
@of_both_cells
def test_operator_in_vmap_over_flags_alone_is_right(cell, backend):
    problem = problems.make(cell)
    flags = torch.rand(4, 3, 7) < 0.4

    def y(is_init: Tensor) -> Tensor:
        return problems.outputs(problem._replace(is_init=is_init), WAYS[backend])[0]

    assert_equal(vmap(y)(flags), torch.stack([y(m) for m in flags]), F64)
