"""Read, check and reshape the entries of a TensorDict that a recurrent module works with.

Shapes: ``lead`` is the TensorDict's batch size, ``[*B, T]`` in recurrent mode. Dimensions of agents
come between it and the features, so inputs are ``[*lead, *agents, I]`` and states
``[*lead, *agents, L, H]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch.compiler import is_compiling

from .._compat import in_transform
from ..checks import can_read_values, find_init_problems, find_tensor_problems, raise_first
from ..sequences.continuity import find_continuity_problems
from ..sequences.segment_starts import find_steps_after_done
from .dtypes import as_dtype


class EntrySpec(NamedTuple):
    """The entries that a recurrent module reads.

    Attributes:
        owner: name of the module, for error messages.
        in_key: key of the input.
        state_keys: keys of the recurrent states.
        init_key: key of the ``is_init`` flags.
        input_size: ``I``.
        num_layers: ``L``.
        state_sizes: ``H`` of each state.
    """

    owner: str
    in_key: NestedKey
    state_keys: tuple[NestedKey, ...]
    init_key: NestedKey
    input_size: int
    num_layers: int
    state_sizes: tuple[int, ...]


class Entries(NamedTuple):
    """The entries of one call.

    Attributes:
        x: input ``[*lead, *agents, I]``.
        states: each ``[*lead, *agents, L, H]``; None if the TensorDict holds none.
        is_init: bool ``[*lead, *agents]``.
        shape: ``[*lead, *agents]``.
    """

    x: Tensor
    states: tuple[Tensor, ...] | None
    is_init: Tensor
    shape: torch.Size


def read(spec: EntrySpec, tensordict: TensorDictBase, *, sequences: bool) -> Entries:
    """Read and check the input, the ``is_init`` flags and the states.

    Args:
        spec: keys and sizes.
        tensordict: one time step, or sequences ``[*B, T]``.
        sequences: whether the last dimension is time. Then a step that follows a ``done`` in its
            row starts a segment, too, as everywhere in the package.

    Raises:
        KeyError: if the input or the flags are missing.
        TypeError: if the flags are not bool.
        ValueError: if the flags have no last dimension of 1.
        RuntimeError: if another shape does not fit, or if some states are there and others are not.
    """
    lead = tensordict.batch_size
    x = tensordict.get(spec.in_key, None)
    if x is None:
        entries = sorted(map(str, tensordict.keys(include_nested=True, leaves_only=True)))
        raise KeyError(
            f"{spec.owner}: entry {spec.in_key!r} (the input of the layer) is not in the "
            f"TensorDict, which has {', '.join(entries)}. Change in_keys or write the entry before "
            "this module."
        )
    rank = len(lead)
    if not isinstance(x, Tensor):
        _raise_tensor_problem(spec, tensordict)
    if x.ndim <= rank or x.shape[-1] != spec.input_size:
        raise RuntimeError(
            f"{spec.owner}: input {spec.in_key!r} has shape {tuple(x.shape)}; expected "
            f"the batch {tuple(lead)} first, optionally agents, and input_size={spec.input_size} "
            "last."
        )
    shape = x.shape[:-1]
    if not spec.state_keys:
        # Without a state there is nothing to reset.
        return Entries(x, (), x.new_zeros((), dtype=torch.bool).expand(shape), shape)
    is_init = _read_flags(spec, tensordict, shape, sequences)
    states = _read_states(spec, tensordict, shape)
    if is_init.device != x.device or (states and states[0].device != x.device):
        _raise_tensor_problem(spec, tensordict)
    return Entries(x, states, is_init, shape)


def _raise_tensor_problem(spec: EntrySpec, tensordict: TensorDictBase) -> None:
    """Raise if an entry is not a tensor, or not on the device of the others."""
    keys = (spec.in_key, spec.init_key, *spec.state_keys)
    raise_first(find_tensor_problems(tensordict, keys))


def _read_states(
    spec: EntrySpec, tensordict: TensorDictBase, shape: torch.Size
) -> tuple[Tensor, ...] | None:
    states = [tensordict.get(key, None) for key in spec.state_keys]
    present = [key for key, s in zip(spec.state_keys, states, strict=True) if s is not None]
    if not present:
        return None
    if len(present) < len(states):
        absent = [key for key in spec.state_keys if key not in present]
        raise RuntimeError(
            f"{spec.owner}: got the state {present} but not {absent}. Give all state entries or "
            "none (none counts as zeros); get_primers_from_module(policy) makes the transform that "
            "creates all of them at resets."
        )
    for key, state, size in zip(spec.state_keys, states, spec.state_sizes, strict=True):
        if not isinstance(state, Tensor) or state.shape != (*shape, spec.num_layers, size):
            _raise_tensor_problem(spec, tensordict)
            raise RuntimeError(
                f"{spec.owner}: state {key!r} has shape {tuple(state.shape)}; expected "
                f"{(*shape, spec.num_layers, size)}: the input's {tuple(shape)}, then "
                f"num_layers={spec.num_layers} and size {size}. A primer made by "
                "get_primers_from_module(policy) has the right shape."
            )
    return tuple(states)


def lacks_last(flags: Tensor, shape: torch.Size, rank: int) -> bool:
    """Return whether flags have the input's shape ``[*lead, *agents]``, with no 1 after it."""
    return flags.shape == shape and (flags.ndim <= rank or shape[-1] != 1)


