"""Windows in random histories: batches of several workers, flush, clear, resume, rejections."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tensordict import TensorDict

from rnnkeys.transforms import Windows
from rnnkeys.transforms.windows import EPISODE_KEY, FIRST_KEY

MASK, TRAJECTORY = ("collector", "mask"), ("collector", "traj_ids")
NULL = 0


def find_spans(steps: int, length: int, period: int, residual: str, ended: bool) -> list[Any]:
    """Return the first step of each window of an episode, and the one after its last."""
    starts = range(0, max(steps - length + 1, 0), period)
    spans = [(start, start + length) for start in starts]
    covered = spans[-1][1] if spans else 0
    if ended and covered < steps:
        if residual == "last":
            spans.append((max(steps - length, 0), steps))
        elif residual != "drop":
            spans.append((len(spans) * period, steps))
    return spans


@dataclass
class Worker:
    """An environment; its steps are numbered, each trajectory from a hundred of its own on."""

    trajectory: int
    length: int = 0
    seen: list[int] = field(default_factory=list)

    def step(self, count: int, done: bool) -> TensorDict:
        """Return the next steps of the trajectory; the state entering step ``x`` is ``x - 1``."""
        numbers = torch.arange(self.length, self.length + count)
        x = 100 * self.trajectory + numbers + 1
        ends = torch.zeros(count, 1, dtype=torch.bool)
        ends[-1] = done
        state = x[:, None, None].float() - 1
        self.length += count
        self.seen += x.tolist()
        steps = TensorDict({"x": x, "is_init": (numbers == 0)[:, None]}, [count])
        steps["recurrent_state"] = state
        steps["next"] = TensorDict({"done": ends, "recurrent_state": state + 1}, [count])
        return steps.set(TRAJECTORY, torch.full((count,), self.trajectory))


class WindowsMachine(RuleBasedStateMachine):
    """Windows against a model that keeps whole episodes."""

    @initialize(
        length=st.integers(1, 5),
        residual=st.sampled_from(["drop", "last", "null", "repeat", "overlap"]),
        data=st.data(),
        has_ids=st.booleans(),
        workers=st.integers(1, 3),
    )
    def make(self, length: int, residual: str, data: Any, has_ids: bool, workers: int) -> None:
        self.length, self.residual, self.has_ids = length, residual, has_ids
        is_overlap = residual == "overlap"
        self.period = data.draw(st.integers(1, length)) if is_overlap else length
        self.windows = self.make_windows()
        self.trajectories = 0
        self.workers = [self.make_worker() for _ in range(workers)]
        self.found: list[Any] = []
        self.expected: Counter[Any] = Counter()

    def make_windows(self) -> Windows:
        period = self.period if self.residual == "overlap" else None
        return Windows(self.length, self.residual, period)

    def make_worker(self) -> Worker:
        self.trajectories += 1
        return Worker(self.trajectories)

    @rule(data=st.data(), steps=st.integers(1, 7), number=st.integers(1, 3))
    def extend(self, data: Any, steps: int, number: int) -> None:
        number = number if self.has_ids else len(self.workers)
        rows: Any = torch.stack([self.make_row(data, b, steps) for b in range(number)])
        before = rows.clone()
        stored = self.windows.cut(rows if self.has_ids else rows.exclude("collector"))
        assert (rows == before).all()
        self.take(stored)

    def make_row(self, data: Any, b: int, steps: int) -> Any:
        """Return a row of worker ``b``, or with trajectory ids of any workers in turn."""
        pieces: Any = []
        while steps:
            if self.has_ids:
                b = data.draw(st.integers(0, len(self.workers) - 1))
            count = data.draw(st.integers(1, steps))
            done = data.draw(st.booleans())
            pieces.append(self.workers[b].step(count, done))
            steps -= count
            if done:
                self.end(b)
        return torch.cat(pieces)

    def end(self, b: int, ended: bool = True) -> None:
        """Count the windows of the worker's trajectory, and begin another one."""
        self.count(self.workers[b], ended)
        self.workers[b] = self.make_worker()

    def count(self, worker: Worker, ended: bool) -> None:
        for first, last in find_spans(
            len(worker.seen), self.length, self.period, self.residual, ended
        ):
            steps = worker.seen[first:last]
            filler = steps[-1] if self.residual == "repeat" else NULL
            self.expected[(*steps, *[filler] * (self.length - len(steps)))] += 1

    def take(self, stored: Any) -> None:
        """Check windows by themselves, and keep them."""
        sequences = self.windows.to_sequences(stored)
        x, mask = sequences["x"], sequences[MASK]
        assert sequences.shape == (len(stored), self.length) and mask[:, :1].all()
        assert (sequences["recurrent_state"][..., 0, 0] == x[:, :1] - 1).all()
        assert (sequences["next", "recurrent_state"][..., 0, 0] == x[:, :1]).all()
        if self.residual != "repeat":
            assert torch.equal(x == NULL, ~mask)
            assert sequences["next", "done"].squeeze(-1)[~mask].all()
        self.found += zip(
            map(tuple, x.tolist()),
            stored[EPISODE_KEY].tolist(),
            stored[FIRST_KEY].tolist(),
            strict=True,
        )

    @rule()
    def flush(self) -> None:
        rest = self.windows.flush()
        if rest is not None:
            self.take(rest)
        assert self.windows.waiting == 0 and self.windows.flush() is None
        self.restart(ended=True)

    @rule(how=st.sampled_from(["clear", "resume"]))
    def clear(self, how: str) -> None:
        """Drop the steps that wait; a run that resumes does so with new Windows."""
        if how == "clear":
            self.windows.clear()
        else:
            state = self.windows.state_dict()
            self.windows = self.make_windows()
            self.windows.load_state_dict(state)
        self.restart(ended=False)

    def restart(self, ended: bool) -> None:
        """Continue every trajectory as a new episode, as after a flush."""
        for worker in self.workers:
            self.count(worker, ended)
            worker.seen = []

    @precondition(lambda self: self.windows.waiting)
    @rule()
    def reject(self) -> None:
        waiting = self.windows.waiting
        rows: Any = torch.stack([Worker(0).step(3, False) for _ in self.workers])
        rows = rows if self.has_ids else rows.exclude("collector")
        with pytest.raises(KeyError, match="must have the entries of the batch before"):
            self.windows.cut(rows.set("new", torch.zeros(rows.shape)))
        assert self.windows.waiting == waiting

    def teardown(self) -> None:
        if not hasattr(self, "windows"):
            return
        self.flush()
        assert Counter(x for x, _, _ in self.found) == self.expected
        # Windows of one episode have one number, which no other episode has.
        origin: dict[int, int] = {}
        for x, episode, first in self.found:
            assert origin.setdefault(episode, x[0] - first) == x[0] - first
        assert len(origin) == len(set(origin.values()))


WindowsMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=12, deadline=None, phases=(Phase.generate, Phase.shrink)
)
pytestmark = pytest.mark.filterwarnings("ignore:.* episodes have ended:UserWarning")
TestWindowsMachine = WindowsMachine.TestCase
