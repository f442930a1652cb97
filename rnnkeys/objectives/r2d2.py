"""The loss of R2D2: recurrent Q-learning on windows with stored state and burn-in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torch.compiler import is_compiling
from torchrl.objectives import LossModule, distance_loss

from ..checks import (
    as_float,
    as_int,
    check_choice,
    raise_first,
    should_read_values,
    value_checks_enabled,
    warn_caller,
)
from ..keys import MASK_KEY, next_key
from ..modules.network import RecurrentNetwork
from ..sequences.masks import zero_masked
from ..sequences.segment_starts import set_segment_starts
from ..transforms.burn_in import cut_burn_in
from .n_step import n_step_returns
from .r2d2_checks import (
    find_loss_problems,
    find_value_problems,
    find_window_problems,
)
from .rescaling import as_eps, value_rescale, value_rescale_inverse
from .window_values import WindowValues, compute_values, find_steps_after_starts

_LOSS_FUNCTIONS = ("l2", "l1", "smooth_l1")


class R2D2Loss(LossModule):
    r"""Double Q-learning over windows ``[*, T]`` with burn-in, n-step returns and rescaling.

    .. math::
        y_t = h\Big( \sum_{k<m} \gamma^k r_{t+k} + \gamma^m (1 - \text{terminated})\,
        h^{-1}\big( Q_\text{target}(o_{t+m}, \arg\max_a Q_\text{online}(o_{t+m}, a)) \big) \Big)

    The sum stops at the first ``done`` and at the end of the window, so that ``m <= n`` rewards are
    summed. A truncated episode bootstraps from the observation that ended it. The online and the
    target network start from the stored state and are burned in, each with its own parameters: they
    run over the first ``K`` steps without gradient. The loss is the mean of ``w l(y_t - Q)`` over
    the valid steps after the burn-in, with the importance weight ``w`` of the window. A forward
    also writes the priority of each window, ``eta max |d| + (1 - eta) mean |d|`` with
    ``d = y_t - Q``, at every step of it (0 for a window without a learned step).

    A network whose ``QValueModule`` has an ``action_mask_key`` never values an action that is not
    allowed: neither network chooses one, and a batch in which one was played raises.

    Padding (False in ``("collector", "mask")``) has no effect on loss, gradient or priority, even
    if it is NaN. A batch that cannot be learned from, for example because an observation is NaN,
    raises an error, and no priority is written.

    See "Recurrent Experience Replay in Distributed Reinforcement Learning", Kapturowski et al.,
    2019 (https://openreview.net/forum?id=r1lyTjAqYX).

    Args:
        value_network: writes a value for each action; it contains recurrent modules. One agent.
        burn_in: ``K``, in steps, less than the length of the windows.
        learn_starts: whether to learn also from steps inside the burn-in that follow an episode
            start in their window, since their state is not stale. Otherwise the first ``K`` steps
            of every episode are never learned from.
        n_steps: ``n``, at least 1.
        greedy_returns: whether the sum also stops before a step whose action is not the one with
            the largest value in the online network, so that exploration does not count against the
            steps before it: the traces of C. J. C. H. Watkins, "Learning from Delayed Rewards",
            1989. R2D2 sums over such steps.
        gamma: discount, from 0 to 1.
        eps: of the rescaling ``h`` (:func:`rnnkeys.objectives.value_rescale`); None for no
            rescaling.
        eta: weight of the maximum in the priority, from 0 to 1.
        squared_priority: whether priorities use ``d ** 2`` in place of ``|d|``, as in DI-engine.
        double_dqn: whether the online network chooses the action that the target network values.
        delay_value: whether there is a target network; it needs a target updater.
        loss_function: ``l``: ``"l2"``, ``"l1"`` or ``"smooth_l1"``, of TorchRL's ``distance_loss``.
        importance_weights: True (required), False (not used), None (used if they are there).

    Raises:
        ValueError: if an argument is out of range, or the network contains no recurrent module.

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

    # TorchRL reads these by name, and its types differ from what its own losses assign.
    @dataclass
    class _AcceptedKeys:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Keys that ``set_keys`` may change, with their defaults."""

        action: NestedKey = "action"
        action_value: NestedKey = "action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        mask: NestedKey = MASK_KEY
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
        greedy_returns: bool = False,
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
        self.burn_in = as_int("burn_in", burn_in, minimum=0)
        self.n_steps = as_int("n_steps", n_steps)
        self.greedy_returns = greedy_returns
        self.gamma, self.eta = as_float("gamma", gamma), as_float("eta", eta)
        if double_dqn and not delay_value:
            raise ValueError(
                "double_dqn=True chooses actions by one network and values them by another, so it "
                "needs delay_value=True. Set double_dqn=False to learn without a target network."
            )
        RecurrentNetwork(value_network).check_is_recurrent()
        self.convert_to_functional(
            cast(Any, value_network), "value_network", create_target_params=delay_value
        )
        # The functional network: parameters are put into it for each run.
        self._network = RecurrentNetwork(self.value_network)
        self.delay_value = delay_value
        self.double_dqn = double_dqn
        self.eps = None if eps is None else as_eps(eps)
        self.learn_starts = learn_starts and self.burn_in > 0
        self.squared_priority = squared_priority
        check_choice("loss_function", loss_function, _LOSS_FUNCTIONS)
        self.loss_function = loss_function
        self.importance_weights = importance_weights
        self._has_read_values = False

    @property
    def in_keys(self) -> list[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Keys of the entries that a forward reads."""
        keys = self.tensor_keys
        network = self._network
        read = [*network.input_keys, *network.state_keys, *network.init_keys, keys.action]
        after = [*network.input_keys, keys.reward, keys.done, keys.terminated]
        return [*read, *map(next_key, after)]

    @in_keys.setter
    def in_keys(self, value: list[Any]) -> None:
        raise RuntimeError("in_keys of R2D2Loss follow from its network and from set_keys().")

    def make_value_estimator(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, value_type: Any = None, **hyperparams: Any
    ) -> None:
        """Set ``gamma`` or ``n_steps``; the rescaled n-step target is part of the loss.

        Raises:
            NotImplementedError: if another estimator is asked for.
            ValueError: if a value is out of range.
        """
        unknown = hyperparams.keys() - {"gamma", "n_steps"}
        if value_type is not None or unknown:
            raise NotImplementedError(
                "R2D2Loss computes a rescaled n-step target of its own, so no value estimator can "
                f"replace it. Got value_type={value_type} and {sorted(unknown)}. Set gamma= or "
                "n_steps=, or use DQNLoss with recurrent_loss for TD(lambda)."
            )
        if "gamma" in hyperparams:
            self.gamma = as_float("gamma", hyperparams["gamma"])
        if "n_steps" in hyperparams:
            self.n_steps = as_int("n_steps", hyperparams["n_steps"])

    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss of windows, and write their priorities.

        Args:
            tensordict: windows ``[*, T]``, as ``Windows`` returns them. Missing states are zeros; a
                missing mask is True everywhere.

        Returns:
            A TensorDict with ``"loss"``, a scalar.

        Raises:
            KeyError: if an entry is missing.
            TypeError: if flags, ``done``, the mask or indices of actions have a wrong dtype.
            ValueError: if the batch is flat or not longer than the burn-in, if a shape is wrong, if
                time is not contiguous, if no step is valid, if actions are neither one-hot nor
                indices, or if an entry is not finite at a valid step.

        Warns:
            UserWarning: if no valid step remains after the burn-in: the loss is 0.
        """
        reward = tensordict.get(next_key(self.tensor_keys.reward), None)
        read_values = should_read_values(reward, self._has_read_values)
        if tensordict.ndim < 2:
            raise ValueError(
                f"R2D2Loss takes windows [*, T]. Got batch size {list(tensordict.batch_size)}. "
                "Reshape slices of one length: batch.reshape(-1, slice_len)."
            )
        rows = tensordict if tensordict.ndim == 2 else tensordict.flatten(0, -2)
        windows, valid = self._prepare(rows, read_values)
        mask = self._find_learned_steps(windows, valid, read_values)
        learned = windows if self.learn_starts else cut_burn_in(windows, self.burn_in)
        ends = self._find_ends(learned, mask)
        online = self._compute_values(self.value_network_params, windows, ends)
        raise_first(
            find_value_problems(windows, self.tensor_keys, online.q, valid, read_values=read_values)
        )
        chosen = _select_actions(online.q, learned.get(self.tensor_keys.action))
        explores = chosen < online.q.amax(-1) if self.greedy_returns else None
        returns = self._compute_returns(learned, windows, ends, online, explores)
        error = returns - chosen
        weights = self._read_weights(tensordict, chosen)
        loss = distance_loss(chosen, returns, self.loss_function)
        # Selects, so that padding adds neither a value nor a gradient.
        loss = torch.where(mask, loss * torch.where(mask, weights, 0.0), 0.0).sum()
        loss = loss / mask.sum().clamp(min=1)
        priorities = self._compute_priorities(error, mask, tensordict)
        if value_checks_enabled() and not is_compiling():
            results = (loss, priorities)
            raise_first(find_loss_problems(results, windows, valid, self._network, self))
        tensordict.set(self.tensor_keys.priority, priorities)
        return TensorDict({"loss": loss}, [])

    def _prepare(self, rows: TensorDictBase, read_values: bool) -> tuple[TensorDictBase, Tensor]:
        """Return the entries that the loss reads, zero at padding, and the valid mask."""
        keys = self.tensor_keys
        raise_first(
            find_window_problems(rows, keys, self.in_keys, self._network, read_values=read_values)
        )
        self._has_read_values = self._has_read_values or read_values
        cut_burn_in(rows, self.burn_in)  # raises where no step remains
        windows = rows.select(*self.in_keys, strict=False)
        windows = set_segment_starts(windows, self._network.init_keys)
        mask = rows.get(keys.mask, None)
        if mask is None:
            device = windows.get(next_key(keys.reward)).device
            return windows, torch.ones(windows.shape, dtype=torch.bool, device=device)
        mask = mask.reshape(windows.shape)
        return zero_masked(windows, mask, integers=True), mask

    def _find_learned_steps(
        self, windows: TensorDictBase, valid: Tensor, read_values: bool
    ) -> Tensor:
        """Return the mask of learned steps: all with ``learn_starts``, else those from ``K`` on."""
        mask = valid[:, self.burn_in :]
        if self.learn_starts:
            fresh = find_steps_after_starts(self._network, windows, self.burn_in)
            mask = torch.cat([valid[:, : self.burn_in] & fresh, mask], 1)
        if read_values and not mask.any():
            warn_caller(
                f"No valid step of these windows of {windows.shape[1]} steps remains after the "
                f"burn-in of {self.burn_in}: the loss is 0."
            )
        return mask

    def _find_ends(self, learned: TensorDictBase, mask: Tensor) -> Tensor:
        """Return the steps ``[B, T]`` whose next observation is not that of the next step."""
        ends = _as_rows(learned, next_key(self.tensor_keys.done)).clone()
        for key in self._network.init_keys:
            starts = learned.get(key).flatten(learned.ndim).any(-1)
            ends[:, :-1] |= starts[:, 1:]
        ends[:, :-1] |= mask[:, :-1] & ~mask[:, 1:]
        ends[:, -1] = True
        return ends

    def _compute_values(
        self, parameters: Any, windows: TensorDictBase, ends: Tensor
    ) -> WindowValues:
        with parameters.to_module(self.value_network, preserve_module_state=False):
            return compute_values(
                self._network,
                windows,
                ends,
                self.tensor_keys.action_value,
                self.burn_in,
                self.learn_starts,
            )

    @torch.no_grad()
    def _compute_returns(
        self,
        learned: TensorDictBase,
        windows: TensorDictBase,
        ends: Tensor,
        online: WindowValues,
        explores: Tensor | None,
    ) -> Tensor:
        """Return the targets ``y [B, T]``."""
        target = online
        if self.delay_value:
            target = self._compute_values(self.target_value_network_params, windows, ends)
        chooser = (online if self.double_dqn else target).of_next_observations(ends)
        action = chooser.argmax(-1, keepdim=True)
        value = target.of_next_observations(ends).gather(-1, action).squeeze(-1)
        value = value if self.eps is None else value_rescale_inverse(value, self.eps)
        terminated = _as_rows(learned, next_key(self.tensor_keys.terminated))
        value = torch.where(terminated, 0.0, value)
        rewards = _as_rows(learned, next_key(self.tensor_keys.reward)).to(value.dtype)
        returns = n_step_returns(rewards, value, ends, self.gamma, self.n_steps, explores)
        return returns if self.eps is None else value_rescale(returns, self.eps)

    def _compute_priorities(
        self, error: Tensor, mask: Tensor, tensordict: TensorDictBase
    ) -> Tensor:
        """Return the priority of each window, at every step of it."""
        size = error.detach().square() if self.squared_priority else error.detach().abs()
        size = torch.where(mask, size, 0.0)
        mean = size.sum(-1) / mask.sum(-1).clamp(min=1)
        priority = self.eta * size.amax(-1) + (1 - self.eta) * mean
        # TorchRL's samplers keep priorities in float32 and reject any other dtype.
        priority = priority.float().unsqueeze(-1).expand(-1, tensordict.shape[-1])
        return priority.reshape(tensordict.shape).contiguous()

    def _read_weights(self, tensordict: TensorDictBase, like: Tensor) -> Tensor:
        """Return importance weights ``[B, 1]``, one for each window."""
        weights = None
        if self.importance_weights is not False:
            weights = tensordict.get(self.tensor_keys.priority_weight, None)
        if weights is not None:
            return weights.reshape(-1, tensordict.shape[-1])[:, :1].to(like.dtype)
        if self.importance_weights:
            raise KeyError(
                f"importance_weights=True, but there is no {self.tensor_keys.priority_weight!r} in "
                "the batch. Sample from a TensorDictReplayBuffer with a prioritized sampler, or "
                "leave importance_weights=None."
            )
        return like.new_ones(1, 1)


def _as_rows(windows: TensorDictBase, key: NestedKey) -> Tensor:
    """Return an entry with one value for each step as ``[B, T]``."""
    return windows.get(key).reshape(windows.shape)


def _select_actions(q: Tensor, action: Tensor) -> Tensor:
    """Return the values ``[B, T]`` of actions, one-hot or indices."""
    if action.shape == q.shape:
        return torch.where(action.bool(), q, 0.0).sum(-1)
    return q.gather(-1, action.reshape(*q.shape[:-1], 1).long()).squeeze(-1)
