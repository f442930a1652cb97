"""The mode in random histories of threads and tasks that enter and leave shared contexts."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from rnnkeys import recurrent_mode, set_recurrent_mode

MODES = [True, False, None, True]
place = st.integers(0, 3)
instance = st.integers(0, len(MODES) - 1)


def run_modes(inside: set_recurrent_mode) -> Iterator[bool | None]:
    """Yield the mode inside a decorated generator, for ever."""

    @inside
    def generate() -> Iterator[bool | None]:
        while True:
            yield recurrent_mode()

    return generate()


class ModeMachine(RuleBasedStateMachine):
    """Two threads and two tasks; four instances, each of which any of them enters and leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.threads = [ThreadPoolExecutor(1) for _ in range(2)]
        # A task is a context of its own, in the thread of its loop.
        self.tasks = [contextvars.copy_context() for _ in range(2)]
        self.instances = [set_recurrent_mode(mode) for mode in MODES]
        for one in self.instances:
            with one:  # one that is never entered would warn
                pass
        self.generators = [run_modes(set_recurrent_mode(mode)) for mode in MODES]
        self.entered: list[list[tuple[int, bool | None]]] = [[] for _ in range(4)]
        self.modes: list[bool | None] = [None] * 4

    def run(self, where: int, call: Callable[..., Any], *arguments: Any) -> Any:
        if where < 2:
            return self.threads[where].submit(call, *arguments).result()
        return self.tasks[where - 2].run(call, *arguments)

    @rule(where=place, which=instance)
    def enter(self, where: int, which: int) -> None:
        self.run(where, self.instances[which].__enter__)
        self.entered[where].append((which, self.modes[where]))
        self.modes[where] = MODES[which]
        self.check()

    @rule(where=place, which=instance)
    def leave(self, where: int, which: int) -> None:
        """Leave an instance, in any order; one that was not entered here is rejected."""
        leave = self.instances[which].__exit__
        places = [i for i, (one, _) in enumerate(self.entered[where]) if one == which]
        if not places:
            with pytest.raises(RuntimeError, match="was not entered in this thread or"):
                self.run(where, leave, None, None, None)
        else:
            self.run(where, leave, None, None, None)
            _, self.modes[where] = self.entered[where].pop(places[-1])
        self.check()

    @rule(where=place, which=instance)
    def advance(self, where: int, which: int) -> None:
        """A decorated generator that is started in one place may go on in another."""
        assert self.run(where, next, self.generators[which]) is MODES[which]
        self.check()

    def check(self) -> None:
        for where in range(4):
            assert self.run(where, recurrent_mode) is self.modes[where], where
        assert recurrent_mode() is None

    def teardown(self) -> None:
        for generator in self.generators:
            generator.close()  # pyright: ignore[reportAttributeAccessIssue]
        for thread in self.threads:
            thread.shutdown()


ModeMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
TestModeMachine = ModeMachine.TestCase
