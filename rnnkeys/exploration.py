"""Exploration of continuous actions with noise that lasts for several steps.

Noise that is drawn again at every step cancels itself out where a body has inertia; noise that
lasts pushes one way for a while. A single action keeps the distribution that the actor gives it, so
that its log-probability is the one that a policy gradient needs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type
from torchrl.modules.models.exploration import gSDEModule

from .checks import as_float, as_int


class LastingNoise(TensorDictModuleBase):
    r"""Draw the actions of an actor again, from noise that is correlated over time.

    .. math:: x_t = c\,x_{t-1} + \sqrt{1 - c^2}\,\xi_t, \quad \xi_t \sim \mathcal N(0, 1)

    An episode starts with :math:`x_0 = \xi_0`. The module runs after the actor while a collector
    explores, and changes nothing otherwise. It keeps the noise of each environment of one
    collector between calls.

    Args:
        actor: ``ProbabilisticActor`` of a Gaussian, with or without a transform such as tanh, that
            has written ``"loc"`` and ``"scale"``, ``[B, A]``.
    """

    def __init__(self, actor: Any) -> None:
        super().__init__()
        self.in_keys: list[NestedKey] = ["loc", "scale", "is_init"]
        self.out_keys: list[NestedKey] = ["action", "action_log_prob"]
        self._make_distribution = actor.build_dist_from_params  # a method: registers no weights
        self._noise: Tensor | None = None

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Replace ``"action"`` and ``"action_log_prob"`` while exploring."""
        if exploration_type() is not ExplorationType.RANDOM:
            return tensordict
        action = tensordict["loc"] + self._deviate(tensordict)
        distribution = self._make_distribution(tensordict)
        for squash in getattr(distribution, "transforms", ())[:1]:
            action = squash(action)
        tensordict["action"] = action
        tensordict["action_log_prob"] = distribution.log_prob(action)
        return tensordict

    @abstractmethod
    def _deviate(self, tensordict: TensorDictBase) -> Tensor:
        """Return the difference between the action and ``"loc"``, ``[B, A]``."""

    def _advance(self, fresh: Tensor, is_init: Tensor, correlation: float) -> Tensor:
        """Return the noise of this step; ``fresh`` where an episode starts."""
        if self._noise is None or self._noise.shape != fresh.shape:
            self._noise = fresh
        kept = correlation * self._noise + math.sqrt(1 - correlation**2) * fresh
        start = is_init.reshape(-1, *[1] * (fresh.ndim - 1))
        self._noise = torch.where(start, fresh, kept)
        return self._noise


class CorrelatedNoise(LastingNoise):
    r"""Explore with noise :math:`\sigma x_t` of a fixed correlation ``c``.

    See "Colored Noise in PPO: Improved Exploration and Performance through Correlated Action
    Sampling", Hollenstein et al., 2024 (arXiv:2312.11091).

    Args:
        actor: as for :class:`LastingNoise`.
        correlation: ``c``, from 0 to 1; 0 is the actor's own noise.

    Raises:
        ValueError: if ``correlation`` is out of range.
    """

    def __init__(self, actor: Any, correlation: float) -> None:
        super().__init__(actor)
        self.correlation = as_float("correlation", correlation)

    def _deviate(self, tensordict: TensorDictBase) -> Tensor:
        scale = tensordict["scale"]
        fresh = torch.randn_like(scale)
        return scale * self._advance(fresh, tensordict["is_init"], self.correlation)


class StateDependentNoise(LastingNoise):
    """Explore with noise that is a linear function of features, drawn now and then (gSDE).

    See "Smooth Exploration for Robotic Reinforcement Learning", Raffin et al., 2021
    (arXiv:2005.05719). The matrix stays here: TorchRL's ``gSDENoise`` stores it with every step.

    Args:
        actor: as for :class:`LastingNoise`; it has also written ``"features"``, ``[B, F]``.
        scale: the actor's module that computes ``"scale"`` from the features.
        sample_every: steps between two draws of the matrix; by default one draw per episode.

    Raises:
        ValueError: if ``sample_every`` is not an int of at least 1.
    """

    def __init__(
        self, actor: Any, scale: StateDependentScale, sample_every: int | None = None
    ) -> None:
        super().__init__(actor)
        self.in_keys.append("features")
        self._scale = [scale]  # in a list: its weights are the actor's
        self.sample_every = None if sample_every is None else as_int("sample_every", sample_every)
        self._calls = 0

    def _deviate(self, tensordict: TensorDictBase) -> Tensor:
        sigma, features = self._scale[0].sigma, tensordict["features"]
        fresh = torch.randn(*tensordict.batch_size, *sigma.shape, device=sigma.device)
        due = self.sample_every is not None and self._calls % self.sample_every == 0
        self._calls += 1
        matrix = sigma * self._advance(fresh, tensordict["is_init"], float(not due))
        return (matrix @ features.unsqueeze(-1)).squeeze(-1)


class StateDependentScale(gSDEModule):
    """Deviation of state-dependent exploration: TorchRL's ``gSDEModule`` without its noise.

    Args:
        num_features: ``F``; the features are not trained through the deviation.
        num_actions: ``A``.
        log_std_init: logarithm of the weights' deviation at the start.

    Examples:
        >>> scale = StateDependentScale(4, 2, log_std_init=-1.0)
        >>> loc, std = scale(torch.zeros(3, 2), torch.ones(3, 4))
        >>> std[0]
        tensor([0.7358, 0.7358], grad_fn=<SelectBackward0>)
    """

    def __init__(self, num_features: int, num_actions: int, log_std_init: float = 0.0) -> None:
        super().__init__(num_actions, num_features)
        weights: Any = self.log_sigma
        nn.init.constant_(weights, math.log(math.expm1(math.exp(log_std_init))))

    def forward(self, mean: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return ``mean``, ``[*, A]``, and the deviation, ``[*, A]``, for features ``[*, F]``."""
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            loc, scale, _, _ = super().forward(mean, features.detach(), None)
        return loc, scale
