"""Triton's interpreter, with all programs of a grid running in turns instead of one by one.

The interpreter finishes a program before it begins the next, so programs that wait for each other
never end in it. Here each runs in a thread of its own, one at a time; whenever a program polls, a
random other one continues. A schedule without progress raises an error instead of hanging.
"""

from __future__ import annotations

import inspect
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Polls in a row without an arrival, per program, after which all count as stuck.
_PATIENCE = 50


class Stuck(Exception):
    """All programs wait for each other."""


class _Turns:
    """Lets one of several threads run at a time."""

    def __init__(self, count: int, seed: int) -> None:
        self.random, self.alive = random.Random(seed), set(range(count))
        self.turn = threading.Condition()
        self.current, self.polls = self._any(), 0
        self.error: BaseException | None = None

    def _any(self) -> int:
        return self.random.choice(sorted(self.alive)) if self.alive else -1

    def wait_for(self, me: int) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.current == me or self.error is not None)
            if self.error is not None:
                raise Stuck from self.error

    def pass_on(self, me: int, arrived: bool) -> None:
        with self.turn:
            self.polls = 0 if arrived else self.polls + 1
            if self.polls > _PATIENCE * len(self.alive):
                raise Stuck(f"programs {sorted(self.alive)} wait for each other")
            self.current = self._any()
            self.turn.notify_all()
        self.wait_for(me)

    def leave(self, me: int, error: BaseException | None) -> None:
        with self.turn:
            self.alive.discard(me)
            self.polls, self.error = 0, self.error or error
            self.current = self._any()
            self.turn.notify_all()


@contextmanager
def programs_together(seed: int = 0) -> Iterator[list[int]]:
    """Run the programs of interpreted kernels together; yields the number of each launch's.

    Args:
        seed: of the schedule.
    """
    from triton.runtime import interpreter

    launches: list[int] = []
    local = threading.local()
    builder: Any = interpreter.interpreter_builder
    before = interpreter.GridExecutor.__call__, builder.create_get_program_id
    add = builder.create_atomic_rmw

    def program_id(axis: int) -> Any:
        builder.grid_idx = local.index
        return before[1](axis)

    def add_in_turn(op: Any, ptr: Any, value: Any, *others: Any) -> Any:
        result = add(op, ptr, value, *others)
        local.turns.pass_on(local.me, arrived=bool(value.data.any()))
        return result

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        names = inspect.getfullargspec(self.fn).args
        grid = (*self.grid, 1, 1)[:3]
        programs = list(itertools.product(*map(range, grid)))
        launches.append(len(programs))
        scope = interpreter._patch_lang(self.fn)
        try:
            named = {k: v for k, v in kwargs.items() if k in names}
            bound = inspect.getcallargs(self.fn, *args, **named)
            ready = {
                k: v if k in self.constexprs else interpreter._implicit_cvt(v)
                for k, v in bound.items()
            }
            builder.set_grid_dim(*grid)
            _run_all(self.fn, ready, programs, local, seed)
        finally:
            scope.restore()

    interpreter.GridExecutor.__call__ = call
    builder.create_get_program_id, builder.create_atomic_rmw = program_id, add_in_turn
    try:
        yield launches
    finally:
        interpreter.GridExecutor.__call__ = before[0]
        builder.create_get_program_id, builder.create_atomic_rmw = before[1], add


def _run_all(
    fn: Callable[..., Any], args: dict[str, Any], programs: list[Any], local: Any, seed: int
) -> None:
    turns = _Turns(len(programs), seed)

    def run(me: int, index: tuple[int, int, int]) -> None:
        local.me, local.index, local.turns = me, index, turns
        error = None
        try:
            turns.wait_for(me)
            fn(**args)
        except BaseException as raised:
            error = raised
        turns.leave(me, error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(programs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if turns.error is not None:
        raise turns.error
