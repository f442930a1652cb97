"""Calls of ever changing shapes and reset patterns, in several threads, leave nothing behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from tensordict import TensorDict
from torch import Tensor

from rnnkeys import GRUModule, LSTMModule, set_recurrent_mode
from tests.support.tolerances import assert_equal

SIZE = 3
KINDS: dict[str, Any] = {"lstm": LSTMModule, "gru": GRUModule}


class PlansMachine(RuleBasedStateMachine):
    """The backends of modules with the same weights, each call against the reference loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.threads = [ThreadPoolExecutor(1) for _ in range(2)]
        self.modules: dict[tuple[str, str], Any] = {}
        for kind, module in KINDS.items():
            for backend in ("loop", "pad", "scan"):
                made = module(SIZE, 4, in_key="x", out_key="y", recurrent_backend=backend)
                self.modules[kind, backend] = made
                made.load_state_dict(self.modules[kind, "loop"].state_dict())

    @rule(
        kind=st.sampled_from(list(KINDS)),
        backends=st.lists(st.sampled_from(["pad", "scan"]), min_size=1, max_size=3),
        rows=st.integers(1, 4),
        flags=st.lists(st.booleans(), min_size=1, max_size=9),
        learns=st.booleans(),
    )
    def call(
        self, kind: str, backends: list[str], rows: int, flags: list[bool], learns: bool
    ) -> None:
        """Run the same batch by several backends at once, each in a thread of its own."""
        starts = torch.tensor(flags).repeat(rows, 1)
        starts[::2] = starts[::2].roll(1, 1)
        x = torch.randn(rows, len(flags), SIZE)
        expected = self.run(kind, "loop", x, starts, learns)
        running = [
            self.threads[i % 2].submit(self.run, kind, backend, x, starts, learns)
            for i, backend in enumerate(backends)
        ]
        for one in running:
            for actual, wanted in zip(one.result(), expected, strict=True):
                assert_equal(actual, wanted, torch.float32)

    def run(self, kind: str, backend: str, x: Tensor, starts: Tensor, learns: bool) -> list[Tensor]:
        module = self.modules[kind, backend]
        batch = TensorDict({"x": x, "is_init": starts.unsqueeze(-1)}, x.shape[:2])
        with torch.set_grad_enabled(learns), set_recurrent_mode(True):
            y = module(batch)["y"]
        if not learns:
            return [y]
        gradients = torch.autograd.grad(y.square().sum(), list(module.parameters()))
        # That of a recurrent weight is zero where every step starts a segment.
        return [y, torch.cat([gradient.flatten() for gradient in gradients])]

    def teardown(self) -> None:
        for thread in self.threads:
            thread.shutdown()


PlansMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=10, deadline=None)
TestPlansMachine = PlansMachine.TestCase