def _read_flags(
    spec: EntrySpec, tensordict: TensorDictBase, shape: torch.Size, sequences: bool
) -> Tensor:
    """Expand flags, shared ``[*lead, 1]`` or per agent, to bool ``[*lead, *agents]``.

    As TorchRL's modules do, it accepts flags of the input's shape, without the last dimension.
    """
    flags = tensordict.get(spec.init_key, None)
    rank = tensordict.ndim
    if not isinstance(flags, Tensor):
        _raise_tensor_problem(spec, tensordict)
    if flags is not None and lacks_last(flags, shape, rank):
        flags = flags.unsqueeze(-1)
    if flags is None or flags.dtype != torch.bool or flags.ndim <= rank or flags.shape[-1] != 1:
        raise next(find_init_problems(tensordict, spec.init_key)).as_error()
    if sequences and tensordict.get("next", None) is not None:
        flags = flags | find_steps_after_done(tensordict, spec.init_key, flags)
    flags = flags.squeeze(-1)
    if flags.shape == shape:
        return flags
    if flags.shape != shape[: flags.ndim]:
        raise RuntimeError(
            f"{spec.owner}: init key {spec.init_key!r} has shape {(*flags.shape, 1)}; expected "
            f"{(*tensordict.batch_size, 1)} (shared) or {(*shape, 1)} (per agent). InitTracker "
            "writes it so."
        )
    missing = len(shape) - flags.ndim
    return flags[(..., *(None,) * missing)].expand(shape)


def check_time_is_last(tensordict: TensorDictBase) -> None:
    """Raise ValueError if a dimension is named ``"time"`` and it is not the last one."""
    if is_compiling() or in_transform():
        return
    names = list(tensordict.names)
    if "time" in names[:-1]:
        raise ValueError(
            f"In recurrent mode time is the last batch dimension. Got a TensorDict of batch size "
            f"{list(tensordict.batch_size)} whose dimensions are named {names}. Move time to the "
            f"end, tensordict.transpose({names.index('time')}, -1), or rename the dimensions."
        )


def check_continuity(spec: EntrySpec, tensordict: TensorDictBase, shape: torch.Size) -> None:
    """Raise ValueError if a step neither follows the step before it nor is a flagged start.

    The check reads values, in CPU memory only; see ``rnnkeys.checks.set_value_checks``. It does not
    compare stored states: an earlier run of a network on the batch may have overwritten the next
    ones.
    """
    if not spec.state_keys:
        return
    flags = tensordict.get(spec.init_key)
    if can_read_values(flags):
        if lacks_last(flags, shape, tensordict.ndim):
            tensordict = tensordict.copy().set(spec.init_key, flags.unsqueeze(-1))
        raise_first(find_continuity_problems(tensordict, spec.init_key))


def fold_step(
    spec: EntrySpec, data: Entries, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Flatten one time step: ``x [N, I]``, and states ``[N, L, H]``, zeros where ``is_init``."""
    x = as_dtype(data.x if data.x.ndim == 2 else data.x.reshape(-1, data.x.shape[-1]), dtype)
    if data.states is None:
        return x, tuple([x.new_zeros(x.shape[0], spec.num_layers, n) for n in spec.state_sizes])
    # A select: a NaN in a stale state does not pass.
    starts = data.is_init.reshape(-1, 1, 1)
    flat = [s if s.ndim == 3 else s.reshape(-1, *s.shape[-2:]) for s in data.states]
    return x, tuple([as_dtype(s.masked_fill(starts, 0), dtype) for s in flat])


def unfold_step(entry: Tensor, shape: torch.Size) -> Tensor:
    """Restore ``[*lead, *agents, ...]`` from ``[N, ...]``."""
    return entry if len(shape) == 1 else entry.view(*shape, *entry.shape[1:])


def fold_sequences(
    spec: EntrySpec, data: Entries, lead: torch.Size, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Fold batch and agents: ``x [B, T, I]``, states ``[B, T, L, H]``, flags ``[B, T]``."""
    steps, time = lead[-1], len(lead) - 1
    agents = len(data.shape) - len(lead)

    def fold(entry: Tensor, features: int) -> Tensor:
        if time == 1 and not agents:
            return entry  # as it is
        if agents:
            entry = entry.movedim(time, time + agents)
        tail = entry.shape[entry.ndim - features :]
        rows = entry.shape[: entry.ndim - features - 1].numel()
        return entry.reshape(rows, steps, *tail)

    x = as_dtype(fold(data.x, 1), dtype)
    is_init = fold(data.is_init, 0)
    if data.states is None:
        zero = x.new_zeros(())
        zeros = [zero.expand(*x.shape[:2], spec.num_layers, size) for size in spec.state_sizes]
        return x, tuple(zeros), is_init
    return x, tuple([as_dtype(fold(s, 2), dtype) for s in data.states]), is_init


def unfold_sequences(entry: Tensor, lead: torch.Size, shape: torch.Size) -> Tensor:
    """Restore ``[*lead, *agents, ...]`` from ``[B, T, ...]``."""
    time, agents = len(lead) - 1, len(shape) - len(lead)
    if time == 1 and not agents:
        return entry
    unfolded = entry.reshape(*lead[:-1], *shape[len(lead) :], lead[-1], *entry.shape[2:])
    return unfolded.movedim(time + agents, time) if agents else unfolded
