"""A recurrent policy for plain Python loops: it remembers one state for each environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType, set_exploration_type

from ..keys import next_key
from ..mode import set_recurrent_mode
from ..modules.network import RecurrentNetwork
from ..modules.primers import get_primers_from_module

_AUTORESETS = ("same_step", "next_step", "disabled")
Ids = Sequence[int] | np.ndarray | Tensor | int | None


class StatefulPolicy:
    """Holds the recurrent state of each environment, for loops outside TorchRL.

    For Gymnasium's environments, single or vectorised, for evaluation and for serving. A call takes
    observations and returns actions; states are kept, detached. Environments have the ids ``0`` to
    ``num_envs - 1``; a call may be for some of them, in any order.

    Args:
        policy: the network, with recurrent modules inside; it reads ``observation_key`` (or the
            keys of a mapping) and writes ``action_key``.
        num_envs: how many environments there are.
        observation_key: where the policy reads observations.
        action_key: where it writes actions.
        action_spec: a TorchRL spec that turns actions into the environment's own, such as a one-hot
            vector into a number; without it they are returned as the policy writes them.
        autoreset: what :meth:`episode_over` assumes, Gymnasium's ``AutoresetMode``:
            ``"same_step"`` (the observation beside ``done`` is the next episode's first),
            ``"next_step"`` (it comes one step later) or ``"disabled"`` (you reset them yourself).
        exploration: torchrl's ``ExplorationType``: whether actions are drawn, or the best ones; the
            best by default.

    Raises:
        ValueError: if nothing in the policy is recurrent, or an argument is out of range.

    Examples:
        >>> from torchrl.data import OneHot
        >>> from rnnkeys import drqn_policy
        >>> player = StatefulPolicy(drqn_policy(OneHot(2), (4,)), 3, action_spec=OneHot(2))
        >>> player(np.zeros((3, 4), dtype=np.float32)).shape
        (3,)
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        num_envs: int = 1,
        *,
        observation_key: NestedKey = "observation",
        action_key: NestedKey = "action",
        action_spec: TensorSpec | None = None,
        autoreset: str = "same_step",
        exploration: Any = ExplorationType.DETERMINISTIC,
    ) -> None:
        if not isinstance(num_envs, int) or num_envs < 1:
            raise ValueError(f"num_envs must be a positive int. Got {num_envs!r}.")
        if autoreset not in _AUTORESETS:
            names = ", ".join(map(repr, _AUTORESETS))
            raise ValueError(f"autoreset must be one of {names}. Got {autoreset!r}.")
        self._keys = RecurrentNetwork(policy)
        self._keys.check_is_recurrent()
        self.policy, self.num_envs = policy, num_envs
        self.observation_key, self.action_key = unravel_key(observation_key), action_key
        self.action_spec, self.autoreset, self.exploration = action_spec, autoreset, exploration
        parameter = next(policy.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._states = self._make_states()
        # A primer does not know the number of agents: the first call tells, with no state given.
        self._known = False
        self._fresh = torch.ones(num_envs, dtype=torch.bool, device=self.device)
        self._ended = torch.zeros(num_envs, dtype=torch.bool, device=self.device)

    def _make_states(self) -> TensorDict:
        primers: Any = get_primers_from_module(self.policy, warn=False)
        states = TensorDict({}, [self.num_envs], device=self.device)
        transforms = getattr(primers, "transforms", None) or [primers]
        for primer in transforms:
            for key, zero in primer.primers.zero().items(True, True):
                states.set(key, zero.expand(self.num_envs, *zero.shape).clone())
        return states

    def __call__(
        self,
        observation: Any,
        ids: Ids = None,
        *,
        valid_ids: Ids = None,
        save_prev_state: bool = False,
    ) -> Any:
        """Choose actions, and remember the states behind them.

        Args:
            observation: ``[n, ...]``, an array or tensor, or a mapping of the policy's keys to
                such; a single environment's may come without the first dimension. Floats take the
                policy's dtype.
            ids: the environments it is of; all by default.
            valid_ids: the environments whose states are written back; ``ids`` by default.
            save_prev_state: whether to return the states that entered the call, too.

        Returns:
            Actions ``[n, ...]``, an array if an array was given; with ``save_prev_state`` the pair
            of them and a TensorDict ``[n]``.

        Raises:
            ValueError: if ids are unknown or given twice, or their number does not fit.
        """
        index = self._index("ids", ids)
        data, bare, as_array = self._read(observation, len(index))
        previous = self.state(index)
        if self._known:
            data.update(previous)
        for key in self._keys.init_keys:
            data.set(key, self._fresh[index].unsqueeze(-1))
        with torch.no_grad(), set_recurrent_mode(False), set_exploration_type(self.exploration):
            out = self.policy(data)
        self._remember(out, index, valid_ids)
        action = self._decode(out.get(self.action_key), as_array)
        action = action[0] if bare else action
        return (action, previous) if save_prev_state else action

    def _read(self, observation: Any, number: int) -> tuple[TensorDict, bool, bool]:
        """Return observations as entries, whether the batch was left out, whether arrays came."""
        entries = observation
        if not isinstance(observation, (Mapping, TensorDictBase)):
            entries = {self.observation_key: observation}
        data = TensorDict({}, [number], device=self.device)
        bare = as_array = False
        for key, value in entries.items():
            as_array |= not isinstance(value, Tensor)
            tensor = torch.as_tensor(value, device=self.device)
            if tensor.is_floating_point():
                tensor = tensor.to(self.dtype)
            if number == 1 and self._is_bare(key, tensor):
                tensor, bare = tensor.unsqueeze(0), True
            if tensor.shape[:1] != (number,):
                raise ValueError(
                    f"The observation {key!r} has shape {tuple(tensor.shape)}; expected {number} "
                    "first, one for each of the ids. Pass ids= for some of the environments."
                )
            data.set(key, tensor)
        return data, bare, as_array

    def _is_bare(self, key: Any, tensor: Tensor) -> bool:
        """Whether a single environment's observation has no batch; the first call settles it."""
        if self.num_envs > 1:
            return False
        ranks = self.__dict__.setdefault("_ranks", {})
        if key not in ranks:
            # A vector is one observation; a matrix with one row is a batch of one.
            ranks[key] = tensor.ndim if tensor.shape[:1] != (1,) or tensor.ndim == 1 else -1
        return ranks[key] == tensor.ndim

    def _remember(self, out: TensorDictBase, index: Tensor, valid_ids: Ids) -> None:
        written = torch.ones(len(index), dtype=torch.bool, device=self.device)
        if valid_ids is not None:
            valid = self._index("valid_ids", valid_ids)
            unknown = sorted(set(valid.tolist()) - set(index.tolist()))
            if unknown:
                raise ValueError(
                    f"valid_ids {unknown} are not among ids {index.tolist()} of this call."
                )
            written = torch.isin(index, valid)
        for key in self._keys.state_keys:
            after = out.get(next_key(key)).detach()
            held = self._states.get(key)
            if not self._known:
                held = held.new_zeros(self.num_envs, *after.shape[1:])
                self._states.set(key, held)
            held[index[written]] = after[written].to(held.dtype)
        self._known = True
        self._fresh[index[written]] = False

    def _decode(self, action: Tensor, as_array: bool) -> Any:
        if self.action_spec is not None:
            array = np.asarray(self.action_spec.to_numpy(action.cpu()))
            return array if as_array else torch.as_tensor(array)
        return action.cpu().numpy() if as_array else action

    def reset(self, ids: Ids = None, state: Any = None) -> None:
        """Start episodes anew.

        Args:
            ids: numbers of environments, or a bool mask ``[num_envs]``; all by default.
            state: a TensorDict or mapping of states ``[n, ...]`` to start from, as :meth:`state`
                returns them; zeros by default.

        Raises:
            ValueError: if ids are unknown or given twice, or the states' number or keys do not fit.
        """
        index = self._index("ids", ids)
        self._ended[index] = False
        if state is None:
            self._fresh[index] = True
            for key in self._keys.state_keys:
                self._states.get(key)[index] = 0
            return
        for key in self._keys.state_keys:
            given = state.get(key, None)
            if given is None or given.shape[:1] != (len(index),):
                got = "nothing" if given is None else f"shape {tuple(given.shape)}"
                raise ValueError(
                    f"state must hold {key!r} of {len(index)} environments. Got {got}; state(ids) "
                    "returns states of the right form."
                )
            held = self._states.get(key)
            if not self._known and held.shape[-2:] == given.shape[-2:]:
                held = held.new_zeros(self.num_envs, *given.shape[1:])
                self._states.set(key, held)
            if held.shape[1:] != given.shape[1:]:
                raise ValueError(
                    f"state {key!r} has shape {tuple(given.shape)}; expected "
                    f"{(len(index), *held.shape[1:])}."
                )
            held[index] = given.detach().to(held)
        self._known = True
        self._fresh[index] = False

    def episode_over(self, done: Any) -> None:
        """Restart the environments whose episode is over, in the way of ``autoreset``.

        Call it after every step of a vector environment.

        Args:
            done: bool ``[num_envs]``, ``terminated | truncated`` of the step.

        Raises:
            ValueError: if its length does not fit.
        """
        done = torch.as_tensor(done, device=self.device).reshape(-1).bool()
        if done.shape != (self.num_envs,):
            raise ValueError(
                f"done must have one entry for each of {self.num_envs} environments. Got "
                f"{done.numel()}."
            )
        # In the mode "next_step" this step returned the last observation, and the next one returns
        # the first.
        over = self._ended.clone() if self.autoreset == "next_step" else done
        if over.any():
            self.reset(over)
        self._ended = done.clone()

    def state(self, ids: Ids = None) -> TensorDict:
        """Return a copy of the states ``[n]`` of some environments, or of all."""
        index = self._index("ids", ids)
        # Indexing with a tensor copies.
        return cast(TensorDict, self._states[index])

    def _index(self, name: str, ids: Ids) -> Tensor:
        """Return ids as numbers, checked."""
        if ids is None:
            return torch.arange(self.num_envs, device=self.device)
        index = torch.as_tensor(ids, device=self.device).reshape(-1)
        if index.dtype == torch.bool:
            if len(index) != self.num_envs:
                raise ValueError(
                    f"{name} is a mask of {len(index)}; expected one entry for each of "
                    f"{self.num_envs} environments."
                )
            return index.nonzero().squeeze(-1)
        if index.is_floating_point() and len(index):
            raise ValueError(f"{name} must be ints, or a mask of bools. Got {index.tolist()}.")
        index = index.long()
        numbers = index.tolist()
        unknown = sorted({i for i in numbers if not 0 <= i < self.num_envs})
        if unknown:
            raise ValueError(
                f"{name} {unknown} are unknown: there are environments 0 to {self.num_envs - 1}. "
                "Raise num_envs."
            )
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{name} must name each environment once. Got {numbers}.")
        return index
