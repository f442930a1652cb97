"""Collection in the learner's own process."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import nn

from .base import Actors, check_plan, draw_seed
from .worker import MakeEnv, Plan, Policy, Source, read_weights


class LocalActors(Actors):
    """Collect in this process, at the time of :meth:`next`.

    The interface and the batches are those of :class:`ProcessActors` with one actor, for programs
    that run with and without actors, and to see an exception of an environment where it is raised.

    Args:
        make_env: makes the environment, with all transforms that the policy needs.
        policy: a TensorDict module, or a function that makes it from the actor's number, 0. It is
            not copied: gradient steps on its parameters take effect at once.
        frames_per_batch: steps in a batch, of all environments together.
        seed: from which the environments' seed is drawn.
        first_trajectory: number of the first trajectory.

    Raises:
        TypeError: if ``make_env`` or ``policy`` is of a wrong type.
        ValueError: if a number is out of range.

    Examples:
        >>> from torchrl.envs import GymEnv, TransformedEnv
        >>> from rnnkeys import drqn_policy, get_env_transforms_from_module
        >>> policy = drqn_policy(GymEnv("CartPole-v1").action_spec, (4,), hidden_size=8)
        >>> def make_env():
        ...     transforms = get_env_transforms_from_module(policy)
        ...     return TransformedEnv(GymEnv("CartPole-v1"), transforms)
        >>> with LocalActors(make_env, policy, frames_per_batch=16) as actors:
        ...     batch = actors.next()
        >>> batch.shape, batch["collector", "policy_version"].unique()
        (torch.Size([1, 16]), tensor([0]))
    """

    def __init__(
        self,
        make_env: MakeEnv,
        policy: Policy,
        *,
        frames_per_batch: int,
        seed: int = 0,
        first_trajectory: int = 0,
    ) -> None:
        super().__init__(first_trajectory)
        plan = Plan(make_env, policy, frames_per_batch)
        check_plan(plan)
        rng = torch.get_rng_state()
        self._source = Source(plan, 0, draw_seed(seed, 0))
        torch.set_rng_state(rng)

    def next(self) -> TensorDictBase:
        """Collect the next batch ``[num_envs, T]``."""
        return self._label(self._source.next(), 0, self._policy_version)

    def update_policy(self, policy: nn.Module | TensorDictBase) -> None:
        """Copy weights into the policy, unless they are its own."""
        self._source.load_weights(read_weights(policy))
        self._policy_version += 1

    def close(self) -> None:
        """Close the environment."""
        self._source.close()
