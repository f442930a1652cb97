"""The interface of all actors, and the entries that they add to every batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.envs import EnvBase

from ..checks import as_int
from ..keys import TRAJECTORY_KEY
from .worker import Plan

ACTOR_KEY = ("collector", "actor")
"""Number of the actor that collected a step, int64 ``[num_envs, T]``."""

POLICY_VERSION_KEY = ("collector", "policy_version")
"""Version of the weights that collected a step, int64 ``[num_envs, T]``."""

AnyActors = TypeVar("AnyActors", bound="Actors")


class Actors(ABC):
    """Collect batches ``[num_envs, T]``, each of one actor, without end.

    Every batch has three entries, int64 ``[num_envs, T]``, beside those of the environment and the
    policy:

    - ``("collector", "actor")``: the actor that collected it. Row ``b`` continues row ``b`` of the
      batch before it from the same actor.
    - ``("collector", "traj_ids")``: the number of the trajectory. No two trajectories have the same
      number, whichever actor collected them, and whether or not it was restarted in between.
    - ``("collector", "policy_version")``: the version of the weights that collected it: 0 for those
      that the actors were made with, then one more with each call of :meth:`update_policy`. The
      difference to :attr:`policy_version` is the lag of the data.

    Actors are an iterator without an end, and a context manager that calls :meth:`close`.
    """

    def __init__(self, first_trajectory: int = 0) -> None:
        self._policy_version = 0
        first = as_int("first_trajectory", first_trajectory, minimum=0)
        self._trajectories = _TrajectoryNumbers(first)

    @property
    def policy_version(self) -> int:
        """Version of the latest weights: the number of calls of :meth:`update_policy`."""
        return self._policy_version

    @property
    def num_trajectories(self) -> int:
        """Number of the next new trajectory; the ``first_trajectory`` of a run that resumes."""
        return self._trajectories.count

    @abstractmethod
    def next(self) -> TensorDictBase:
        """Return the next batch ``[num_envs, T]``."""

    @abstractmethod
    def update_policy(self, policy: nn.Module | TensorDictBase) -> None:
        """Give the actors new weights, for the batches that they start from now on.

        Args:
            policy: a module of the structure of the actors' policy, or its weights
                (``TensorDict.from_module(policy)``), on any device. They are copied at once.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop all actors; a second call has no effect."""

    def __iter__(self) -> Iterator[TensorDictBase]:
        return self

    def __next__(self) -> TensorDictBase:
        return self.next()

    def __enter__(self: AnyActors) -> AnyActors:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _label(self, batch: TensorDictBase, actor: int, version: int) -> TensorDictBase:
        """Write the entries that identify the source of a batch."""
        trajectories = self._trajectories.renumber(actor, batch.get(TRAJECTORY_KEY))
        batch.set(TRAJECTORY_KEY, trajectories)
        batch.set(ACTOR_KEY, torch.tensor(actor).expand(batch.shape))
        return batch.set(POLICY_VERSION_KEY, torch.tensor(version).expand(batch.shape))


class _TrajectoryNumbers:
    """Numbers trajectories uniquely; each actor counts its own from 0.

    Args:
        count: number of the first trajectory.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._running: dict[int, dict[int, int]] = {}  # by actor: its number -> ours

    def renumber(self, actor: int, own: Tensor) -> Tensor:
        """Return unique numbers for an actor's own ones, ``[num_envs, T]``."""
        numbers = self._running.get(actor, {})
        distinct, index = own.unique(return_inverse=True)
        for number in distinct.tolist():
            if number not in numbers:
                numbers[number] = self.count
                self.count += 1
        # Only trajectories of the last step can continue in the next batch.
        self._running[actor] = {number: numbers[number] for number in own[:, -1].tolist()}
        return torch.tensor([numbers[number] for number in distinct.tolist()])[index]

    def restart(self, actor: int) -> None:
        """End the trajectories of an actor that is replaced by one that counts from 0 again."""
        self._running.pop(actor, None)


def check_plan(plan: Plan) -> None:
    """Raise ``TypeError`` or ``ValueError`` if an argument common to all actors is wrong."""
    if isinstance(plan.make_env, EnvBase) or not callable(plan.make_env):
        raise TypeError(
            "make_env must be a function that makes an actor's environment. Got "
            f"{type(plan.make_env).__name__}: pass a function that returns one."
        )
    if not callable(plan.policy):
        raise TypeError(
            "policy must be a TensorDict module, or a function that makes the policy of actor 0, "
            f"1, ... Got {type(plan.policy).__name__}."
        )
    as_int("frames_per_batch", plan.frames_per_batch)
    as_int("num_threads", plan.num_threads)


def draw_seed(seed: int, actor: int, restarts: int = 0) -> int:
    """Return a seed that differs between actors, and between the restarts of an actor.

    Seeds are from ``2 ** 30`` to ``2 ** 31 - 1``, apart from the small ones that people give to
    evaluations.
    """
    drawn = np.random.SeedSequence([seed, actor, restarts]).generate_state(1)[0]
    return 2**30 + int(drawn) % 2**30
