"""Encoders of the observations of ``make_gym_env`` and distributions of its actions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    AddStateIndependentNormalScale,
    CompositeDistribution,
    TensorDictModuleBase,
)
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.distributions import Categorical, Independent
from torchrl.data import Composite
from torchrl.modules import IndependentNormal, TanhNormal

from .checks import as_float, as_int
from .policies import ImageEncoder as ImageEncoder


class Layers(TensorDictModuleBase):
    """Layers that read and write entries; a faster ``TensorDictModule`` for plain tensors.

    ``TensorDictModule`` looks for a way to convert whatever its module returns. In a step of a
    small policy that takes longer than the layers themselves.

    Args:
        layers: returns a tensor, or a tuple of tensors.
        in_keys: entries that are the arguments of ``layers``.
        out_keys: entries for what it returns.

    Examples:
        >>> from tensordict import TensorDict
        >>> data = TensorDict(observation=torch.ones(2, 3), batch_size=[2])
        >>> Layers(nn.Linear(3, 5), ["observation"], ["logits"])(data)["logits"].shape
        torch.Size([2, 5])
    """

    def __init__(
        self, layers: nn.Module, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]
    ) -> None:
        super().__init__()
        self.layers = layers
        self.in_keys: list[NestedKey] = list(in_keys)
        self.out_keys: list[NestedKey] = list(out_keys)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """See the class."""
        out = self.layers(*(tensordict.get(key) for key in self.in_keys))
        values = (out,) if isinstance(out, Tensor) else out
        for key, value in zip(self.out_keys, values, strict=True):
            tensordict.set(key, value)
        return tensordict


def action_distribution(spec: Any, squash: bool = True) -> tuple[type, dict[str, Any], int]:
    """Choose the distribution of an actor from the spec of its actions.

    Args:
        spec: spec of the actions of :func:`make_gym_env`.
        squash: squash a Gaussian by tanh into the bounds, if all bounds are finite. Without it, the
            environment clips actions.

    Returns:
        The class of the distribution, its keyword arguments, and the number of logits or means.
        Several actions at a time, a composite spec, have TorchRL's ``CompositeDistribution``.

    Examples:
        >>> from rnnkeys.environments import make_gym_env
        >>> action_distribution(make_gym_env("CartPole-v1").action_spec)[1:]
        ({'sizes': [2]}, 2)
    """
    if isinstance(spec, Composite):
        return _composite_distribution(spec, squash)
    if spec.domain == "discrete":
        sizes = (spec.space.high[0] + 1).tolist()
        return Choices, {"sizes": sizes}, sum(sizes)
    low, high = spec.space.low[0], spec.space.high[0]
    if squash and torch.isfinite(high - low).all():  # TorchRL writes inf as the largest float
        return TanhNormal, {"low": low, "high": high, "tanh_loc": False}, len(low)
    return IndependentNormal, {}, len(low)


def _composite_distribution(spec: Composite, squash: bool) -> tuple[type, dict[str, Any], int]:
    parts = {key[-1]: (key, *action_distribution(leaf, squash)) for key, leaf in _split(spec)}
    options = {
        "name_map": {name: key for name, (key, *_) in parts.items()},
        "distribution_map": {name: kind for name, (_, kind, *_) in parts.items()},
        "extra_kwargs": {name: given for name, (_, _, given, _) in parts.items()},
    }
    return CompositeDistribution, options, sum(outputs for *_, outputs in parts.values())


def _split(spec: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Return the keys and specs of several actions; one action alone has the key ``()``."""
    if not isinstance(spec, Composite):
        return [((), spec)]
    return [(key, spec[key]) for key in spec.keys(True, True)]


def find_action_keys(spec: Any) -> dict[str, Any]:
    """Return the keys of actions and their log-probabilities, for ``set_keys`` of a PPO loss.

    Args:
        spec: spec of the actions of :func:`rnnkeys.environments.make_gym_env`.

    Examples:
        >>> from torchrl.data import Bounded
        >>> parts = Composite(move=Bounded(-1, 1, (2,)), turn=Bounded(-1, 1, (1,)))
        >>> find_action_keys(Composite(action=parts))["sample_log_prob"]
        [('action', 'move_log_prob'), ('action', 'turn_log_prob')]
        >>> find_action_keys(Bounded(-1, 1, (2,)))
        {'action': 'action', 'sample_log_prob': 'action_log_prob'}
    """
    if not isinstance(spec, Composite):
        return {"action": "action", "sample_log_prob": "action_log_prob"}
    keys = [key for key, _ in _split(spec)]
    log_probs = [(*key[:-1], f"{key[-1]}_log_prob") for key in keys]
    return {"action": keys, "sample_log_prob": log_probs}


