"""The action and the reward of the step before, as inputs of a policy."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import (
    Bounded,
    Categorical,
    MultiCategorical,
    TensorSpec,
    Unbounded,
)
from torchrl.envs import Transform

from ..keys import as_key, as_tuple


class PreviousActionReward(Transform):
    r"""Show the previous action :math:`a_{t-1}` and reward :math:`r_{t-1}` to the policy.

    Meta-learning and R2D2 feed them to the recurrent layer. See "RL²: Fast Reinforcement Learning
    via Slow Reinforcement Learning", Duan et al., 2016 (arXiv:1611.02779).

    An environment with this transform has the entries ``"previous_action"`` and
    ``"previous_reward"`` beside the action and the reward, both float32 and zero at the first step
    of an episode. The ``next`` tensordict holds those of its own step, also where an episode ends,
    so that collected sequences hold what the policy saw and losses read what it would see next.

    Append it after transforms of the reward that the policy is to see. ``CatTensors`` joins the
    entries to the observation.

    Args:
        action_key: key of the action. Indices become one-hot vectors, several choices one-hot
            vectors end to end; other actions stay as they are.
        reward_key: key of the reward; None shows the action alone.

    Examples:
        >>> from torchrl.envs import GymEnv, TransformedEnv
        >>> env = TransformedEnv(GymEnv("CartPole-v1"), PreviousActionReward())
        >>> rollout = env.rollout(5)
        >>> rollout["previous_reward"].squeeze(-1)
        tensor([0., 1., 1., 1., 1.])
        >>> torch.equal(rollout["previous_action"][1:], rollout["action"][:-1].float())
        True
    """

    def __init__(
        self, action_key: NestedKey = "action", reward_key: NestedKey | None = "reward"
    ) -> None:
        super().__init__()
        self.action_key = as_key("action_key", action_key)
        self.reward_key = None if reward_key is None else as_key("reward_key", reward_key)
        self._action_spec: TensorSpec | None = None

    @property
    def previous_action_key(self) -> NestedKey:
        """Key of the previous action."""
        return _previous(self.action_key)

    @property
    def previous_reward_key(self) -> NestedKey | None:
        """Key of the previous reward."""
        return None if self.reward_key is None else _previous(self.reward_key)

    def transform_observation_spec(self, observation_spec: Any) -> Any:
        """Add the entries to the observations."""
        for key, zero in self._zeros().items():
            spec = Unbounded(zero.shape, dtype=torch.float32, device=zero.device)
            observation_spec[key] = spec
        return observation_spec

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        # Where single environments or agents are reset, TorchRL keeps the entries of the others.
        for key, zero in self._zeros().items():
            tensordict_reset.set(key, zero)
        return tensordict_reset

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        action = encode_action(self._read_action_spec(), tensordict.get(self.action_key))
        next_tensordict.set(self.previous_action_key, action)
        if self.reward_key is not None and self.previous_reward_key is not None:
            reward = next_tensordict.get(self.reward_key).float()
            next_tensordict.set(self.previous_reward_key, reward)
        return next_tensordict

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Raise: an environment runs the transform.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "PreviousActionReward needs the step before, so append it to an environment. What it "
            "writes is stored with the other observations."
        )

    def _read_action_spec(self) -> TensorSpec:
        if self._action_spec is None:
            parent: Any = self.parent
            self._action_spec = parent.full_action_spec[self.action_key]
        assert self._action_spec is not None
        return self._action_spec

    def _zeros(self) -> dict[Any, Tensor]:
        parent: Any = self.parent
        spec = parent.full_action_spec[self.action_key]
        self._action_spec = spec
        zeros = {self.previous_action_key: torch.zeros_like(encode_action(spec, spec.zero()))}
        if self.reward_key is not None:
            zeros[_previous(self.reward_key)] = (
                parent.full_reward_spec[self.reward_key].zero().float()
            )
        return zeros


def encode_action(spec: TensorSpec, action: Tensor) -> Tensor:
    """Return actions as float32 vectors, indices as one-hot vectors.

    Args:
        spec: of the action.
        action: of the spec.

    Returns:
        ``[*, A]``; several choices lie end to end.

    Examples:
        >>> encode_action(Categorical(3), torch.tensor([2, 0]))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    sizes = _choices(spec)
    if sizes is None:
        return action.float()
    if isinstance(spec, Categorical) and spec.shape[-1:] != (1,):
        action = action.unsqueeze(-1)
    parts = zip(action.long().unbind(-1), sizes, strict=True)
    return torch.cat([nn.functional.one_hot(part, size) for part, size in parts], -1).float()


def _choices(spec: Any) -> list[int] | None:
    """Return the number of choices of each entry; None if actions are not indices."""
    if isinstance(spec, MultiCategorical):
        return [int(size) for size in spec.nvec.reshape(-1, spec.shape[-1])[0]]
    if isinstance(spec, Categorical):
        return [int(spec.space.n)]
    if isinstance(spec, Bounded) and not spec.dtype.is_floating_point:
        high: Any = getattr(spec.space, "high")  # noqa: B009 (its type does not declare it)
        return (high.reshape(-1, high.shape[-1])[0] + 1).tolist()
    return None


def _previous(key: NestedKey) -> NestedKey:
    *group, name = as_tuple(key)
    return unravel_key((*group, f"previous_{name}"))
