"""Random recurrent problems, run by a backend of the package and by the reference.

A problem is a stack of layers, inputs, ``is_init`` flags and stored states. A run contains its
outputs, the state after every time step, and the gradient of every input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rnnkeys.backends import BACKENDS, Options, choose, pad, unroll_layers, why_not
from rnnkeys.cells import ELMAN_CELL, GRU_CELL, LAYER_NORM_LSTM_CELL, LSTM_CELL, GatedCell, Weights
from rnnkeys.modules.stacks import CellStack, read_layers
from tests.support import reference
from tests.support.reference_layernorm import LayerNormLSTM, LayerNormWeights
from tests.support.tolerances import assert_equal

State = tuple[Tensor, ...]
CELLS: dict[str, tuple[GatedCell, reference.Cell]] = {
    "lstm": (LSTM_CELL, reference.LSTM()),
    "gru": (GRU_CELL, reference.GRU()),
    "rnn": (ELMAN_CELL, reference.Elman()),
    "lstm_ln": (LAYER_NORM_LSTM_CELL, LayerNormLSTM()),
}
# Cells that torch has kernels for; the others live in stacks of our own.
TORCHS: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU}


# A norm removes the scale of its argument. Of a single number nothing remains, and its gradient is
# rounding error.
SMALLEST = {"lstm_ln": 3}


class Way(NamedTuple):
    """A backend with options: one way to run time."""

    backend: str
    options: Options

    def dtypes(self, cell: str) -> list[torch.dtype]:
        """Dtypes that this way runs a cell in, on this machine."""
        return [dtype for dtype in (torch.float64, torch.float32) if self.runs(cell, dtype)]

    def runs(self, cell: str, dtype: torch.dtype, projected: bool = False) -> bool:
        """Whether this way runs a cell, on this machine."""
        matrix = torch.empty(1, 1, dtype=dtype, device=DEVICE)
        weights = Weights(matrix, matrix, w_hr=matrix if projected else None)
        if self == WAYS["native"]:
            return pad.runs_native(CELLS[cell][0], weights, dtype)
        return why_not(self.backend, CELLS[cell][0], weights) is None


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_IEEE = Options(precision="ieee")
# The native kernel runs only where states carry no gradient, so it is a way of its own.
WAYS: dict[str, Way] = {
    **{name: Way(name, _IEEE) for name in BACKENDS if name != "auto"},
    "native": Way("pad", Options(state_grad=False)),
}


def no_flags(batch: int, steps: int) -> Tensor:
    """Return flags ``[B, T]`` without any reset."""
    return torch.zeros(batch, steps, dtype=torch.bool)


def _at(*positions: tuple[int | slice, int | slice]) -> Callable[[int, int], Tensor]:
    def flags(batch: int, steps: int) -> Tensor:
        is_init = no_flags(batch, steps)
        for b, t in positions:
            is_init[b, t] = True
        return is_init

    return flags


def _two_in_a_row(batch: int, steps: int) -> Tensor:
    is_init = no_flags(batch, steps)
    is_init[0, steps // 2 : steps // 2 + 2] = True
    return is_init


_ALL = slice(None)
FLAGS: dict[str, Callable[[int, int], Tensor]] = {
    "none": no_flags,
    "at 0": _at((_ALL, 0)),
    "everywhere": _at((_ALL, _ALL)),
    "two in a row": _two_in_a_row,
    "at the last step": _at((-1, -1)),
    "one long among short": _at((slice(1, None), _ALL)),
    "random": lambda batch, steps: torch.rand(batch, steps) < 0.3,
}


def _time_major(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


# How a tensor [B, T, ...] lies in memory; "constant" repeats the first entry without a copy.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "time major": _time_major,
    "strided": _strided,
    "constant": lambda x: x[:1, :1].expand_as(x),
}


class Problem(NamedTuple):
    """A stack of layers and what it runs on.

    Attributes:
        rnn: holds the parameters.
        x: inputs ``[B, T, I]``.
        reset_state: stored states, each ``[B, T, L, H]``.
        is_init: bool ``[B, T]``.
        layouts: names of the memory layouts of ``x`` and the states.
    """

    rnn: Any
    x: Tensor
    reset_state: State
    is_init: Tensor
    layouts: tuple[str, str] = ("contiguous", "contiguous")

    @property
    def cell(self) -> GatedCell:
        return CELLS[self.rnn.mode.lower()][0]

    @property
    def layers(self) -> list[Weights]:
        layers = read_layers(self.rnn)
        return [layers.weights(i) for i in range(self.rnn.num_layers)]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def starts(self) -> Tensor:
        """Segment starts, bool ``[B, T]``: the flags and the first step of every row."""
        starts = self.is_init.clone()
        starts[:, 0] = True
        return starts

    @property
    def shown(self) -> tuple[Tensor, ...]:
        """Inputs and states in their memory layouts, as a backend gets them."""
        layouts = [self.layouts[0], *[self.layouts[1]] * len(self.reset_state)]
        bases = (self.x, *self.reset_state)
        return tuple(LAYOUTS[name](base) for name, base in zip(layouts, bases, strict=True))

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Inputs, stored states and parameters, by name."""
        names = self.cell.state_names
        states = {f"state {n}": s for n, s in zip(names, self.reset_state, strict=True)}
        return {"x": self.x, **states, **dict(self.rnn.named_parameters())}

    def cotangents(self, through_states: bool = True) -> tuple[Tensor, State]:
        """Random gradients for outputs and states (zero unless ``through_states``)."""
        d_y = torch.randn_like(self.reset_state[0][:, :, 0])
        d_states = tuple(torch.randn_like(s) * through_states for s in self.reset_state)
        return d_y, d_states


