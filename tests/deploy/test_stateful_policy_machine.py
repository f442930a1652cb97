"""``StatefulPolicy`` in random histories, against a model with one state for each id."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tensordict import TensorDict
from torch import Tensor

from rnnkeys import GRUModule, StatefulPolicy

SIZE, HIDDEN = 2, 3
KEY = "recurrent_state"
NAMES = ["left", "right", 7, 11]
BAD = ["nan", "shape", "text", "twice", "valid", "state", "gone"]
subset = st.lists(st.integers(0, 6), min_size=1, max_size=5, unique=True)


class StatefulPolicyMachine(RuleBasedStateMachine):
    """Calls, resets, ends of episodes, ids that join and leave, and calls that are rejected."""

    @initialize(
        number=st.integers(1, 3),
        autoreset=st.sampled_from(["same_step", "next_step", "disabled"]),
        seed=st.integers(0, 99),
    )
    def make(self, number: int, autoreset: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.gru: Any = GRUModule(SIZE, HIDDEN, in_key="observation", out_key="action")
        self.player = StatefulPolicy(self.gru, number, autoreset=autoreset)
        self.number, self.autoreset = number, autoreset
        self.states: dict[Any, Tensor] = {i: torch.zeros(1, HIDDEN) for i in range(number)}
        self.ended = [False] * number

    def choose(self, picks: list[int]) -> list[Any]:
        """Return distinct ids, environments or names, known or not."""
        every = [*range(self.number), *NAMES]
        return list(dict.fromkeys(every[i % len(every)] for i in picks))

    def step(self, one: Any, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the action and the next state of one id, by a call of the layer alone."""
        flags = torch.zeros(1, 1, dtype=torch.bool)
        state = self.states.get(one, torch.zeros(1, HIDDEN)).unsqueeze(0)
        entries = {"observation": observation.unsqueeze(0), KEY: state, "is_init": flags}
        with torch.no_grad():
            out = self.gru(TensorDict(entries, [1]))
        return out["action"][0], out["next", KEY][0]

    @rule(picks=subset, kept=st.integers(0, 31), prior=st.booleans())
    def call(self, picks: list[int], kept: int, prior: bool) -> None:
        ids = self.choose(picks)
        valid = [one for i, one in enumerate(ids) if kept >> i & 1]
        observations = torch.randn(len(ids), SIZE)
        before = [self.states.get(one, torch.zeros(1, HIDDEN)) for one in ids]
        out = self.player(observations, ids, valid_ids=valid, save_prev_state=prior)
        if prior:
            out, previous = out
            torch.testing.assert_close(previous[KEY], torch.stack(before))
        out = out if out.ndim == 2 else out.unsqueeze(0)
        for i, one in enumerate(ids):
            action, state = self.step(one, observations[i])
            torch.testing.assert_close(out[i], action)
            self.states.setdefault(one, torch.zeros(1, HIDDEN))
            if one in valid:
                self.states[one] = state

    @rule()
    def call_all(self) -> None:
        observations = torch.randn(self.number, SIZE)
        self.player(observations)
        for i in range(self.number):
            _, self.states[i] = self.step(i, observations[i])

    @rule(picks=subset, given=st.booleans())
    def reset(self, picks: list[int], given: bool) -> None:
        ids = self.choose(picks)
        state = torch.randn(len(ids), 1, HIDDEN) if given else torch.zeros(len(ids), 1, HIDDEN)
        self.player.reset(ids, {KEY: state} if given else None)
        self.states |= dict(zip(ids, state, strict=True))
        for one in ids:
            if isinstance(one, int) and one < self.number:
                self.ended[one] = False

    @rule(data=st.data())
    def episode_over(self, data: st.DataObject) -> None:
        done = data.draw(st.lists(st.booleans(), min_size=self.number, max_size=self.number))
        over = self.ended if self.autoreset == "next_step" else done
        self.player.episode_over(done)
        for i in range(self.number):
            if over[i]:
                self.states[i] = torch.zeros(1, HIDDEN)
        self.ended = done

    @precondition(lambda self: len(self.states) > self.number)
    @rule(pick=st.integers(0, 9))
    def remove(self, pick: int) -> None:
        joined = list(self.states)[self.number :]
        one = joined[pick % len(joined)]
        self.player.remove(one)
        del self.states[one]

    @rule(
        picks=subset,
        kind=st.sampled_from(["nan", "shape", "text", "twice", "valid", "state", "gone"]),
    )
    def reject(self, picks: list[int], kind: str) -> None:
        ids: list[Any] = self.choose(picks)
        observations: Any = torch.randn(len(ids), SIZE)
        if kind == "nan":
            observations[0, 0] = float("nan")
        elif kind == "shape":
            observations = torch.randn(len(ids), SIZE + 1)
        elif kind == "text":
            observations = ["a"] * len(ids)
        elif kind == "twice":
            ids, observations = [*ids, ids[0]], torch.randn(len(ids) + 1, SIZE)
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            if kind == "state":
                self.player.reset(ids, {KEY: torch.full((len(ids), 1, HIDDEN), torch.inf)})
            elif kind == "gone":
                self.player.remove(["nobody"])
            else:
                self.player(observations, ids, valid_ids=["nobody"] if kind == "valid" else None)

    def teardown(self) -> None:
        if not hasattr(self, "player"):
            return
        assert self.player.ids == list(self.states)
        held = self.player.state(list(self.states))[KEY]
        torch.testing.assert_close(held, torch.stack(list(self.states.values())))


StatefulPolicyMachine.TestCase.settings = settings(
    max_examples=12, stateful_step_count=20, deadline=None
)
TestStatefulPolicyMachine = StatefulPolicyMachine.TestCase
