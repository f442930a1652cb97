"""Prioritised replay of windows, with the states that they start from."""

from __future__ import annotations

import math
from typing import Any

import torch
from actors import ACTOR_KEY, ActorWindows
from r2d2_settings import Settings
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from rnnkeys.replay import PrioritizedSampler
from rnnkeys.transforms import RefreshStates, compute_staleness
from rnnkeys.transforms.windows import EPISODE_KEY, FIRST_KEY

MEASURED_EPISODES = 8


class WindowReplay:
    """Windows cut from what actors collect, drawn by priority.

    Args:
        settings: of the run.
        policy: its network recomputes states, its state keys are those stored.
        draws: chooses windows.
    """

    def __init__(
        self, settings: Settings, policy: TensorDictModuleBase, draws: torch.Generator
    ) -> None:
        self.settings, self.policy = settings, policy
        self.states = [key for key in policy.in_keys if "recurrent_state" in key]
        self.windows = ActorWindows(settings.window_len, "overlap", settings.period)
        # Trees of priorities are small, and stay on the CPU wherever the windows are.
        self.sampler: Any = PrioritizedSampler(
            settings.capacity, settings.alpha, settings.beta, device="cpu"
        )
        self.buffer: Any = TensorDictReplayBuffer(
            storage=LazyTensorStorage(settings.capacity, device=settings.device),
            sampler=self.sampler,
            priority_key="td_error",
            batch_size=settings.windows,
            generator=draws,
        )

    def __len__(self) -> int:
        return len(self.buffer)

    def add(self, data: TensorDictBase) -> None:
        """Cut a batch ``[B, T]`` of one actor; what fills no window waits for its next batch."""
        stored = self.windows.cut(data)
        if stored.shape[0]:  # of the largest priority so far, so that each is drawn soon
            self.buffer.extend(stored.exclude(ACTOR_KEY))

    def sample(self) -> TensorDictBase:
        """Draw windows ``[windows, window_len]`` with their importance weights."""
        return self._lay_out(self.buffer.sample())

    def _lay_out(self, stored: TensorDictBase) -> TensorDictBase:
        windows = self.windows(stored)
        if self.settings.state == "zero":
            windows.update({key: torch.zeros_like(windows[key]) for key in self.states})
        return windows

    def update_priorities(self, windows: TensorDictBase) -> None:
        """Take over the priorities that the loss has written."""
        self.buffer.update_tensordict_priority(windows)

    def refresh(self) -> None:
        """Work all stored states out anew, with today's weights."""
        RefreshStates(self.policy).refresh_buffer(self.buffer)

    def staleness(self, seed: int) -> dict[str, float]:
        """Tell how far values are off because of the states that windows start from.

        Returns:
            The mean over windows that start inside an episode, at the ``"first"`` and at the
            ``"last"`` step that is learned from; NaN while there are no such windows.
        """
        stored: Any = self._some_long_episodes(seed)
        if not len(stored):
            return {"first": math.nan, "last": math.nan}
        true = stored.clone()
        RefreshStates(self.policy).refresh_windows(true)
        inside = stored[FIRST_KEY] > 0
        used, true = self._lay_out(stored[inside]), self.windows(true[inside])
        off = compute_staleness(self.policy, used, true, self.settings.burn_in)
        return {step: values.nanmean().item() for step, values in off.items()}

    def _some_long_episodes(self, seed: int) -> TensorDictBase:
        """Return the windows of a few episodes that have more than one."""
        stored = self.buffer.storage[:]
        episodes = stored[EPISODE_KEY][stored[FIRST_KEY] > 0].unique()
        order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(seed))
        chosen = episodes[order[:MEASURED_EPISODES]]
        return stored[torch.isin(stored[EPISODE_KEY], chosen)]

    def state_dict(self) -> dict[str, Any]:
        """Return the windows, the oldest first, and their priorities."""
        number, size = len(self), self.settings.capacity
        if not number:
            return {}
        oldest = self.buffer.write_count % size if number == size else 0
        order = torch.arange(number).roll(-oldest)
        mass = torch.as_tensor(self.sampler.state_dict()["_sum_tree"][order]).double()
        priorities = mass ** (1 / self.settings.alpha) if self.settings.alpha else mass
        stored = self.buffer.storage[:][order]
        windows = {".".join(_path(key)): value for key, value in stored.items(True, True)}
        return {"windows": windows, "priorities": priorities}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Fill the buffer, which is empty, with windows that were saved."""
        if not state:
            return
        number = len(state["priorities"])
        windows = TensorDict({}, [number])
        for key, value in state["windows"].items():
            windows.set(tuple(key.split(".")), value)
        self.buffer.extend(windows[-self.settings.capacity :])
        priorities = state["priorities"][-self.settings.capacity :]
        self.buffer.update_priority(torch.arange(len(priorities)), priorities)


def _path(key: Any) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key