class Run(NamedTuple):
    """The result of a problem; ``grads`` by the names of its leaves."""

    y: Tensor
    states: State
    grads: dict[str, Tensor]


def make(
    cell: str,
    flags: str | Tensor = "random",
    *,
    dtype: torch.dtype = torch.float64,
    batch: int = 3,
    steps: int = 7,
    inputs: int = 5,
    hidden: int = 4,
    states: str = "random",
    layouts: tuple[str, str] = ("contiguous", "contiguous"),
    device: str = "cpu",
    **sizes: Any,
) -> Problem:
    """Draw a problem from torch's generator.

    States are ``"random"``, ``"zero"``, or those of ``"episodes"``: stored at the start of a row,
    zero where an episode starts in it, with no gradient, as collectors and primers write them.
    """
    rnn = _make_rnn(cell, inputs, hidden, dtype=dtype, **sizes)
    is_init = FLAGS[flags](batch, steps) if isinstance(flags, str) else flags
    widths = (rnn.proj_size or hidden, hidden)[: len(CELLS[cell][0].state_names)]
    reset_state = tuple(torch.randn(batch, steps, rnn.num_layers, n, dtype=dtype) for n in widths)
    if states == "zero":
        reset_state = tuple(s.zero_() for s in reset_state)
    if states == "episodes":
        for state in reset_state:
            state[:, 1:][is_init[:, 1:]] = 0
    x = torch.randn(batch, steps, inputs, dtype=dtype)
    has_grad = [True] + [states != "episodes"] * len(reset_state)
    leaves = [
        t.to(device).requires_grad_(g) for t, g in zip((x, *reset_state), has_grad, strict=True)
    ]
    return Problem(rnn.to(device), leaves[0], tuple(leaves[1:]), is_init.to(device), layouts)


def _make_rnn(cell: str, *arguments: Any, **keywords: Any) -> Any:
    if cell in TORCHS:
        return TORCHS[cell](*arguments, batch_first=True, **keywords)
    stack = CellStack(CELLS[cell][0], *arguments, **keywords)
    for name, parameter in stack.named_parameters():
        if name.startswith("norm"):  # ones and zeros would hide a weight that is not used
            nn.init.uniform_(parameter, 0.5, 1.5)
    return stack


def for_way(way: str, cell: str, *arguments: Any, **keywords: Any) -> Problem:
    """Draw a problem on the device that a way runs on."""
    device = DEVICE if way == "triton" else "cpu"
    return make(cell, *arguments, device=device, **keywords)


def outputs(problem: Problem, way: Way) -> tuple[Tensor, State]:
    """Run a problem forward."""
    # A backend that another one replaces would be compared with itself.
    assert choose(way.backend, way.options) == way.backend
    x, *reset_state = problem.shown
    return unroll_layers(
        problem.cell,
        problem.layers,
        x,
        tuple(reset_state),
        problem.is_init,
        way.options,
        way.backend,
    )


