"""Wired losses whose reported averages count valid steps alone.

The methods with a leading underscore override hooks of TorchRL's losses (0.14.1), which have no
public counterpart.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from torch import Tensor
from torchrl.objectives import (
    A2CLoss,
    CrossQLoss,
    DDPGLoss,
    DiscreteSACLoss,
    IQLLoss,
    PPOLoss,
    REDQLoss,
    SACLoss,
)
from torchrl.objectives.value import GAE

from ..checks import Problem, raise_first
from .valid_steps import (
    effective_sample_size,
    expand_mask,
    fill_with_mean,
    masked_mean,
    masked_variance,
    standardize,
)
from .wiring import Wired


class WiredGAE(Wired):
    """A wired GAE, or MultiAgentGAE, whose advantages are normalized over valid steps."""

    def _normalize_advantage(
        self, adv: Tensor, valid: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        mask = self._wiring.valid
        if mask is None and valid is None:
            return _super(WiredGAE, self)._normalize_advantage(adv, valid, groups)
        masks = [expand_mask(one, adv) for one in (mask, valid) if one is not None]
        both = torch.stack(masks).all(0)
        if groups is not None:
            return _super(WiredGAE, self)._normalize_advantage(adv, both, groups)
        agents: Any = getattr(self, "agent_dim", None)
        return standardize(adv, both, [] if agents is None else [agents], min_std=1e-4)


class WiredActorCritic(Wired):
    """A wired loss with an entropy bonus and a clipped critic loss, such as A2C."""

    def get_entropy_bonus(self, dist: Any) -> Tensor:
        """Return the entropy; at padding its mean, which leaves the mean of all as it is."""
        return self._fill(_super(WiredActorCritic, self).get_entropy_bonus(dist))

    def _fill(self, values: Any) -> Any:
        valid = self._wiring.valid
        if valid is None:
            return values
        if is_tensor_collection(values):
            return values.apply(lambda one: fill_with_mean(one, expand_mask(valid, one)))
        return fill_with_mean(values, expand_mask(valid, values))

    def loss_critic(self, tensordict: TensorDictBase) -> Any:
        """Return the critic's loss and its figures."""
        loss: Any = self
        old = tensordict.get(loss.tensor_keys.value, None)
        if self._wiring.valid is None or old is None or not getattr(loss, "clip_value", None):
            return _super(WiredActorCritic, self).loss_critic(tensordict)
        old = old.clone()
        values: list[Tensor] = []
        hook = loss.critic_network.register_forward_hook(
            lambda module, inputs, out: values.append(out.get(loss.tensor_keys.value).detach())
        )
        try:
            value, _, *figures = _super(WiredActorCritic, self).loss_critic(tensordict)
        finally:
            hook.remove()
        return (value, self._find_clip_fraction(values[0] - old), *figures)

    def _find_clip_fraction(self, change: Tensor) -> Tensor:
        """Return the share of valid steps whose value has changed by more than is allowed."""
        loss: Any = self
        clipped = change.clamp(-loss.clip_value, loss.clip_value)
        return self._mean((change != clipped).to(change.dtype))

    def _mean(self, values: Tensor) -> Tensor:
        valid = self._wiring.valid
        return values.mean() if valid is None else masked_mean(values, expand_mask(valid, values))


