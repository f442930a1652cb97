"""How good a policy is: the returns of episodes that it plays without exploration."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from rnnkeys import get_env_transforms_from_module


class Evaluation:
    """Play episodes without exploration, and report the return of each.

    Args:
        env: plays as many episodes at once as it has environments.
        policy: to be played, with the weights that it has at the time.
    """

    def __init__(self, env: TransformedEnv, policy: TensorDictModuleBase) -> None:
        self.env = env
        self.env.append_transform(get_env_transforms_from_module(policy))
        self.policy = policy

    @torch.no_grad()
    @set_exploration_type(ExplorationType.DETERMINISTIC)
    def __call__(self, seed: int) -> Tensor:
        """Return float32 ``[episodes]``; the same seed starts the same episodes."""
        self.env.set_seed(seed)
        step = self.env.reset()
        running = torch.ones(step.shape, dtype=torch.bool, device=step.device)
        returns = torch.zeros(step.shape, device=step.device)
        while running.any():
            step, next_step = self.env.step_and_maybe_reset(self.policy(step))
            returns += step["next", "reward"].squeeze(-1) * running
            running &= ~step["next", "done"].squeeze(-1)
            step = next_step
        return returns.reshape(-1).cpu()
