"""Each actor explores in its own way, from often at random to hardly ever."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType, exploration_type


def epsilon_ladder(count: int, base: float = 0.4, exponent: float = 7.0) -> Tensor:
    r"""Return how often each of ``count`` actors acts at random, from often to hardly ever.

    .. math:: \epsilon_i = \varepsilon^{1 + \alpha i / (N - 1)}

    See "Distributed Prioritized Experience Replay", Horgan et al., 2018 (arXiv:1803.00933).

    Args:
        count: ``N``: actors, or all environments of all actors. One alone has the rate ``base``.
        base: of the first, between 0 and 1.
        exponent: ``alpha``: the last one has ``base ** (1 + exponent)``.

    Returns:
        float32 ``[count]``.

    Examples:
        >>> epsilon_ladder(3, base=0.5, exponent=2.0)
        tensor([0.5000, 0.2500, 0.1250])
    """
    return base ** (1 + exponent * torch.arange(count) / max(count - 1, 1))


class EpsilonGreedy(TensorDictModuleBase):
    """Random actions now and then, in each environment as often as its rung of the ladder says.

    Args:
        spec: of one environment's action.
        epsilons: ``[num_envs]`` or one for all.

    ``floor`` is a rate that none falls below: let it sink from 1 to 0, so that a run starts with
    random actions. As a buffer it travels to actors with the weights; ``epsilons`` do not.
    """

    def __init__(self, spec: TensorSpec, epsilons: Tensor | float) -> None:
        super().__init__()
        self.in_keys = self.out_keys = ["action"]
        self.spec = spec
        self.epsilons = torch.as_tensor(epsilons)
        self.floor: Tensor
        self.register_buffer("floor", torch.tensor(0.0))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if exploration_type() is not ExplorationType.RANDOM:
            return tensordict
        epsilons = self.epsilons.to(self.floor.device).maximum(self.floor)
        action = tensordict["action"]
        random = self.spec.rand(tensordict.shape).to(action.device)
        draws = torch.rand(tensordict.shape, device=action.device) < epsilons
        draws = draws.reshape(*draws.shape, *[1] * (action.ndim - draws.ndim))
        return tensordict.set("action", torch.where(draws, random, action))