class WiredPPO(WiredActorCritic):
    """A wired PPO loss: PPO, clipped PPO, PPO with a KL penalty, MAPPO, IPPO."""

    def _standardize_advantage(self, advantage: Tensor, tensordict: TensorDictBase) -> Tensor:
        loss: Any = self
        valid = self._wiring.valid
        if valid is None:
            return _super(WiredPPO, self)._standardize_advantage(advantage, tensordict)
        excluded = loss.normalize_advantage_exclude_dims
        return standardize(advantage, expand_mask(valid, advantage), excluded)

    def _log_weight(self, tensordict: TensorDictBase, adv_shape: torch.Size) -> Any:
        log_weight, dist, kl_approx, correction = _super(WiredPPO, self)._log_weight(
            tensordict, adv_shape
        )
        self._check_log_prob(tensordict, log_weight)
        if self._wiring.valid is None:
            return log_weight, dist, kl_approx, correction
        self._wiring.seen["log_weight"] = log_weight.detach()
        behavior = log_weight if correction is None else log_weight + correction
        self._wiring.seen["log_ratio"] = behavior.detach()
        beta: Any = getattr(self, "beta", None)
        if beta is not None:
            self._wiring.seen["beta"] = beta.clone()
        return log_weight, dist, self._fill(kl_approx), correction

    def _check_log_prob(self, batch: TensorDictBase, log_weight: Tensor) -> None:
        """Raise if log-probabilities were subtracted that have different shapes."""
        loss: Any = self
        key = loss.tensor_keys.sample_log_prob
        stored = None if isinstance(key, list) else batch.get(key, None)
        if isinstance(stored, Tensor) and stored.numel() != log_weight.numel():
            problem = Problem(
                "log-prob-shape",
                f"The log-probabilities {key!r} have shape {list(stored.shape)}, which does not "
                "fit those that the actor computes now: they must have one value for each action, "
                f"[*batch] or per agent, with batch {list(batch.batch_size)}.",
                f"Remove a last dimension of 1: batch[{key!r}] = batch[{key!r}].squeeze(-1).",
            )
            raise_first([problem])

    def _get_entropy(self, dist: Any, adv_shape: torch.Size) -> Any:
        return self._fill(_super(WiredPPO, self)._get_entropy(dist, adv_shape))

    def _critic_loss_inputs(
        self, target_return: Tensor, state_value: Tensor, old_state_value: Tensor | None
    ) -> Any:
        valid = self._wiring.valid
        norm = getattr(self, "value_norm", None)
        if valid is None:
            return _super(WiredPPO, self)._critic_loss_inputs(
                target_return, state_value, old_state_value
            )
        if norm is not None:
            # As MAPPO does it, with the statistics of valid steps.
            norm.update(target_return[expand_mask(valid, target_return[..., 0])])
            target_return = norm.normalize(target_return.detach())
            state_value = norm.normalize(state_value)
            if old_state_value is not None:
                old_state_value = norm.normalize(old_state_value)
        seen = self._wiring.seen
        seen["target"], seen["value"] = target_return.detach(), state_value.detach()
        if old_state_value is not None:
            seen["old_value"] = old_state_value.detach()
        return target_return, state_value, old_state_value

    def loss_critic(self, tensordict: TensorDictBase) -> Any:
        """Return the critic's loss and its figures."""
        value, clip_fraction, explained = _super(WiredActorCritic, self).loss_critic(tensordict)
        seen = self._wiring.seen
        valid = self._wiring.valid
        if valid is None:
            return value, clip_fraction, explained
        if clip_fraction is not None:
            clip_fraction = self._find_clip_fraction(seen["value"] - seen["old_value"])
        if explained is not None:
            target = seen["target"]
            mask = expand_mask(valid, seen["target"])
            rest = masked_variance(target - seen["value"], mask)
            total = masked_variance(target, mask)
            explained = 1 - rest / (total + torch.finfo(target.dtype).eps)
        return value, clip_fraction, explained

    def correct_for_padding(
        self, result: TensorDictBase, batch: TensorDictBase, valid: Tensor
    ) -> None:
        """Correct ratios, and the coefficient of the KL penalty."""
        seen = self._wiring.seen
        if "log_ratio" in seen and result.get("mean_ratio", None) is not None:
            self._correct_ratios(result, valid)
        if "beta" in seen and result.get("kl", None) is not None:
            self._correct_beta(result.get("kl"))

    def _correct_ratios(self, result: TensorDictBase, valid: Tensor) -> None:
        loss: Any = self
        log_weight, log_ratio = self._wiring.seen["log_weight"], self._wiring.seen["log_ratio"]
        mask = expand_mask(valid, log_ratio)
        clipped = log_weight.clamp(*loss._clip_bounds) != log_weight
        ratio = log_ratio.exp()
        sizes = effective_sample_size(log_ratio.squeeze(-1), mask.squeeze(-1))
        result.set("clip_fraction", self._mean(clipped.to(log_weight.dtype)))
        result.set("mean_ratio", self._mean(ratio))
        result.set("max_ratio", torch.where(mask, ratio, 0).max())
        result.set("ESS", sizes)

    def _correct_beta(self, kl: Tensor) -> None:
        """Adapt the coefficient again, by the mean KL of valid steps."""
        loss: Any = self
        mean = self._mean(kl)
        beta = self._wiring.seen["beta"]
        factor = torch.ones_like(beta)
        factor = torch.where(mean > loss.dtarg * 1.5, loss.increment, factor)
        factor = torch.where(mean < loss.dtarg / 1.5, loss.decrement, factor)
        loss.beta.data.copy_(beta * factor)