def run(problem: Problem, way: Way, d_y: Tensor, d_states: State) -> Run:
    """Run a problem forward and backward; states have a gradient only where the way has one."""
    y, states = outputs(problem, way)
    results, cotangents = [y], [d_y]
    if way.options.state_grad:
        results += states
        cotangents += d_states
    leaves = {name: leaf for name, leaf in problem.leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(
        results, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    return Run(y, states, dict(zip(leaves, grads, strict=True)))


def expect(problem: Problem, d_y: Tensor, d_states: State) -> Run:
    """Run a problem by the reference, in NumPy float64."""
    x, *reset_state = (t.detach() for t in problem.shown)
    depth = range(problem.rnn.num_layers)
    runs = reference.unroll_layers(
        CELLS[problem.cell.name][1],
        [_numpy_weights(w) for w in problem.layers],
        _numpy(x),
        [[_numpy(s[:, :, i]) for s in reset_state] for i in depth],
        problem.is_init.cpu().numpy(),
    )
    gradients = reference.backward_layers(
        runs, _numpy(d_y), [[_numpy(d[:, :, i]) for d in d_states] for i in depth]
    )
    states = _stack([r.states for r in runs])
    shown = (torch.from_numpy(gradients[0].x), *_stack([g.reset_state for g in gradients]))
    grads = dict(zip(problem.leaves, _through_layouts(problem, shown), strict=False))
    for i, gradient in enumerate(gradients):
        for field, d in gradient.weights._asdict().items():
            if d is not None:
                name = field.replace("w_", "weight_").replace("b_", "bias_")
                grads[f"{name}_l{i}"] = torch.from_numpy(d)
    kept = {name: grads[name] for name, leaf in problem.leaves.items() if leaf.requires_grad}
    return Run(torch.from_numpy(runs[-1].y), states, kept)


def _through_layouts(problem: Problem, grads: Sequence[Tensor]) -> list[Tensor]:
    """Turn gradients of tensors as they are shown into those of the leaves they are made of."""
    bases = [problem.x, *problem.reset_state]
    names = [problem.layouts[0], *[problem.layouts[1]] * len(problem.reset_state)]
    of_bases = []
    for name, base, grad in zip(names, bases, grads, strict=True):
        leaf = base.detach().double().cpu().requires_grad_()
        of_bases += torch.autograd.grad(LAYOUTS[name](leaf), leaf, grad)
    return of_bases


def _stack(layers: Sequence[Sequence[Any]]) -> State:
    return tuple(
        torch.stack([torch.from_numpy(a) for a in entry], 2) for entry in zip(*layers, strict=True)
    )


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().double().cpu().numpy()


def _numpy_weights(weights: Weights) -> Any:
    arrays: list[Any] = [None if w is None else _numpy(w) for w in weights[:5]]
    if not weights.extra:
        return reference.Weights(*arrays)
    extra = {name: _numpy(w) for name, w in weights.extra.items()}
    return LayerNormWeights(*arrays[:3], **extra)


def assert_same_run(actual: Run, expected: Run, dtype: torch.dtype | str) -> None:
    """Assert equal outputs, states and gradients; where zero is expected, exactly zero."""
    _assert_same(actual.y, expected.y, dtype, "y")
    for i, (a, b) in enumerate(zip(actual.states, expected.states, strict=True)):
        _assert_same(a, b, dtype, f"state {i}")
    assert actual.grads.keys() == expected.grads.keys()
    few = [name for name, grad in expected.grads.items() if 0 < grad.count_nonzero() <= 3]
    for name in actual.grads.keys() - set(few):
        _assert_same(actual.grads[name], expected.grads[name], dtype, f"gradient of {name}")
    if few:
        # The terms of one number may cancel, so that its relative error has no bound: gradients of
        # a few numbers are compared as one vector.
        a, b = (
            torch.cat([run.grads[name].flatten() for name in few]) for run in (actual, expected)
        )
        _assert_same(a, b, dtype, f"gradients of {few}")


def _assert_same(actual: Tensor, expected: Tensor, dtype: torch.dtype | str, what: str) -> None:
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if expected.any():
        assert_equal(actual, expected, dtype, what)
    else:
        assert actual.shape == expected.shape and not actual.any(), f"{what}: expected zero"
