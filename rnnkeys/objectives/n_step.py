"""n-step returns over windows."""

from __future__ import annotations

import torch
from torch import Tensor


def n_step_returns(
    rewards: Tensor,
    next_value: Tensor,
    ends: Tensor,
    gamma: float,
    n_steps: int,
    explores: Tensor | None = None,
) -> Tensor:
    r"""Sum up to ``n`` rewards, and bootstrap from the value after the last one.

    .. math:: G_t = \sum_{k<m} \gamma^k r_{t+k} + \gamma^m v_{t+m}

    where ``m`` is ``n``, or less if one of the steps is an end or the next one explores.

    Args:
        rewards: ``[B, T]``, reward of each step.
        next_value: ``[B, T]``, value of the observation after each step; 0 where it is terminal.
        ends: bool ``[B, T]``. The sum stops at an end, with its reward. True in the last column.
        gamma: discount, from 0 to 1.
        n_steps: ``n``, at least 1.
        explores: bool ``[B, T]``, True where the action of a step is not the best one: the sum
            stops before such a step, unless it starts there.

    Returns:
        ``[B, T]``.

    Examples:
        >>> ones = torch.ones(1, 3)
        >>> n_step_returns(ones, 10 * ones, torch.tensor([[False, False, True]]), 0.5, 2)
        tensor([[4., 4., 6.]])
    """
    stops = ends[:, :-1] if explores is None else ends[:, :-1] | explores[:, 1:]
    one_step = rewards + gamma * next_value
    returns = one_step
    for _ in range(min(n_steps, rewards.shape[1]) - 1):
        # One more reward in front of the sum that starts at the next step.
        longer = rewards[:, :-1] + gamma * returns[:, 1:]
        returns = torch.cat([torch.where(stops, one_step[:, :-1], longer), returns[:, -1:]], 1)
    return returns