class ActionParameters(nn.Module):
    """Turn the outputs of a network into the parameters of :func:`action_distribution`.

    Logits stay as they are. Means of continuous actions get a deviation, which is a parameter and
    does not depend on the observation.

    Args:
        spec: spec of the actions of :func:`rnnkeys.environments.make_gym_env`.
        log_std_init: logarithm of the deviations at the start.

    Attributes:
        out_keys: keys of what ``forward`` returns: ``"logits"``; ``"loc"`` and ``"scale"``; or, for
            several actions at a time, such entries of each, ``("params", name, "logits")``.
        distribution_keys: the ``in_keys`` of a ``ProbabilisticActor``.

    Examples:
        >>> from torchrl.data import Bounded
        >>> parameters = ActionParameters(Bounded(-1, 1, (1, 2)))
        >>> parameters.out_keys
        ['loc', 'scale']
        >>> parameters(torch.zeros(1, 2))[1].shape
        torch.Size([1, 2])
    """

    def __init__(self, spec: Any, log_std_init: float = 0.0) -> None:
        super().__init__()
        self.out_keys: list[NestedKey] = []
        self.sizes: list[int] = []
        self.heads = nn.ModuleList()
        for key, leaf in _split(spec):
            kind, _, outputs = action_distribution(leaf)
            head, names = nn.Identity(), ["logits"]
            if kind is not Choices:
                head = AddStateIndependentNormalScale(outputs, init_value=log_std_init)
                names = ["loc", "scale"]
            self.heads.append(head)
            self.sizes.append(outputs)
            self.out_keys += [("params", key[-1], name) if key else name for name in names]
        several = isinstance(spec, Composite)
        self.distribution_keys: list[NestedKey] = ["params"] if several else self.out_keys

    def forward(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Split outputs ``[*, outputs]``, and return an entry for each of ``out_keys``."""
        values: list[Tensor] = []
        for head, part in zip(self.heads, outputs.split(self.sizes, -1), strict=True):
            made = head(part)
            values += [made] if isinstance(made, Tensor) else made
        return tuple(values)


class Choices(Independent):
    """Distribution of the int64 actions that stand for discrete ones, a choice for each entry.

    Args:
        logits: unnormalized log-probabilities of all choices, ``[*, sum(sizes)]``.
        sizes: number of choices of each entry.
        action_mask: bool ``[*, sum(sizes)]``, False at choices that are not allowed: they have
            probability zero. An entry without any allowed choice is as if all were.

    Examples:
        >>> choices = Choices(torch.zeros(7, 5), [2, 3])
        >>> choices.sample().shape, choices.entropy()[0].exp()
        (torch.Size([7, 2]), tensor(6.))
    """

    def __init__(
        self, logits: Tensor, sizes: Sequence[int], action_mask: Tensor | None = None
    ) -> None:
        most = max(sizes)
        if action_mask is not None:
            logits = torch.where(action_mask, logits, -1e9)
        # Choices that an entry lacks get probability zero, and gradients stay finite.
        padded = [
            nn.functional.pad(part, (0, most - part.shape[-1]), value=-2e9)
            for part in logits.split(list(sizes), -1)
        ]
        choices = Categorical(logits=torch.stack(padded, -2), validate_args=False)
        super().__init__(choices, 1, validate_args=False)


class RunningNorm(nn.Module):
    """Normalize observations by the mean and variance of those seen so far.

    Args:
        shape: shape of one observation.
        limit: largest magnitude of a normalized value, at least 0.

    Raises:
        ValueError: if ``shape`` is not a sequence of sizes, or ``limit`` is negative.

    Examples:
        >>> norm = RunningNorm((1,))
        >>> norm.update(torch.tensor([[1.0], [3.0]]))
        >>> norm(torch.tensor([[4.0]]))
        tensor([[2.]])
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: Sequence[int] = (), limit: float = 10.0) -> None:
        super().__init__()
        if not isinstance(shape, Sequence) or isinstance(shape, str):
            raise ValueError(f"shape must be a sequence of sizes, such as (4,). Got {shape!r}.")
        sizes = [as_int("shape", size, minimum=0) for size in shape]
        self.limit = as_float("limit", limit, maximum=math.inf)
        self.register_buffer("mean", torch.zeros(sizes))
        self.register_buffer("var", torch.ones(sizes))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Update the statistics with values ``[*, *shape]``, between two rollouts.

        Raises:
            ValueError: if the values have another shape.
        """
        self._check_shape(values)
        values = values.reshape(-1, *self.mean.shape)
        if not len(values):
            return  # of none, such as those that a mask leaves, the mean would be NaN
        share = len(values) / (self.count + len(values))
        delta = values.mean(0) - self.mean
        self.var.lerp_(values.var(0, correction=0) + (1 - share) * delta**2, share)
        self.mean.add_(share * delta)
        self.count.add_(len(values))

    def forward(self, values: Tensor) -> Tensor:
        """Return values ``[*, *shape]`` of mean 0 and deviation 1.

        Raises:
            ValueError: if the values have another shape.
        """
        self._check_shape(values)
        return ((values - self.mean) / (self.var + 1e-8).sqrt()).clamp(-self.limit, self.limit)

    def _check_shape(self, values: Tensor) -> None:
        size = self.mean.ndim
        if values.ndim < size or values.shape[values.ndim - size :] != self.mean.shape:
            raise ValueError(
                f"values must have the shape [*, {', '.join(map(str, self.mean.shape))}], that of "
                f"RunningNorm(shape={tuple(self.mean.shape)}). Got {list(values.shape)}."
            )
