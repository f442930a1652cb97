"""Batches of sequences as TorchRL's collectors and buffers make them, without a network."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import Compose, InitTracker, StepCounter, TransformedEnv

from tests.support.target_cases import ShortEpisodes

AGENT_KEY = ("agents", "fresh")


def make_env(batch: tuple[int, ...] = ()) -> Any:
    """Make an environment with short episodes, flags and step counts."""
    compose: Any = Compose
    wrap: Any = TransformedEnv
    return wrap(ShortEpisodes("discrete", batch), compose(InitTracker(), StepCounter()))


def collect(frames: int = 60, batch: tuple[int, ...] = (), **options: Any) -> TensorDictBase:
    """Collect random steps: flags, trajectory ids, step counts, no states."""
    make: Any = Collector
    collector = make(make_env(batch), None, frames_per_batch=frames, total_frames=-1, **options)
    data = next(iter(collector)).clone()
    collector.shutdown()
    return data


def buffer(data: TensorDictBase, sampler: Any, **options: Any) -> TensorDictReplayBuffer:
    """Make a replay buffer that holds the data."""
    rb = TensorDictReplayBuffer(storage=LazyTensorStorage(len(data)), sampler=sampler, **options)
    rb.extend(data)
    return rb


def with_agents(data: TensorDictBase) -> TensorDictBase:
    """Add flags of two agents that start together."""
    flags = data["is_init"]
    agents = flags.unsqueeze(-2).expand(*data.shape, 2, 1)
    data.set(AGENT_KEY, agents.clone())
    return data.set(("next", *AGENT_KEY), torch.zeros_like(agents))


def with_states(rows: int = 3, steps: int = 12, ends: Tensor | None = None) -> TensorDict:
    """Make rows of episodes with random states, as single steps would have stored them.

    Args:
        rows: ``B``.
        steps: ``T``.
        ends: bool ``[B, T]``, where episodes terminate; by default every fifth step.
    """
    if ends is None:
        ends = (torch.arange(rows * steps) % 5 == 4).reshape(rows, steps)
    done = ends.unsqueeze(-1)
    flags = torch.cat([torch.ones(rows, 1, 1, dtype=torch.bool), done[:, :-1]], 1)
    after = torch.randn(rows, steps, 1, 4)
    before = torch.cat([torch.zeros(rows, 1, 1, 4), after[:, :-1]], 1)
    batch = TensorDict(
        {"is_init": flags, "observation": torch.randn(rows, steps, 2)}, [rows, steps]
    )
    batch["h"] = torch.where(flags.unsqueeze(-1), 0, before)
    following = {"done": done, "terminated": done.clone(), "is_init": torch.zeros_like(done)}
    batch["next"] = TensorDict(following, [rows, steps])
    batch["next", "h"] = after
    return batch


def tensors(batch: TensorDictBase) -> dict[Any, Tensor]:
    """Return copies of all entries."""
    return {key: batch.get(key).clone() for key in batch.keys(True, True)}


def assert_untouched(batch: TensorDictBase, before: dict[Any, Tensor]) -> None:
    """Check that a batch holds what it held, bit by bit."""
    assert set(batch.keys(True, True)) == set(before)
    for key, value in before.items():
        torch.testing.assert_close(batch.get(key), value, rtol=0, atol=0, equal_nan=True)
