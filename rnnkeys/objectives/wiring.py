"""The calls of a wired loss: check and prepare the batch, run the loss, copy its results back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor
from torch.compiler import is_compiling
from torchrl.objectives import DistributionalDQNLoss, IQLLoss
from torchrl.objectives.common import AUTO_LOSS_MASK_KEYS
from torchrl.objectives.value import ValueEstimatorBase

from ..checks import (
    Problem,
    find_action_mask_problems,
    find_empty_mask_problems,
    find_finite_problems,
    find_loss_mask_problems,
    find_next_problems,
    find_one_hot_problems,
    find_tensor_problems,
    raise_first,
    should_read_values,
    suspend_value_checks,
)
from ..checks.losses import (
    POLICY_GRADIENT,
    TAKES_BEST_ACTION,
    find_batch_problems,
    find_estimator_problems,
    find_number_keys,
    find_value_problems,
    needs_next,
)
from ..keys import MASK_KEY, as_keys, as_tuple, next_key
from ..mode import set_recurrent_mode
from ..modules.network import RecurrentLayer, RecurrentNetwork
from ..modules.network_errors import explain_network_errors
from ..sequences import (
    allow_where_empty,
    append_dims,
    find_sequence_problems,
    read_mask,
    zero_masked,
)
from ..sequences.checked import is_checked
from ..sequences.segment_starts import (
    find_segment_starts,
    match_agents,
    reduce_agents,
    set_next_flags,
)
from .actor_actions import check_actor_actions, takes_cross_entropy
from .loss_inputs import find_dropped_keys, keep_masks


@dataclass
class Wiring:
    """The state that ``recurrent_loss`` adds to a loss, without an entry of its ``state_dict``.

    Attributes:
        layers: the recurrent modules inside.
        init_keys: keys of their ``is_init`` flags.
        state_keys: pairs ``(state key, init key)``.
        written: keys that the networks inside write.
        selected: state keys that the loss would drop (see ``loss_inputs``).
        action_masks: keys of the action masks that the networks inside read.
        checked: whether the values of a batch have been checked.
        active: whether a call is running.
        valid: valid mask of the running call, ``[*, T]`` or per agent; None without padding.
        seen: tensors that hooks of the running call have recorded, by name.
    """

    layers: tuple[RecurrentLayer, ...]
    init_keys: list[NestedKey]
    state_keys: list[tuple[NestedKey, NestedKey]]
    written: set[Any]
    selected: list[NestedKey]
    action_masks: tuple[NestedKey, ...] = ()
    checked: bool = False
    active: bool = False
    valid: Tensor | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)


def make_wiring(loss: Any, init_key: NestedKey | list[NestedKey] | None) -> Wiring:
    """Find the recurrent modules of a loss and their keys.

    Args:
        loss: a TorchRL loss or value estimator.
        init_key: key of the flags, or a list of keys; None for those of the modules inside.
    """
    network = RecurrentNetwork(loss)
    init_keys = list(network.init_keys) if init_key is None else as_keys(init_key)
    states = set(network.state_keys)
    selected = [key for key in find_dropped_keys(loss) if key in states]
    pairs = [pair for pair in network.pairs if pair[1] in init_keys]
    written = set(network.output_keys)
    return Wiring(network.layers, init_keys, pairs, written, selected, network.action_mask_keys)


class Wired:
    """Base of the classes that :func:`recurrent_loss` makes, before the loss in their bases.

    Attributes:
        wired_class: the class of the loss before it was wired.
    """

    wired_class: Any
    _wiring: Wiring

    def call_wired(
        self, method: Callable[..., Any], batch: TensorDictBase, args: Any, kwargs: Any
    ) -> Any:
        """Check and prepare a batch, run a method of the loss on it, and copy its results back.

        Args:
            method: ``forward`` or another method that takes the batch.
            batch: sequences ``[*, T]``; the loss's own results are written into it.
            args: further arguments of the method.
            kwargs: further keyword arguments.

        Returns:
            The result of the method.
        """
        if self._wiring.active:
            return method(self, batch, *args, **kwargs)
        if method.__name__ == "forward" and batch.get("next", None) is None:
            raise_first(find_next_problems(batch) if needs_next(self, batch) else [])
        prepared = self._prepare(batch)
        self._wiring.valid = self._find_valid(prepared)
        before = prepared.copy()
        result = self._call(method, prepared, args, kwargs)
        self._check_result(result, before)
        self._return_written(before, prepared, batch)
        return batch if result is prepared else result

    def _call(
        self, method: Callable[..., Any], batch: TensorDictBase, args: Any, kwargs: Any
    ) -> Any:
        wiring = self._wiring
        loss: Any = self
        wiring.active = True
        try:
            with nullcontext() if is_compiling() else _check_run(loss, batch):
                with set_recurrent_mode(True), explain_network_errors(loss, batch):
                    result = method(self, batch, *args, **kwargs)
                valid = wiring.valid
                if valid is not None and isinstance(result, TensorDictBase):
                    self.correct_for_padding(result, batch, valid)
                return result
        finally:
            wiring.active = False
            wiring.valid = None
            wiring.seen.clear()

    def correct_for_padding(
        self, result: TensorDictBase, batch: TensorDictBase, valid: Tensor
    ) -> None:
        """Correct averages that the method of the loss has taken over padding, in place.

        Args:
            result: of the method.
            batch: the prepared batch.
            valid: the mask of the steps that count.
        """

    def _prepare(self, batch: TensorDictBase) -> TensorDictBase:
        """Return a checked shallow copy, with segment starts flagged and padding without NaN."""
        self._check(batch)
        mask = read_mask(batch)
        if isinstance(self, IQLLoss) and not is_compiling():
            keep_masks(self, batch, self._mask_keys())
        if mask is not None:
            # Finite values stay: TorchRL's losses report some values of masked steps too.
            batch = zero_masked(batch, mask, finite=False)
        batch = allow_where_empty(batch, self._wiring.action_masks)
        if batch.get("next", None) is None:
            prepared = batch.copy()
        else:
            prepared = set_next_flags(batch, self._wiring.init_keys)
            self._add_zero_states(prepared)
            self._end_returns(prepared, mask)
            self._drop_lone_value(prepared)
        takes_one_row = isinstance(self, DistributionalDQNLoss) or takes_cross_entropy(self, batch)
        if takes_one_row and prepared.ndim > 1:
            return _lay_end_to_end(prepared, self._wiring.init_keys)
        return prepared

    def _check(self, batch: TensorDictBase) -> None:
        wiring = self._wiring
        loss: Any = self
        reads_values = self._reads_values(batch)
        states = [key for key, _ in wiring.state_keys]
        name = str(self.wired_class.__name__)
        raise_first(find_estimator_problems(loss))
        read = dict.fromkeys(
            [*map(unravel_key, getattr(loss, "in_keys", ())), *find_number_keys(loss)]
        )
        raise_first(find_tensor_problems(batch, read))
        raise_first(find_batch_problems(loss, batch, wiring.layers))
        raise_first(
            find_sequence_problems(
                batch,
                wiring.init_keys,
                wiring.state_keys,
                reader=name,
                read_values=reads_values and not is_checked(batch, states),
            )
        )
        raise_first(find_loss_mask_problems(batch, self._mask_keys()))
        self._check_actions(batch, reads_values)
        if reads_values:
            raise_first(self._find_loss_mask_problems(batch, name))
            raise_first(find_value_problems(loss, batch, read_mask(batch), self._find_starts))
            wiring.checked = True

    def _find_loss_mask_problems(self, batch: TensorDictBase, name: str) -> Iterator[Problem]:
        """Yield a problem if no step counts by all masks that the loss reads."""
        keys = [key for key in self._mask_keys() if batch.get(key, None) is not None]
        valid = self._find_valid(batch)
        if valid is not None:
            yield from find_empty_mask_problems(valid, name, keys if len(keys) > 1 else keys[0])

    def _find_starts(self, batch: TensorDictBase) -> Tensor:
        """Return bool ``[*, T]``, True where a segment starts by any flags."""
        flags = [find_segment_starts(batch, key) for key in self._wiring.init_keys]
        return torch.stack([reduce_agents(one, batch.ndim) for one in flags]).any(0)

    def _check_actions(self, batch: TensorDictBase, reads_values: bool) -> None:
        keys: Any = getattr(self, "tensor_keys", None)
        action = getattr(keys, "action", "action")
        if reads_values and getattr(self, "action_space", None) == "one_hot":
            raise_first(find_one_hot_problems(batch, action, self._find_valid(batch)))
        terminated = getattr(keys, "terminated", "terminated")
        for key in self._wiring.action_masks:
            problems = find_action_mask_problems(
                batch,
                key,
                action,
                self._find_valid(batch),
                terminated_key=terminated if isinstance(self, TAKES_BEST_ACTION) else None,
                read_values=reads_values,
            )
            raise_first(problems)

    def _reads_values(self, batch: TensorDictBase) -> bool:
        flags = batch.get(self._wiring.init_keys[0], None)
        return should_read_values(flags, self._wiring.checked)

    def _mask_keys(self) -> tuple[NestedKey, ...]:
        """Return the keys of the masks that the loss reads."""
        named = getattr(self, "loss_mask_key", MASK_KEY)
        if named is None:
            return ()
        return AUTO_LOSS_MASK_KEYS if named == "auto" else (named,)

    def _find_valid(self, batch: TensorDictBase) -> Tensor | None:
        """Return the mask of the steps that count, of all masks that the loss reads."""
        masks = [batch.get(key, None) for key in self._mask_keys()]
        masks = [mask for mask in masks if mask is not None]
        if not masks:
            return None
        most = max(masks, key=lambda mask: mask.ndim)
        valid = most
        for mask in masks:
            valid = valid & append_dims(mask, most.ndim)
        return valid

    def _add_zero_states(self, batch: TensorDictBase) -> None:
        """Add zeros for states that are not stored and that the loss selects from the batch."""
        for layer in self._wiring.layers:
            for key in layer.state_keys:
                if key in self._wiring.selected and batch.get(key, None) is None:
                    zero = RecurrentNetwork(layer.module).initial_states()[key]
                    zeros = zero.expand(*batch.batch_size, *zero.shape)
                    batch.set(key, zeros).set(next_key(key), zeros)

    def _end_returns(self, batch: TensorDictBase, mask: Tensor | None) -> None:
        """Set ``done`` at the last step of every segment and before padding, in place.

        A sampler with ``truncated_key=None`` leaves no ``done`` at the end of a slice; TD(lambda),
        TD(1) and GAE would add the rewards of the next one. Flags end the returns of their own
        group of agents, and those of groups inside or around it.
        """
        loss: Any = self
        time = batch.ndim - 1
        key = next_key(getattr(loss.tensor_keys, "done", "done"))
        done = batch.get(key, None)
        if done is None or batch.shape[time] < 2 or getattr(loss, "auto_reset_env", False):
            return
        terminated = next_key(getattr(loss.tensor_keys, "terminated", "terminated"))
        if batch.get(terminated, None) is None:
            batch.set(terminated, done)
        starts = [
            match_agents(batch.get(one), done, batch.ndim)
            for one in self._wiring.init_keys
            if _share_group(as_tuple(one)[:-1], key[1:-1])
        ]
        ends = torch.stack([torch.zeros_like(done), *starts]).any(0).roll(-1, time)
        if mask is not None:
            ends = ends | append_dims(mask & ~mask.roll(-1, time), done.ndim)
        ends = ends.clone()
        ends.select(time, -1).fill_(False)
        batch.set(key, done | ends)

    def _drop_lone_value(self, batch: TensorDictBase) -> None:
        """Drop a value that is stored in one half of the transition only: both are computed."""
        loss: Any = self
        keys = loss.tensor_keys
        if isinstance(loss, ValueEstimatorBase):
            computes = loss.value_network is not None and not loss.skip_existing
        else:
            has_advantage = isinstance(loss, POLICY_GRADIENT)
            computes = has_advantage and batch.get(keys.advantage, None) is None
        if computes:
            stored = [key for key in _value_keys(loss) if batch.get(key, None) is not None]
            if len(stored) == 1:
                batch.del_(stored[0])

    def _check_result(self, result: Any, batch: TensorDictBase) -> None:
        """Raise if the result is not finite because an entry of the batch is not."""
        if not self._reads_values(batch) or self._is_finite(result):
            return
        keys = [key for key in batch.keys(True, True) if not self._is_state(key)]
        mask = read_mask(batch)
        raise_first(find_finite_problems(batch, keys, mask))
        for state, init in self._wiring.state_keys:
            for key, flags in ((state, init), (next_key(state), next_key(init))):
                if batch.get(key, None) is None or batch.get(flags, None) is None:
                    continue
                starts = reduce_agents(batch.get(flags), batch.ndim).clone()
                starts.select(batch.ndim - 1, 0).fill_(True)
                used = starts if mask is None else starts & mask
                raise_first(find_finite_problems(batch, [key], used))

    def _is_finite(self, result: Any) -> bool:
        """Return whether the losses, or the advantages of an estimator, are finite."""
        if not isinstance(result, TensorDictBase):
            values = result if isinstance(result, (list, tuple)) else [result]
        elif isinstance(self, ValueEstimatorBase):
            keys: Any = self.tensor_keys
            values = [result.get(keys.advantage, None), result.get(keys.value_target, None)]
        else:
            values = [value for key, value in result.items() if str(key).startswith("loss")]
        floats = [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]
        return all(bool(value.isfinite().all()) for value in floats)

    def _is_state(self, key: NestedKey) -> bool:
        path = as_tuple(key)
        path = path[1:] if path[0] == "next" else path
        return any(path == as_tuple(state) for state, _ in self._wiring.state_keys)

    def _return_written(
        self, before: TensorDictBase, after: TensorDictBase, batch: TensorDictBase
    ) -> None:
        """Copy the loss's results into the caller's batch, without flags and network outputs."""
        networks = self._wiring.written
        if isinstance(self, ValueEstimatorBase):
            networks = networks.difference(_value_keys(self))
        for key, value in after.items(True, True):
            if key in networks or value is before.get(key, None):
                continue
            if after.shape != batch.shape:
                value = value.reshape(*batch.shape, *value.shape[1:])
            batch.set(key, value)


@contextmanager
def _check_run(loss: Any, batch: TensorDictBase) -> Iterator[None]:
    """Check what the actor does in the block; modules inside need not check the batch again."""
    with suspend_value_checks(), check_actor_actions(loss, batch):
        yield


def _share_group(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Return whether one of two groups of agents lies inside the other, or is it."""
    number = min(len(one), len(other))
    return one[:number] == other[:number]


def _lay_end_to_end(batch: TensorDictBase, init_keys: list[NestedKey]) -> TensorDictBase:
    """Flatten ``[*, T]`` to ``[N]`` for a loss that takes nothing else; rows start segments."""
    time = batch.ndim - 1
    for key in init_keys:
        flags = batch.get(key).clone()
        flags.select(time, 0).fill_(True)
        batch.set(key, flags)
    return batch.reshape(-1)


def _value_keys(loss: Any) -> tuple[NestedKey, NestedKey]:
    key = unravel_key(loss.tensor_keys.value)
    return key, next_key(key)
