"""The replay buffer of the R2D2 tutorial, run through random histories."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tensordict import TensorDict, TensorDictBase

from tests.support.tutorials import load_tutorial

tutorial = load_tutorial("r2d2")


class StepsMachine(RuleBasedStateMachine):
    """Six windows of one step, against a list of values and priorities: the order is exact."""

    args = tutorial.Args(window_len=1, period=1, burn_in=0, capacity=6, windows=3, alpha=0.6)

    def __init__(self) -> None:
        super().__init__()
        self.replay = tutorial.make_replay(self.args, {})
        self.next = 0

    @property
    def saved(self) -> dict[float, float]:
        saved = tutorial.save_replay(self.replay)
        if not saved:
            return {}
        values = saved["windows"]["x"].flatten().tolist()
        return dict(zip(values, saved["priorities"].tolist(), strict=True))

    @rule(steps=st.integers(1, 8))
    def extend(self, steps: int) -> None:
        before = self.saved
        x = torch.arange(self.next, self.next + steps).float().unsqueeze(0)
        flags = torch.zeros(1, steps, 1, dtype=torch.bool)
        trajectory = torch.zeros(1, steps, dtype=torch.int64)
        batch = TensorDict({"x": x, "is_init": flags}, [1, steps])
        batch["next", "done"] = flags
        batch["collector", "traj_ids"] = trajectory
        self.replay.extend(batch)
        self.next += steps
        kept = {value: before[value] for value in before if value in self.saved}
        assert {value: self.saved[value] for value in kept} == pytest.approx(kept, rel=1e-5)

    @rule(priority=st.floats(0.1, 10.0))
    def update_priorities(self, priority: float) -> None:
        if not len(self.replay):
            return
        windows = self.replay.sample()
        windows["td_error"] = torch.full(windows.shape, priority)
        self.replay.update_tensordict_priority(windows)
        for value in windows["x"].flatten().tolist():
            assert self.saved[value] == pytest.approx(priority, rel=1e-5)

    @rule()
    def save_and_load(self) -> None:
        before = self.saved
        self.replay = tutorial.make_replay(self.args, tutorial.save_replay(self.replay))
        assert self.saved == pytest.approx(before, rel=1e-5)

    @invariant()
    def holds_the_newest_windows_from_the_oldest_on(self) -> None:
        newest = range(max(0, self.next - self.args.capacity), self.next)
        assert list(self.saved) == list(newest)


StepsMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=12, deadline=None)
TestStepsMachine = StepsMachine.TestCase


LENGTH, PERIOD = 3, 2


class WindowsMachine(RuleBasedStateMachine):
    """Eight windows of several steps, of episodes that two environments play side by side."""

    args = tutorial.Args(
        window_len=LENGTH, period=PERIOD, burn_in=0, capacity=8, windows=4, alpha=0.6
    )

    def __init__(self) -> None:
        super().__init__()
        self.replay = tutorial.make_replay(self.args, {})
        self.made = 0
        self.priorities: dict[int, float] = {}  # by the first step of the window
        self.starts = [0, 1000]  # first step of the episode of each environment
        self.ends = [0, 1000]  # the step that comes next
        self.trajectories = [0, 1]

    def count(self, row: int, ended: bool) -> int:
        """Return how many windows an episode has given."""
        steps = self.ends[row] - self.starts[row]
        whole = max(0, (steps - LENGTH) // PERIOD + 1)
        rest = steps > (whole - 1) * PERIOD + LENGTH if whole else steps > 0
        return whole + (ended and rest)

    @rule(steps=st.integers(1, 7), ended=st.tuples(st.booleans(), st.booleans()))
    def extend(self, steps: int, ended: tuple[bool, bool]) -> None:
        flags = torch.zeros(2, steps, 1, dtype=torch.bool)
        x = torch.stack([torch.arange(end, end + steps) for end in self.ends])
        batch = TensorDict({"x": x, "is_init": flags.clone()}, [2, steps])
        batch["is_init"][:, 0, 0] = torch.tensor(self.starts) == torch.tensor(self.ends)
        batch["next", "done"] = flags.clone()
        batch["next", "done"][:, -1, 0] = torch.tensor(ended)
        trajectories = torch.tensor(self.trajectories).unsqueeze(1).expand(2, steps)
        batch["collector", "traj_ids"] = trajectories.clone()
        self.replay.extend(batch)
        for row in (0, 1):
            self.made -= self.count(row, False)
            self.ends[row] += steps
            self.made += self.count(row, ended[row])
            if ended[row]:
                self.start_episode(row)

    def start_episode(self, row: int) -> None:
        self.starts[row] = self.ends[row]
        self.trajectories[row] = max(self.trajectories) + 1

    @rule(priority=st.floats(0.1, 10.0))
    def update_priorities(self, priority: float) -> None:
        if not len(self.replay):
            return
        windows = self.replay.sample()
        self.assert_whole(windows)
        windows["td_error"] = torch.full(windows.shape, priority)
        self.replay.update_tensordict_priority(windows)
        self.priorities.update(dict.fromkeys(windows["x"][:, 0].tolist(), priority))

    @rule()
    def save_and_load(self) -> None:
        """The steps that have filled no window are lost, and the episodes with them."""
        before = len(self.replay)
        self.replay = tutorial.make_replay(self.args, tutorial.save_replay(self.replay))
        assert len(self.replay) == before
        for row in (0, 1):
            self.start_episode(row)

    def assert_whole(self, windows: TensorDictBase) -> None:
        mask, x = windows["collector", "mask"], windows["x"]
        expected = x[:, :1] + torch.arange(LENGTH)
        assert mask[:, 0].all() and torch.equal(x[mask], expected[mask])
        assert not (mask[:, 1:] & ~mask[:, :-1]).any()  # padding comes last

    @invariant()
    def contains_whole_windows_with_their_priorities(self) -> None:
        assert len(self.replay) == min(self.made, self.args.capacity)
        saved = tutorial.save_replay(self.replay)
        if not saved:
            return
        self.assert_whole(TensorDict(saved["windows"]).auto_batch_size_(1))
        firsts = saved["windows"]["x"][:, 0].tolist()
        assert len(set(firsts)) == len(firsts)
        for first, priority in zip(firsts, saved["priorities"].tolist(), strict=True):
            known = self.priorities.setdefault(first, priority)
            assert priority == pytest.approx(known, rel=1e-4)


WindowsMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=12, deadline=None)
TestWindowsMachine = WindowsMachine.TestCase