class WiredSAC(Wired):
    """A wired loss that reports the entropy of its policy: SAC, discrete SAC, CrossQ, REDQ, IQL."""

    def _alpha_loss(self, log_prob: Tensor) -> Tensor:
        self._wiring.seen["log_prob"] = log_prob.detach()
        return _super(WiredSAC, self)._alpha_loss(log_prob)

    def _loss_alpha(self, log_pi: Tensor) -> Tensor:
        self._wiring.seen["log_prob"] = log_pi.detach()
        return _super(WiredSAC, self)._loss_alpha(log_pi)

    def correct_for_padding(
        self, result: TensorDictBase, batch: TensorDictBase, valid: Tensor
    ) -> None:
        """Correct the entropy."""
        loss: Any = self
        if "entropy" not in result:
            return
        log_prob = self._wiring.seen.get("log_prob")
        if log_prob is None:
            log_prob = result.get("log_prob", None)
        if log_prob is None:
            log_prob = batch.get(loss.tensor_keys.log_prob)
        if isinstance(self, REDQLoss):
            # It stacks the log-probabilities of the root and of next in front.
            valid = valid.unsqueeze(0)
        entropy = -masked_mean(log_prob, expand_mask(valid, log_prob))
        if isinstance(result.get("entropy"), Tensor) and not result.batch_size:
            result.set("entropy", entropy)
        else:
            result.set_non_tensor("entropy", entropy)


class WiredDDPG(Wired):
    """A wired loss that reports the largest values of its critic."""

    def correct_for_padding(
        self, result: TensorDictBase, batch: TensorDictBase, valid: Tensor
    ) -> None:
        """Correct the largest values."""
        for name in ("pred_value", "target_value"):
            values, largest = result.get(name, None), result.get(f"{name}_max", None)
            if values is not None and largest is not None:
                mask = expand_mask(valid, values)
                result.set(f"{name}_max", values.masked_fill(~mask, -torch.inf).max())


_KINDS: tuple[tuple[tuple[type, ...], type[Wired]], ...] = (
    ((GAE,), WiredGAE),
    ((PPOLoss,), WiredPPO),
    ((A2CLoss,), WiredActorCritic),
    ((DDPGLoss,), WiredDDPG),
    ((SACLoss, DiscreteSACLoss, CrossQLoss, REDQLoss, IQLLoss), WiredSAC),
)


def choose_wired_base(kind: type) -> type[Wired]:
    """Return the class that wires losses of a kind.

    Examples:
        >>> choose_wired_base(PPOLoss).__name__
        'WiredPPO'
    """
    for kinds, wired in _KINDS:
        if issubclass(kind, kinds):
            return wired
    return Wired


def _super(owner: type[Wired], loss: Wired) -> Any:
    """Return ``super()`` of a class whose next class in line is a loss of TorchRL."""
    return super(owner, loss)
