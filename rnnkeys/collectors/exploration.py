"""Exploration that differs from actor to actor."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Categorical, OneHot, TensorSpec
from torchrl.envs.utils import ExplorationType, exploration_type

from ..sequences import append_dims


def epsilon_ladder(count: int, base: float = 0.4, exponent: float = 7.0) -> Tensor:
    r"""Return a rate of random actions for each of ``count`` actors, from high to low.

    .. math:: \epsilon_i = \varepsilon^{1 + \alpha i / (N - 1)}

    See "Distributed Prioritized Experience Replay", Horgan et al., 2018 (arXiv:1803.00933).

    Args:
        count: ``N``, the number of actors, or of all their environments. One alone has the rate
            ``base``.
        base: rate of the first, from 0 to 1.
        exponent: ``alpha``; the last rate is ``base ** (1 + exponent)``.

    Returns:
        float32 ``[count]``.

    Examples:
        >>> epsilon_ladder(3, base=0.5, exponent=2.0)
        tensor([0.5000, 0.2500, 0.1250])
    """
    return base ** (1 + exponent * torch.arange(count) / max(count - 1, 1))


class EpsilonGreedy(TensorDictModuleBase):
    """Replace actions by random ones, in each environment at a rate of its own.

    As TorchRL's ``EGreedyModule`` it acts where the exploration type is ``RANDOM``. ``floor`` is a
    lower bound of all rates: decrease it from 1 to 0 to start a run with random actions. It is a
    buffer, and reaches actors with the weights; ``epsilons`` are not.

    Args:
        spec: of one environment's action.
        epsilons: rates, ``[num_envs]`` or one for all environments.
        action_key: key of the action.
        action_mask_key: key of the action mask, bool ``[num_envs, A]``; random actions are drawn
            among those where it is True. Where none is, the action stays.

    Raises:
        ValueError: if there is an ``action_mask_key`` and ``spec`` is not of one discrete action.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Categorical
        >>> explore = EpsilonGreedy(Categorical(3), epsilon_ladder(4))
        >>> explore(TensorDict({"action": torch.zeros(4, dtype=torch.int64)}, [4]))["action"].shape
        torch.Size([4])
    """

    floor: Tensor

    def __init__(
        self,
        spec: TensorSpec,
        epsilons: Tensor | float,
        action_key: NestedKey = "action",
        action_mask_key: NestedKey | None = None,
    ) -> None:
        super().__init__()
        if action_mask_key is not None and type(spec) not in (OneHot, Categorical):
            raise ValueError(
                "action_mask_key masks one discrete action: spec must be OneHot or Categorical. "
                f"Got {spec}."
            )
        out_keys: list[Any] = [action_key]
        in_keys: list[Any] = [key for key in (action_key, action_mask_key) if key is not None]
        self.in_keys = in_keys
        self.out_keys = out_keys
        self.action_key = action_key
        self.action_mask_key = action_mask_key
        self.spec = spec
        self.epsilons = torch.as_tensor(epsilons)
        self.register_buffer("floor", torch.tensor(0.0))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """See the class."""
        if exploration_type() is not ExplorationType.RANDOM:
            return tensordict
        epsilons = self.epsilons.to(self.floor.device).maximum(self.floor)
        action = tensordict.get(self.action_key)
        draws = torch.rand(tensordict.shape, device=action.device) < epsilons
        draws = append_dims(draws, action.ndim)
        if self.action_mask_key is None:
            random = self.spec.rand(tensordict.shape).to(action.device)
        else:
            random, exists = _draw_allowed(tensordict.get(self.action_mask_key), action)
            draws = draws & exists
        return tensordict.set(self.action_key, torch.where(draws, random, action))


def _draw_allowed(allowed: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one of the allowed actions at equal chances.

    Args:
        allowed: bool ``[*, A]``.
        like: actions, one-hot ``[*, A]`` or indices ``[*]``.

    Returns:
        Random actions as ``like``, and whether an action is allowed, with dimensions for ``like``.
    """
    chances = torch.rand(allowed.shape, device=allowed.device).masked_fill(~allowed, -1.0)
    index, exists = chances.argmax(-1), allowed.any(-1)
    if like.shape == allowed.shape:
        random = nn.functional.one_hot(index, allowed.shape[-1]).to(like.dtype)
        return random, exists.unsqueeze(-1)
    return index.reshape(like.shape).to(like.dtype), exists.reshape(like.shape)
