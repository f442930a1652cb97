"""Faults that the tests have to catch; ``python -m scripts.check_faults`` plants them one by one.

A fault is a mistake that somebody could make. When the source that it changes moves, rewrite it: a
fault that is dropped is a test that nobody has seen fail. Its tests are few and fast, so that the
whole list runs in a minute or two.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One mistake, and the tests that see it.

    Attributes:
        name: the mistake in words.
        file: path of the changed file, from the root of the project.
        before: source that is there exactly once.
        after: what replaces it; must still be valid Python.
        tests: arguments of pytest that select the tests which have to fail.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


def _reference(way: str, marks: str = "random", shape: str = "plain") -> tuple[str, ...]:
    """One case of the contract test; ``way`` is a way to run time, a cell and a dtype."""
    return (f"tests/test_contract.py::test_equals_the_reference[{way}-{shape}-{marks}]",)


_CELLS = (
    Fault(
        "LSTM: input and forget gate swapped",
        "rnnkeys/cells.py",
        "i, f, g, o = (gates_x + gates_h).chunk(4, -1)",
        "f, i, g, o = (gates_x + gates_h).chunk(4, -1)",
        _reference("loop-lstm-float64"),
    ),
    Fault(
        "GRU: update gate keeps the candidate, not the state",
        "rnnkeys/cells.py",
        "return ((1 - z) * n + z * state[0],)",
        "return (z * n + (1 - z) * state[0],)",
        _reference("loop-gru-float64"),
    ),
    Fault(
        "GRU: reset gate before the recurrent bias",
        "rnnkeys/cells.py",
        "n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()",
        "n = ((x_n + h_n) * (x_r + h_r).sigmoid()).tanh()",
        _reference("loop-gru-float64"),
    ),
)

_SEGMENTS = (
    Fault(
        "a row does not start a segment",
        "rnnkeys/segments.py",
        "    marks[:, 0] = True\n    starts =",
        "    starts =",
        _reference("pad-gru-float64", "none"),
    ),
    Fault(
        "segments end one step early",
        "rnnkeys/segments.py",
        "return starts, np.diff(starts, append=marks.size)",
        "return starts, np.maximum(np.diff(starts, append=marks.size) - 1, 1)",
        _reference("pad-gru-float64"),
    ),
    Fault(
        "a kept plan is found by shape, not by marks",
        "rnnkeys/segments.py",
        "np.packbits(marks).tobytes(), in_blocks",
        "in_blocks",
        _reference("pad-gru-float64", "none") + _reference("pad-gru-float64", "at the last step"),
    ),
    Fault(
        "gradients of padding reach the last real step",
        "rnnkeys/segments.py",
        "grad = grad.index_fill(0, ctx.unused, 0.0)",
        "pass",
        _reference("vendor-lstm-float32"),
    ),
    Fault(
        "states are taken one step after the segments' starts",
        "rnnkeys/segments.py",
        "return state[self.starts // steps, self.starts % steps]",
        "return state[self.starts // steps, (self.starts + 1) % steps]",
        _reference("pad-gru-float64"),
    ),
)

_LOOP = (
    Fault(
        "loop: a reset is dropped",
        "rnnkeys/backends/loop.py",
        "if reset is not None and t:",
        "if reset is not None and t > 1:",
        _reference("loop-gru-float64", "everywhere"),
    ),
    Fault(
        "loop: a row starts from zeros, not from its stored state",
        "rnnkeys/backends/loop.py",
        "start = tuple(s[0] for s in reset_state)",
        "start = tuple(s[0] * 0 for s in reset_state)",
        _reference("loop-gru-float64"),
    ),
)

_SCAN = (
    Fault(
        "scan: the recurrent bias is forgotten",
        "rnnkeys/backends/scan.py",
        "bias = b_ih + b_hh if",
        "bias = b_ih if",
        _reference("scan-lstm-float64"),
    ),
    Fault(
        "fused: a reset is dropped",
        "rnnkeys/backends/fused.py",
        "    if resets is not None and t:\n",
        "    if resets is not None and t > 1:\n",
        _reference("scan-lstm-float64", "everywhere"),
    ),
    Fault(
        "fused: the gradient passes a reset",
        "rnnkeys/backends/fused.py",
        "        grad.masked_fill_(where, 0)\n",
        "",
        _reference("scan-gru-float64", "two in a row"),
    ),
    Fault(
        "fused: the gradient that arrives at the cell state is zeroed",
        "rnnkeys/backends/fused.py",
        "if grad_c is not None:",
        "if grad_c is None:",
        _reference("scan-lstm-float64"),
    ),
    Fault(
        "fused: the forget gate does not scale the gradient",
        "rnnkeys/backends/fused.py",
        "            dc_t.mul_(f[k])\n",
        "",
        _reference("scan-lstm-float64", "none"),
    ),
    Fault(
        "fused: GRU's recurrent bias has the gradient of the input's",
        "rnnkeys/backends/fused.py",
        "torch.mul(factor[:, 3], r, out=factor[:, 0])",
        "factor[:, 0] = factor[:, 3]",
        _reference("scan-gru-float64"),
    ),
    Fault(
        "fused: reset states have no gradient",
        "rnnkeys/backends/ops.py",
        "return gates, d_w, d_b, dh, None, None, d_reset if want else None, None",
        "return gates, d_w, d_b, dh, None, None, None, None",
        _reference("scan-gru-float64", "everywhere"),
    ),
)

_PAD = (
    Fault(
        "pad: a block goes on from the segments' starts",
        "rnnkeys/backends/vendor.py",
        "entering = (state[0][:rows].contiguous(), state[1][:rows].contiguous())",
        "entering = (start[0][:rows].contiguous(), start[1][:rows].contiguous())",
        _reference("vendor-lstm-float32"),
    ),
    Fault(
        "states of lower layers are those of the top one",
        "rnnkeys/backends/__init__.py",
        "for layer, after in enumerate(history)",
        "for layer, after in enumerate([history[-1]] * len(history))",
        _reference("loop-lstm-float64", shape="three layers"),
    ),
)

FAULTS: tuple[Fault, ...] = (*_CELLS, *_SEGMENTS, *_LOOP, *_SCAN, *_PAD)
