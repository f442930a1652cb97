"""What the tests of the native LSTM share: one way to run it, any flags, and the reference."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support import problems
from tests.support.problems import WAYS, Problem, assert_same_run

F32 = torch.float32
NATIVE = WAYS["native"]


def assert_equals_reference(problem: Problem) -> None:
    """Compare outputs, states and gradients of the native kernels with the reference."""
    d_y, d_states = problem.cotangents(False)
    actual = problems.run(problem, NATIVE, d_y, d_states)
    assert_same_run(actual, problems.expect(problem, d_y, d_states), F32)


def draw_flags_and_sizes(data: Any) -> tuple[Tensor, dict[str, Any]]:
    """Draw flags ``[B, T]``, and the sizes of a problem that fits them; seeds torch."""
    batch, steps = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 30))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    is_init = torch.rand(batch, steps) < data.draw(st.sampled_from([0.05, 0.15, 0.3]))
    sizes = {name: data.draw(st.integers(4, 20)) for name in ("inputs", "hidden")}
    return is_init, {"batch": batch, "steps": steps, **sizes}
