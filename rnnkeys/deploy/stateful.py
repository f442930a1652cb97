"""A recurrent policy for plain Python loops, which holds one state for each environment."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import NoneType
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType, set_exploration_type

from ..checks import as_int, check_choice
from ..keys import as_key, next_key
from ..modules.network import RecurrentNetwork
from .ids import Ids, as_ids
from .state_table import StateTable

_AUTORESETS = ("same_step", "next_step", "disabled")
_MAX_ENVS = 2**20


class StatefulPolicy:
    """Holds the recurrent state of each environment, for loops outside TorchRL.

    For Gymnasium's environments, single or vectorized, for evaluation and for serving. A call takes
    observations and returns actions; the next states are kept, detached. Environments have the ids
    ``0`` to ``num_envs - 1``. A call may be for some of them, in any order, and for other ids, such
    as names of clients, which join with their first call.

    Args:
        policy: the network, with recurrent modules inside; it reads ``observation_key`` (or the
            keys of a mapping) and writes ``action_key``.
        num_envs: number of environments; that of ``env``, or 1, by default.
        env: the Gymnasium environment, single or vectorized, from which ``num_envs`` and
            ``autoreset`` are read.
        observation_key: where the policy reads observations.
        action_key: where it writes actions.
        action_spec: a TorchRL spec that turns actions into the environment's own, such as a one-hot
            vector into a number; without it they are returned as the policy writes them.
        autoreset: Gymnasium's ``AutoresetMode``, for :meth:`episode_over`: ``"same_step"`` (the
            observation beside ``done`` is the first of the next episode), ``"next_step"`` (it comes
            one step later, Gymnasium's default) or ``"disabled"`` (you reset environments
            yourself). A vector of environments needs it, from ``env`` or from you.
        exploration: torchrl's ``ExplorationType``: whether actions are drawn, or the best ones; the
            best by default.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if no recurrent module is inside, or if an argument is out of range or
            contradicts ``env``.

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
        num_envs: int | None = None,
        *,
        env: Any = None,
        observation_key: NestedKey = "observation",
        action_key: NestedKey = "action",
        action_spec: TensorSpec | None = None,
        autoreset: str | None = None,
        exploration: Any = ExplorationType.DETERMINISTIC,
    ) -> None:
        if autoreset is not None:
            check_choice("autoreset", autoreset, _AUTORESETS)
        self.network = RecurrentNetwork(policy)
        self.network.check_is_recurrent()
        self.policy = policy
        self.num_envs, self.autoreset = _read_env(env, num_envs, autoreset)
        self.observation_key = as_key("observation_key", observation_key)
        self.action_key = as_key("action_key", action_key)
        if not isinstance(action_spec, (TensorSpec, NoneType)):
            raise TypeError(f"action_spec must be a TorchRL spec. Got {action_spec!r}.")
        if not isinstance(exploration, (ExplorationType, NoneType)):
            raise TypeError(f"exploration must be an ExplorationType. Got {exploration!r}.")
        self.action_spec = action_spec
        self.exploration = exploration
        parameter = next((p for p in policy.parameters() if p.is_floating_point()), torch.empty(0))
        self.device, self.dtype = parameter.device, parameter.dtype
        # Whether observations come without a batch dimension; None until a call shows it.
        self._is_single = None if env is None else not _is_vector(env)
        # Shapes of the observations of the last call, without the batch dimension.
        self._features: dict[Any, torch.Size] = {}
        self._table = StateTable(self.network, self.device)
        with self._table.join(range(self.num_envs)) as rows:
            self._env_rows = rows
        self._ended = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)

    @property
    def ids(self) -> list[Hashable]:
        """The ids that have a state: the environments, and the ids that joined."""
        return self._table.ids

    def __call__(
        self,
        observation: Any,
        ids: Ids = None,
        *,
        valid_ids: Ids = None,
        save_prev_state: bool = False,
    ) -> Any:
        """Choose actions, and keep the next states.

        Args:
            observation: ``[n, ...]``, an array or tensor, or a mapping of the policy's keys to
                such; a single environment's may come without the first dimension. Floats are cast
                to the policy's dtype.
            ids: the ids that they belong to; all environments by default. A new id, an int of at
                least 0 or a name, joins with an initial state.
            valid_ids: the ids whose next states are kept; ``ids`` by default.
            save_prev_state: whether to return the states before the call, too.

        Returns:
            Actions ``[n, ...]``, an array if an array was given; with ``save_prev_state`` the pair
            of them and a TensorDict ``[n]``.

        Raises:
            KeyError: if the policy writes no entry at ``action_key``, or reads one that is missing.
            TypeError: if an observation is not an array of numbers.
            ValueError: if ids do not fit, or if a next state is NaN or infinite. Then no state is
                changed.
        """
        named = as_ids("ids", ids, self.num_envs)
        kept = self._select(named, valid_ids)
        with self._join(ids, named) as rows:
            previous = self._table.read(rows)
            data, out, as_array = self._run(observation, rows, previous)
            action = self._read_action(out)
            self._check_states(named, data, out)
            states = _next_states(self.network, out)
            self._table.write(rows[kept], states[kept])
        action = self._decode(action, as_array)
        action = action[0] if self._is_single else action
        return (action, previous) if save_prev_state else action

    def _join(self, ids: Ids, named: list[Hashable]) -> AbstractContextManager[Tensor]:
        """Return the rows of ids; new ids join unless the block raises."""
        return nullcontext(self._env_rows) if ids is None else self._table.join(named)

    def _select(self, ids: list[Hashable], valid_ids: Ids) -> Any:
        """Return an index of those ``ids`` that are among ``valid_ids``."""
        if valid_ids is None:
            return slice(None)
        valid = set(as_ids("valid_ids", valid_ids, self.num_envs))
        unknown = sorted(valid - set(ids), key=str)
        if unknown:
            raise ValueError(f"valid_ids {unknown} are not among ids {ids} of this call.")
        return torch.tensor([one in valid for one in ids], device=self.device)

    def _run(
        self, observation: Any, rows: Tensor, states: TensorDict
    ) -> tuple[TensorDict, TensorDictBase, bool]:
        """Run the policy; return its inputs, its inputs and outputs, and ``as_array``.

        The observation of a single environment may come with or without a batch dimension. Where
        its shape does not show which, the policy does.
        """
        entries = observation
        if not isinstance(observation, (Mapping, TensorDictBase)):
            entries = {self.observation_key: observation}
        if isinstance(entries, TensorDictBase):
            entries = dict(entries.items(True, True))
        as_array = not all(isinstance(value, Tensor) for value in entries.values())
        tensors = {key: self._as_tensor(key, value) for key, value in entries.items()}
        *others, last = self._possible_layouts(tensors, len(rows))
        for is_single in others:
            try:
                return *self._run_layout(tensors, rows, states, is_single), as_array
            except (RuntimeError, ValueError, IndexError):
                continue
        try:
            return *self._run_layout(tensors, rows, states, last), as_array
        except (RuntimeError, ValueError, IndexError) as error:
            self._check_features(tensors, last, error)
            raise

    def _check_features(
        self, tensors: Mapping[Any, Tensor], is_single: bool, error: Exception
    ) -> None:
        """Raise ValueError if an observation has another shape than at the calls before."""
        for key, tensor in tensors.items():
            shape = tensor.shape if is_single else tensor.shape[1:]
            before = self._features.get(key, shape)
            if self._table.has_written and shape != before:
                raise ValueError(
                    f"The observation {key!r} has the shape {tuple(shape)} for each environment, "
                    f"and at the call before it had {tuple(before)}, which the states fit. Call "
                    f"reset() if the shape has changed. The error was: {error}"
                ) from error

    def _run_layout(
        self, tensors: Mapping[Any, Tensor], rows: Tensor, states: TensorDict, is_single: bool
    ) -> tuple[TensorDict, TensorDictBase]:
        data = self._make_data(tensors, rows, states, is_single)
        with torch.no_grad(), set_exploration_type(self.exploration):
            out = self.network.run_step(data)
        # Kept only where the policy could run.
        self._is_single = is_single
        self._features = {key: data.get(key).shape[1:] for key in tensors}
        return data, out

    def _as_tensor(self, key: Any, value: Any) -> Tensor:
        try:
            tensor = torch.as_tensor(value)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"The observation {key!r} must be an array or a tensor of numbers. Got "
                f"{type(value).__name__}: {error}"
            ) from error
        if tensor.is_meta:
            raise TypeError(
                f"The observation {key!r} is on the meta device, which holds no values."
            )
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _possible_layouts(self, tensors: Mapping[Any, Tensor], number: int) -> list[bool]:
        """Return the values that ``is_single`` may have, in the order to try them."""
        if self.num_envs > 1 or number != 1:
            return [False]
        if not all(t.ndim > 1 and len(t) == 1 for t in tensors.values()):
            # A vector is one observation. A batch of one has a first dimension of 1.
            return [True]
        return [True, False] if self._is_single else [False, True]

    def _make_data(
        self, tensors: Mapping[Any, Tensor], rows: Tensor, states: TensorDict, is_single: bool
    ) -> TensorDict:
        number = len(rows)
        data = TensorDict({}, [number], device=self.device)
        for key, tensor in tensors.items():
            tensor = tensor.unsqueeze(0) if is_single else tensor
            if tensor.shape[:1] != (number,):
                raise ValueError(
                    f"The observation {key!r} has shape {tuple(tensor.shape)}; expected {number} "
                    "first, one for each of the ids. Pass ids= for some of the environments."
                )
            data.set(key, tensor)
        if self._table.has_written:
            data.update(states)
        for key in self.network.init_keys:
            data.set(key, self._table.read_flags(rows))
        return data

    def _check_states(self, ids: list[Hashable], data: TensorDict, out: TensorDictBase) -> None:
        """Raise ValueError if a next state is not finite, as all later ones would be."""
        for key in self.network.state_keys:
            state = out.get(next_key(key))
            if bool(state.isfinite().all()):
                continue
            bad = ~state.flatten(1).isfinite().all(1)
            names = [one for one, is_bad in zip(ids, bad.tolist(), strict=True) if is_bad]
            causes = [
                name for name in self.network.input_keys if not data.get(name)[bad].isfinite().all()
            ]
            cause = f"The observation {causes} is not finite" if causes else "The input is finite"
            raise ValueError(
                f"The next state {key!r} of ids {names} is NaN or infinite. {cause}. No state was "
                "changed: leave these ids out of the call (ids=), or reset them, or check the "
                "weights of the policy."
            )

    def _read_action(self, out: TensorDictBase) -> Tensor:
        action = out.get(self.action_key, None)
        if action is None:
            raise KeyError(
                f"The policy writes no action {self.action_key!r}. Pass action_key=, one of "
                f"{sorted(map(str, self.network.output_keys))}."
            )
        return action

    def _decode(self, action: Tensor, as_array: bool) -> Any:
        if self.action_spec is not None:
            array = np.asarray(self.action_spec.to_numpy(action.cpu()))
            return array if as_array else torch.as_tensor(array)
        return action.cpu().numpy() if as_array else action

    def reset(self, ids: Ids = None, state: Any = None, *, agents: Any = None) -> None:
        """Start new episodes.

        Args:
            ids: as for a call, or a bool mask ``[num_envs]``; all environments by default.
            state: a TensorDict or mapping of states ``[n, ...]`` to start from, as :meth:`state`
                returns them; zeros by default.
            agents: bool ``[n, *agents]``: start these agents only, and keep the states of others.

        Raises:
            ValueError: if ids do not fit, or if the states' number, keys or shapes do not.
        """
        named = as_ids("ids", ids, self.num_envs)
        with self._join(ids, named) as rows:
            if agents is not None:
                self._table.restart(rows, self._check_agents(agents, len(named)))
                return
            if state is None:
                self._table.restart(rows)
            else:
                self._table.write(rows, self._check_given(state, len(named)))
        self._ended[self._environments(named)] = False

    def _check_agents(self, agents: Any, number: int) -> Tensor:
        mask = self._as_flags("agents", agents, "True for each agent to start")
        shapes = {tuple(self.state([]).get(key).shape[1:-2]) for key in self.network.state_keys}
        if mask.shape[:1] != (number,) or tuple(mask.shape[1:]) not in shapes:
            raise ValueError(
                f"agents must be bool [n, *agents] with n={number} and agents {sorted(shapes)}, "
                f"which the first call shows. Got {list(mask.shape)}."
            )
        return mask

    def _check_given(self, state: Any, number: int) -> TensorDict:
        given = TensorDict({}, [number], device=self.device)
        if not isinstance(state, (Mapping, TensorDictBase)):
            raise TypeError(
                "state must be a TensorDict or a mapping, as state(ids) returns. Got "
                f"{type(state).__name__}."
            )
        expected = self._table.read(self._table.find_rows([]))
        for key in self.network.state_keys:
            value = state.get(key, None)
            if not isinstance(value, Tensor) or value.shape[:1] != (number,):
                got = "nothing" if value is None else f"a {type(value).__name__}"
                if isinstance(value, Tensor):
                    got = f"shape {tuple(value.shape)}"
                raise ValueError(
                    f"state must hold {key!r} of {number} environments. Got {got}; state(ids) "
                    "returns states of the right form."
                )
            known = expected.get(key).shape[1:]
            # The first call shows the number of agents.
            first = 0 if self._table.has_written else -2
            if value.shape[1:][first:] != known[first:]:
                raise ValueError(
                    f"state {key!r} has shape {tuple(value.shape)}; expected {(number, *known)}."
                )
            if not value.isfinite().all():
                raise ValueError(f"state {key!r} is NaN or infinite: expected finite numbers.")
            given.set(key, value)
        return given

    def episode_over(self, done: Any) -> None:
        """Start new episodes where environments are done, at the step that ``autoreset`` names.

        Call it after every step of the environments.

        Args:
            done: bool ``[num_envs]``, ``terminated | truncated`` of the step; or
                ``[num_envs, *agents]`` where agents end apart from each other.

        Raises:
            TypeError: if it is not an array of flags.
            ValueError: if it holds other numbers than 0 and 1, if its shape does not fit, or if
                ``autoreset`` is not known for a vector of environments.
        """
        done = self._as_flags("done", done, "terminated | truncated of the step")
        if done.numel() == self.num_envs:
            done = done.reshape(-1)
        elif done.ndim > 1 and done.shape[-1] == 1:
            done = done.squeeze(-1)
        if done.shape[:1] != (self.num_envs,):
            raise ValueError(
                f"done must have one entry for each of {self.num_envs} environments. Got "
                f"{list(done.shape)}."
            )
        if self.autoreset is None and not self._is_single:
            raise ValueError(
                "Vector environments start new episodes in different ways: pass env= or "
                f"autoreset=, one of {', '.join(map(repr, _AUTORESETS))}. Gymnasium's default is "
                "'next_step'; see env.metadata['autoreset_mode']."
            )
        over = done
        if self.autoreset == "next_step":
            # This step returned the last observation, and the next one returns the first.
            over = self._ended if self._ended.shape == done.shape else torch.zeros_like(done)
        if over.any():
            self.reset(over) if over.ndim == 1 else self.reset(agents=over)
        self._ended = done.clone()

    def _as_flags(self, argument: str, value: Any, expected: str) -> Tensor:
        try:
            flags = torch.as_tensor(value, device=self.device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{argument} must be bool. Got {value!r}: {error}") from error
        if not ((flags == 0) | (flags == 1)).all():
            raise ValueError(
                f"{argument} must be bool, or 0 and 1. Got {value!r}: pass {expected}."
            )
        return flags.bool()

    def state(self, ids: Ids = None) -> TensorDict:
        """Return a copy of the states ``[n]`` of some ids, or of all environments.

        Raises:
            ValueError: if an id is unknown.
        """
        return self._table.read(self._table.find_rows(as_ids("ids", ids, self.num_envs)))

    def remove(self, ids: Ids) -> None:
        """Remove ids that joined, and their states.

        Raises:
            ValueError: if an id is unknown, or one of the environments.
        """
        named = as_ids("ids", ids, self.num_envs)
        own = self._environments(named)
        if own:
            raise ValueError(
                f"ids {own} are the environments 0 to {self.num_envs - 1}, which stay."
            )
        self._table.remove(named)

    def _environments(self, ids: list[Hashable]) -> list[int]:
        """Return the ids that are environments."""
        return [one for one in ids if isinstance(one, int) and one < self.num_envs]


def _next_states(network: RecurrentNetwork, out: TensorDictBase) -> Any:
    states = TensorDict({}, out.batch_size)
    for key in network.state_keys:
        states.set(key, out.get(next_key(key)))
    return states


def _is_vector(env: Any) -> bool:
    return hasattr(env, "num_envs")


def _read_env(env: Any, num_envs: int | None, autoreset: str | None) -> tuple[int, str | None]:
    """Return the number of environments and the autoreset mode.

    Raises:
        ValueError: if an argument contradicts the environment.
    """
    number = 1 if num_envs is None else as_int("num_envs", num_envs, maximum=_MAX_ENVS)
    if env is None:
        return number, autoreset
    found = {"num_envs": 1, "autoreset": "disabled"}
    if _is_vector(env):
        mode = (env.metadata or {}).get("autoreset_mode", None)
        # Gymnasium's AutoresetMode.NEXT_STEP.
        found = {"num_envs": env.num_envs, "autoreset": mode and mode.name.lower()}
    given = {"num_envs": None if num_envs is None else number, "autoreset": autoreset}
    for name, value in given.items():
        if value is not None and found[name] not in (None, value):
            raise ValueError(
                f"{name}={value!r} contradicts env=, which has {found[name]!r}. Leave {name} out."
            )
    return found["num_envs"], found["autoreset"] or autoreset
