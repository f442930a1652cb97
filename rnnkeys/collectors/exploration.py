"""Exploration that differs from actor to actor."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Categorical, OneHot, TensorSpec
from torchrl.envs.utils import ExplorationType, exploration_type

from ..checks import (
    Problem,
    as_float,
    as_int,
    find_meta_problems,
    find_tensor_problems,
    find_type_problems,
    raise_first,
)
from ..keys import as_key, entry_names
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

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> epsilon_ladder(3, base=0.5, exponent=2.0)
        tensor([0.5000, 0.2500, 0.1250])
    """
    count = as_int("count", count)
    base = as_float("base", base)
    exponent = as_float("exponent", exponent, maximum=math.inf)
    return base ** (1 + exponent * torch.arange(count) / max(count - 1, 1))


class EpsilonGreedy(TensorDictModuleBase):
    r"""Replace actions by random ones, in each environment at a rate of its own.

    As TorchRL's ``EGreedyModule`` it acts where the exploration type is ``RANDOM``. ``floor`` is a
    lower bound of all rates: decrease it from 1 to 0 to start a run with random actions. It is a
    buffer, and reaches actors with the weights; ``epsilons`` are not.

    With ``first_visits`` an observation that was seen ``N`` times has a rate of at least

    .. math:: \epsilon(o) = N_0 / (N_0 + N(o))

    so that a place that is reached at last, and rarely, is explored as much as the way to it. Rates
    of this kind are "greedy in the limit with infinite exploration": S. Singh, T. Jaakkola, M. L.
    Littman and C. Szepesvari, "Convergence Results for Single-Step On-Policy Reinforcement-Learning
    Algorithms", 2000. It is meant for environments with few distinct observations: each of them
    takes an entry of a dictionary, and a resumed run counts from 0 again.

    Args:
        spec: of one environment's action.
        epsilons: rates, ``[num_envs]`` or one for all environments.
        action_key: key of the action.
        action_mask_key: key of the action mask, bool ``[num_envs, A]``; random actions are drawn
            among those where it is True. Where none is, the action stays.
        first_visits: ``N_0``; 0 for rates that do not depend on the observation.
        observation_key: key of the observation that is counted, ``[num_envs, ...]``.

    Raises:
        TypeError: if ``spec`` is not a spec.
        ValueError: if rates are not from 0 to 1, or if there is an ``action_mask_key`` and ``spec``
            is not of one discrete action.

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
        first_visits: float = 0.0,
        observation_key: NestedKey = "observation",
    ) -> None:
        super().__init__()
        if not isinstance(spec, TensorSpec):
            raise TypeError(
                f"spec must be a TensorSpec, that of one environment's action. Got {spec!r}."
            )
        if action_mask_key is not None and type(spec) not in (OneHot, Categorical):
            raise ValueError(
                "action_mask_key masks one discrete action: spec must be OneHot or Categorical. "
                f"Got {spec}."
            )
        self.spec = spec
        self.epsilons = _as_rates(epsilons)
        self.first_visits = as_float("first_visits", first_visits, maximum=math.inf)
        self.action_key = as_key("action_key", action_key)
        self.observation_key = as_key("observation_key", observation_key)
        self.action_mask_key = action_mask_key
        self.in_keys: list[Any] = [self.action_key]
        if action_mask_key is not None:
            self.action_mask_key = as_key("action_mask_key", action_mask_key)
            self.in_keys.append(self.action_mask_key)
        if self.first_visits:
            self.in_keys.append(self.observation_key)
        self.out_keys: list[Any] = [self.action_key]
        self._visits: defaultdict[bytes, int] = defaultdict(int)
        self.register_buffer("floor", torch.tensor(0.0))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Draw some actions again while exploring.

        Args:
            tensordict: ``[num_envs]``, with the actions.

        Raises:
            KeyError: if an entry is missing.
            TypeError: if an entry is not a tensor.
            ValueError: if the action has not the shape of the spec.
        """
        if exploration_type() is not ExplorationType.RANDOM:
            return tensordict
        raise_first(self._find_problems(tensordict))
        epsilons = self.epsilons.to(self.floor.device).maximum(self.floor)
        action = tensordict.get(self.action_key)
        if self.first_visits:
            epsilons = epsilons.maximum(self._count(tensordict).to(epsilons.device))
        draws = torch.rand(tensordict.shape, device=action.device) < epsilons
        draws = append_dims(draws, action.ndim)
        if self.action_mask_key is None:
            random = self.spec.rand(tensordict.shape).to(action.device)
            if random.shape != action.shape:
                raise ValueError(
                    f"The action {self.action_key!r} must have the shape {list(random.shape)} of "
                    f"the batch size and spec. Got {list(action.shape)}. Pass the spec of one "
                    "environment's action."
                )
        else:
            random, exists = _draw_allowed(tensordict.get(self.action_mask_key), action)
            draws = draws & exists
        return tensordict.set(self.action_key, torch.where(draws, random, action))

    def _count(self, tensordict: TensorDictBase) -> Tensor:
        """Count the observations of this step, and return the rates that follow from the counts."""
        rates = []
        observations = tensordict.get(self.observation_key)
        features = observations.shape[tensordict.ndim :]
        for observation in observations.reshape(tensordict.batch_size.numel(), *features).unbind(0):
            numbers = (observation + 0).flatten().cpu()  # makes -0.0 the same as 0.0
            key = numbers.view(torch.uint8).numpy().tobytes()  # NumPy has no bfloat16
            rates.append(self.first_visits / (self.first_visits + self._visits[key]))
            self._visits[key] += 1
        return torch.tensor(rates).reshape(tensordict.shape)

    def _find_problems(self, tensordict: Any) -> Iterator[Problem]:
        yield from find_type_problems(tensordict, "EpsilonGreedy")
        for key in self.in_keys:
            if tensordict.get(key, None) is None:
                yield Problem(
                    "missing-entry",
                    f"EpsilonGreedy reads {key!r}, which is not in the TensorDict: it has "
                    f"{entry_names(tensordict)}.",
                    "Run it after the policy, or name another key.",
                    KeyError,
                )
        yield from find_tensor_problems(tensordict, self.in_keys)
        yield from find_meta_problems(tensordict, self.in_keys[0], "EpsilonGreedy")


def _as_rates(epsilons: Any) -> Tensor:
    """Return rates as a tensor."""
    if not isinstance(epsilons, Tensor):
        return torch.tensor(as_float("epsilons", epsilons))
    if not bool(((epsilons >= 0) & (epsilons <= 1)).all()):
        raise ValueError(f"epsilons must be from 0 to 1. Got epsilons={epsilons.tolist()}.")
    return epsilons


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
