"""The loss of R2D2: recurrent Q-learning on windows with stored state and burn-in."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torch.compiler import is_compiling
from torchrl.objectives import LossModule, distance_loss

from ..checks.losses import refuse_multi_step, refuse_not_finite
from ..keys import MULTI_STEP_KEY, next_key
from ..mode import set_recurrent_mode
from ..sequences.masks import zero_masked
from ..sequences.segment_starts import set_segment_starts
from ..transforms.burn_in import StateKeys, check_burn_in, split
from .rescaling import value_rescale, value_rescale_inverse


class _Views(NamedTuple):
    """What one network says of a window: ``q [B, T, A]``, and at ends ``q_end [E, A]``."""

    q: Tensor
    q_end: Tensor


class R2D2Loss(LossModule):
    r"""Double Q-learning over windows ``[*, T]``: n-step, rescaled, after a burn-in of ``K`` steps.

    .. math::
        y_t = h\Big( \sum_{k<m} \gamma^k r_{t+k} + \gamma^m (1 - \text{terminated})\,
        h^{-1}\big( Q_\text{target}(o_{t+m}, \arg\max_a Q_\text{online}(o_{t+m}, a)) \big) \Big)

    The sum stops at the first ``done`` and at the window's end; ``m <= n`` is the number of rewards
    summed. A truncated episode bootstraps from the observation that ended it. Online and target
    network are burned in and unrolled each with its own parameters, from the stored state. The loss
    is the mean over unmasked steps behind the burn-in of ``w l(y - Q)``, ``w`` the importance
    weight of the window. A forward also writes the window's new priority,
    ``eta * max |d| + (1 - eta) * mean |d|``, at every step of it (0 where everything is masked).

    What is masked reaches neither loss nor gradient nor priority, not even a NaN.

    See "Recurrent Experience Replay in Distributed Reinforcement Learning", Kapturowski et al.,
    2019 (https://openreview.net/forum?id=r1lyTjAqYX).

    Args:
        value_network: writes a value for each action; recurrent modules inside.
        burn_in: ``K``, shorter than the windows.
        learn_starts: learn from steps inside the burn-in too where their episode starts inside the
            window: their state is not stale. Otherwise the first ``K`` steps of no episode are
            learned from.
        n_steps: ``n``, at least 1.
        gamma: discount.
        eps: of the rescaling; None for no rescaling.
        eta: weight of the maximum in the priority, from 0 to 1.
        squared_priority: take ``d ** 2`` in place of ``|d|``, as DI-engine does.
        double_dqn: let the online network choose the action that the target network values.
        delay_value: keep a target network; needs a target updater.
        loss_function: ``"l2"``, ``"l1"`` or ``"smooth_l1"``, of torchrl's ``distance_loss``.
        importance_weights: True (they must be there), False (not used), None (used if there).

    Raises:
        ValueError: if an argument is out of range, or nothing in the network is recurrent.

    Examples:
        >>> from torchrl.data import OneHot
        >>> from rnnkeys import drqn_policy
        >>> from torchrl.objectives import SoftUpdate
        >>> loss = R2D2Loss(drqn_policy(OneHot(2), (4,), hidden_size=8), burn_in=2)
        >>> update = SoftUpdate(loss, tau=0.005)  # update.step() after every gradient step
        >>> batch = TensorDict({"observation": torch.zeros(3, 6, 4)}, [3, 6])
        >>> batch["action"] = torch.nn.functional.one_hot(torch.zeros(3, 6).long(), 2)
        >>> flags = torch.zeros(3, 6, 1, dtype=torch.bool)
        >>> batch["is_init"] = batch["next", "done"] = batch["next", "terminated"] = flags
        >>> batch["next", "reward"] = torch.zeros(3, 6, 1)
        >>> batch["next", "observation"] = torch.zeros(3, 6, 4)
        >>> loss(batch)["loss"].shape, batch["td_error"].shape
        (torch.Size([]), torch.Size([3, 6]))
    """

    # torchrl reads these by name and types them as other things than its own losses put there.
    @dataclass
    class _AcceptedKeys:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Keys that ``set_keys`` may change, with their defaults."""

        action: NestedKey = "action"
        action_value: NestedKey = "action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        mask: NestedKey = ("collector", "mask")
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: Any
    default_keys: Any = _AcceptedKeys
    out_keys: Any = ["loss"]  # pyright: ignore[reportIncompatibleMethodOverride]
    value_network: Any
    value_network_params: Any
    target_value_network_params: Any

    def __init__(
        self,
        value_network: TensorDictModuleBase,
        *,
        burn_in: int = 40,
        learn_starts: bool = False,
        n_steps: int = 5,
        gamma: float = 0.997,
        eps: float | None = 1e-3,
        eta: float = 0.9,
        squared_priority: bool = False,
        double_dqn: bool = True,
        delay_value: bool = True,
        loss_function: str = "l2",
        importance_weights: bool | None = None,
    ) -> None:
        super().__init__()
        check_burn_in(burn_in)
        _check(n_steps=n_steps, gamma=gamma, eta=eta)
        if double_dqn and not delay_value:
            raise ValueError(
                "double_dqn=True chooses by one network and values by another, so it needs "
                "delay_value=True. Set double_dqn=False to learn without a target network."
            )
        self._states = (StateKeys(value_network),)
        self.convert_to_functional(
            cast(Any, value_network), "value_network", create_target_params=delay_value
        )
        self.delay_value, self.double_dqn = delay_value, double_dqn
        self.burn_in, self.n_steps, self.gamma, self.eps = burn_in, n_steps, gamma, eps
        self.learn_starts = learn_starts and burn_in > 0
        self.eta, self.squared_priority = eta, squared_priority
        self.loss_function, self.importance_weights = loss_function, importance_weights

    @property
    def states(self) -> StateKeys:
        """The network's keys, with the network that functional parameters are put into."""
        found = self._states[0]
        found.network = self.value_network
        return found

    @property
    def in_keys(self) -> list[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What a forward reads."""
        keys, states = self.tensor_keys, self._states[0]
        read = [*states.inputs, *states.states, *states.init_keys, keys.action]
        ahead = [*states.inputs, keys.reward, keys.done, keys.terminated]
        return [*read, *map(next_key, ahead)]

    @in_keys.setter
    def in_keys(self, value: list[Any]) -> None:
        raise RuntimeError("in_keys follow from the network and set_keys().")

    def make_value_estimator(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, value_type: Any = None, **hyperparams: Any
    ) -> None:
        """Set ``gamma`` or ``n_steps``; the n-step target on the rescaled scale is the loss's own.

        Raises:
            NotImplementedError: if another estimator is asked for.
            ValueError: if a value does not fit.
        """
        unknown = hyperparams.keys() - {"gamma", "n_steps"}
        if value_type is not None or unknown:
            raise NotImplementedError(
                "R2D2Loss computes its own n-step target with rescaling, so no value estimator can "
                f"take its place. Got value_type={value_type} and {sorted(unknown)}; set gamma= or "
                "n_steps=, or use DQNLoss with recurrent_loss for TD(lambda)."
            )
        _check(**hyperparams)
        for name, value in hyperparams.items():
            setattr(self, name, value)

    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss of windows, and write their priorities.

        Args:
            tensordict: ``[*, T]``, as ``Windows`` lays them out; states may be missing (zeros), and
                so may the mask (all True).

        Returns:
            A TensorDict with ``"loss"``, a scalar.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if the batch is flat, windows are no longer than the burn-in, the mask is
                not bool, one for each step, or a reward is not finite.
        """
        if tensordict.ndim < 2:
            raise ValueError(
                f"R2D2Loss takes windows [*, T]. Got batch size {list(tensordict.batch_size)}: "
                "reshape slices of one length, batch.reshape(-1, slice_len)."
            )
        rows = tensordict if tensordict.ndim == 2 else tensordict.flatten(0, -2)
        windows = self._read(rows)
        split(windows, self.burn_in)  # raises before the mask is called empty
        mask = self._mask(windows)
        if not is_compiling() and mask.device.type == "cpu":
            refuse_not_finite(windows, next_key(self.tensor_keys.reward), mask)
        windows = zero_masked(windows, mask, integers=True)
        mask = self._learned(windows, mask)
        learned = windows if self.learn_starts else split(windows, self.burn_in)[1]
        ends = self._ends(learned, mask)
        online = self._unroll(self.value_network_params, windows, ends)
        with torch.no_grad():
            target = online
            if self.delay_value:
                target = self._unroll(self.target_value_network_params, windows, ends)
            returns = self._targets(learned, ends, online, target)
        chosen = self._chosen(online.q, learned.get(self.tensor_keys.action))
        priorities = self._priorities(returns - chosen, mask, tensordict)
        loss = distance_loss(chosen, returns, self.loss_function)
        weights = self._weights(tensordict, loss)
        tensordict.set(self.tensor_keys.priority, priorities)
        # Selects, so that nothing of a masked step counts, and no gradient of one.
        loss = torch.where(mask, loss * torch.where(mask, weights, 0.0), 0.0).sum()
        loss = loss / mask.sum().clamp(min=1)
        return TensorDict({"loss": loss}, [])

    def _read(self, windows: TensorDictBase) -> TensorDictBase:
        """Take what the loss reads; name what is missing."""
        keys = self.tensor_keys
        optional = {unravel_key(keys.mask), *map(unravel_key, self._states[0].states)}
        wanted = [*self.in_keys, keys.mask]
        for key in wanted:
            if windows.get(key, None) is None and unravel_key(key) not in optional:
                raise KeyError(
                    f"R2D2Loss reads {key!r}, which is not in the batch. Collect it, or name "
                    f"another entry with set_keys(). Entries: {sorted(map(str, windows.keys()))}."
                )
        refuse_multi_step(windows, MULTI_STEP_KEY, "n_steps=")
        return set_segment_starts(windows.select(*wanted, strict=False), self._states[0].init_keys)

    def _mask(self, windows: TensorDictBase) -> Tensor:
        mask = windows.get(self.tensor_keys.mask, None)
        if mask is None:
            like = windows.get(next_key(self.tensor_keys.reward))
            return torch.ones(windows.shape, dtype=torch.bool, device=like.device)
        if mask.dtype is not torch.bool or mask.numel() != windows.shape.numel():
            raise ValueError(
                f"The mask {self.tensor_keys.mask!r} must be bool, one for each step of the "
                f"windows {list(windows.shape)}. Got {mask.dtype}, {list(mask.shape)}."
            )
        return mask.reshape(windows.shape)

    def _learned(self, windows: TensorDictBase, mask: Tensor) -> Tensor:
        """Return which steps are learned from: of the window's last ones, or of all."""
        if self.learn_starts:
            fresh = self.states.fresh(windows, self.burn_in)
            mask = torch.cat([mask[:, : self.burn_in] & fresh, mask[:, self.burn_in :]], 1)
        else:
            mask = mask[:, self.burn_in :]
        if not is_compiling() and not mask.any():
            warnings.warn(
                f"The mask {self.tensor_keys.mask!r} leaves no step behind a burn-in of "
                f"{self.burn_in}: the loss is 0.",
                stacklevel=5,
            )
        return mask

    def _ends(self, learned: TensorDictBase, mask: Tensor) -> Tensor:
        """Tell behind which steps ``[B, T]`` the window does not go on with the next one."""
        ends = self._flag(learned, self.tensor_keys.done).clone()
        for key in self._states[0].init_keys:
            starts = learned.get(key).flatten(learned.ndim).any(-1)
            ends[:, :-1] |= starts[:, 1:]
        ends[:, :-1] |= mask[:, :-1] & ~mask[:, 1:]
        ends[:, -1] = True
        return ends

    def _flag(self, windows: TensorDictBase, key: NestedKey) -> Tensor:
        return windows.get(next_key(key)).reshape(windows.shape).bool()

    def _unroll(self, parameters: Any, windows: TensorDictBase, ends: Tensor) -> _Views:
        """Burn one network in, and run it over what is left and the observations behind ends."""
        states = self.states
        _, learned = split(windows, self.burn_in)
        with parameters.to_module(self.value_network, preserve_module_state=False):
            if self.burn_in:
                states.burn_in(windows, learned, self.burn_in)
            if self.learn_starts:
                learned = states.rejoin(windows, learned, self.burn_in)
            out = states.run(learned)
            with torch.no_grad(), set_recurrent_mode(False):
                behind = self.value_network(_step_behind(states, learned, out, ends))
        value = self.tensor_keys.action_value
        return _Views(out.get(value), behind.get(value))

    def _chosen(self, q: Tensor, action: Tensor) -> Tensor:
        """Return the values ``[B, T]`` of actions, one-hot or indices."""
        if action.shape == q.shape:
            return torch.where(action.bool(), q, 0.0).sum(-1)
        return q.gather(-1, action.reshape(*q.shape[:-1], 1).long()).squeeze(-1)

    def _targets(
        self, learned: TensorDictBase, ends: Tensor, online: _Views, target: _Views
    ) -> Tensor:
        """Return ``y [B, T]``."""
        choose = _ahead(online if self.double_dqn else target, ends)
        value = _ahead(target, ends).gather(-1, choose.argmax(-1, keepdim=True)).squeeze(-1)
        value = value if self.eps is None else value_rescale_inverse(value, self.eps)
        terminated = self._flag(learned, self.tensor_keys.terminated)
        value = torch.where(terminated, 0.0, value)
        rewards = learned.get(next_key(self.tensor_keys.reward)).reshape(learned.shape)
        returns = n_step_returns(rewards.to(value.dtype), value, ends, self.gamma, self.n_steps)
        return returns if self.eps is None else value_rescale(returns, self.eps)

    def _priorities(self, error: Tensor, mask: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Return each window's priority, at every step of it."""
        size = error.detach().square() if self.squared_priority else error.detach().abs()
        size = torch.where(mask, size, 0.0)
        mean = size.sum(-1) / mask.sum(-1).clamp(min=1)
        priority = self.eta * size.amax(-1) + (1 - self.eta) * mean
        priority = priority.unsqueeze(-1).expand(-1, tensordict.shape[-1])
        return priority.reshape(tensordict.shape).contiguous()

    def _weights(self, tensordict: TensorDictBase, loss: Tensor) -> Tensor:
        """Return importance weights ``[B, 1]``: one for each window."""
        weights = None
        if self.importance_weights is not False:
            weights = tensordict.get(self.tensor_keys.priority_weight, None)
        if weights is not None:
            steps = tensordict.shape[-1]
            return weights.reshape(-1, steps)[:, :1].to(loss.dtype)
        if self.importance_weights:
            raise KeyError(
                f"importance_weights=True, but there is no {self.tensor_keys.priority_weight!r} in "
                "the batch. Sample from a TensorDictReplayBuffer with a prioritised sampler, or "
                "leave importance_weights=None."
            )
        return loss.new_ones(1, 1)


def _check(n_steps: Any = 1, **shares: Any) -> None:
    """Raise ValueError unless ``n_steps`` is a positive int, and others are from 0 to 1."""
    if not isinstance(n_steps, int) or isinstance(n_steps, bool) or n_steps < 1:
        raise ValueError(f"n_steps must be an int, at least 1. Got {n_steps!r}.")
    for name, value in shares.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1. Got {value!r}.")


def n_step_returns(
    rewards: Tensor, next_value: Tensor, ends: Tensor, gamma: float, n_steps: int
) -> Tensor:
    """Sum up to ``n`` rewards and bootstrap behind the last one.

    Args:
        rewards: ``[B, T]``.
        next_value: ``[B, T]``, of the observation behind each step; 0 where it is terminal.
        ends: bool ``[B, T]``: sums stop there, that reward included; True in the last column.
        gamma: discount.
        n_steps: ``n``.

    Returns:
        ``[B, T]``.

    Examples:
        >>> ones = torch.ones(1, 3)
        >>> n_step_returns(ones, 10 * ones, torch.tensor([[False, False, True]]), 0.5, 2)
        tensor([[4., 4., 6.]])
    """
    returns = rewards + gamma * next_value
    for _ in range(n_steps - 1):
        # One reward more in front of what was summed from the next step on.
        longer = rewards[:, :-1] + gamma * returns[:, 1:]
        whole = torch.where(ends[:, :-1], (rewards + gamma * next_value)[:, :-1], longer)
        returns = torch.cat([whole, returns[:, -1:]], 1)
    return returns


def _ahead(views: _Views, ends: Tensor) -> Tensor:
    """Return the values ``[B, T, A]`` of the observation behind each step."""
    q = views.q.detach()
    ahead = torch.cat([q[:, 1:], q[:, :1]], 1)
    ahead[ends] = views.q_end.to(q.dtype)
    return ahead


def _step_behind(
    states: StateKeys, learned: TensorDictBase, out: TensorDictBase, ends: Tensor
) -> TensorDictBase:
    """Return single steps ``[E]``: the observation behind each end, and the state there."""
    number = int(ends.sum())
    step = TensorDict({}, batch_size=[number], device=learned.device)
    for key in states.inputs:
        step.set(key, learned.get(next_key(key))[ends])
    for key in states.states:
        step.set(key, out.get(next_key(key))[ends].detach())
    for key in states.init_keys:
        step.set(key, torch.zeros_like(learned.get(key)[ends]))
    return step
