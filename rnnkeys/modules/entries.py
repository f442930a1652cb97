"""Entries of a TensorDict that recurrent modules read: keys, shapes, and the errors for wrong ones.

Shapes: ``lead`` is the TensorDict's batch (``[*b, T]`` in recurrent mode), agents are dimensions
    between it and the
features, so that inputs are ``[*lead, *agents, I]`` and states ``[*lead, *agents, L, H]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tensordict import TensorDictBase, unravel_key, unravel_key_list
from tensordict.utils import NestedKey
from torch import Tensor
from torch.compiler import is_compiling

from .._compat import FakeTensor, in_transform
from ..cells import Cell
from ..keys import MASK_KEY, TRAJECTORY_KEY, as_tuple

if TYPE_CHECKING:
    from .recurrent import RecurrentModule


class Entries(NamedTuple):
    """What a call reads: ``shape`` is ``[*lead, *agents]``, and ``is_init`` bool of that shape."""

    x: Tensor
    states: tuple[Tensor, ...] | None
    is_init: Tensor
    shape: torch.Size


def join_keys(
    side: str,
    key: NestedKey | None,
    keys: Sequence[NestedKey] | None,
    defaults: list[NestedKey],
) -> list[NestedKey]:
    """Return the keys given, or the one given with the default state keys."""
    if (key is None) == (keys is None):
        raise ValueError(
            f"Either {side}_keys or {side}_key must be specified but not both or none. "
            f"Got {side}_keys={keys} and {side}_key={key}."
        )
    if keys is None:
        keys = [key, *defaults]  # pyright: ignore[reportAssignmentType]
    if not isinstance(keys, (list, tuple)):
        raise TypeError(
            f"incompatible function arguments: {side}_keys must be a list of keys. Got {keys!r}, a "
            f"{type(keys).__name__}; for the default state keys use {side}_key={keys!r}."
        )
    return unravel_key_list([*keys])


def split_init_key(
    name: str, keys: list[NestedKey], init_key: NestedKey | None, cell: Cell
) -> tuple[list[NestedKey], NestedKey]:
    """Split in keys into those of input and states, and the init key (optionally last)."""
    expected = 1 + len(cell.state_names)
    wanted = "is_init" if init_key is None else unravel_key(init_key)
    if len(keys) == expected + 1 and keys[-1] == wanted:
        keys = keys[:-1]
    if len(keys) != expected:
        raise ValueError(
            f"{name} expects {expected} in_keys: the input and the states "
            f"{', '.join(cell.state_names)} (optionally the init key {wanted!r} last). Got {keys}. "
            "For another name of the init key use init_key=."
        )
    _check_distinct(name, "in_keys", [*keys, wanted])
    return keys, wanted


def check_in_keys(name: str, keys: list[NestedKey], cell: Cell) -> list[NestedKey]:
    """Raise unless there is one distinct key for the input and one for each state."""
    if len(keys) != 1 + len(cell.state_names):
        raise ValueError(
            f"{name} reads the input and the states {', '.join(cell.state_names)}, and then the "
            f"init key. Got in_keys={keys}."
        )
    _check_distinct(name, "in_keys", keys)
    return keys


def check_out_keys(name: str, keys: list[NestedKey], cell: Cell) -> None:
    """Raise unless there is one distinct key for the output and one for each state."""
    expected = 1 + len(cell.state_names)
    if len(keys) != expected:
        raise ValueError(
            f"{name} expects {expected} out_keys: the output and the states "
            f"{', '.join(cell.state_names)}. Got {keys}."
        )
    _check_distinct(name, "out_keys", keys)


def _check_distinct(name: str, side: str, keys: list[NestedKey]) -> None:
    twice = sorted({str(k) for k in keys if keys.count(k) > 1})
    if twice:
        raise ValueError(
            f"{name}: {side} name {', '.join(twice)} more than once in {keys}; one entry would "
            "overwrite the other. Give every entry a key of its own."
        )


def check_carried(state_keys: Sequence[NestedKey], next_keys: Sequence[NestedKey]) -> None:
    """Raise unless every state is written where environments carry it to the next root."""
    for in_key, out_key in zip(state_keys, next_keys, strict=True):
        if as_tuple(out_key) != ("next", *as_tuple(in_key)):
            raise RuntimeError(
                f"The state read at {in_key!r} is written at {out_key!r}, so that no environment "
                "carries it to the next step. make_tensordict_primer needs out_keys named "
                f"('next', <in_key>): here {('next', *as_tuple(in_key))!r}."
            )


def read(module: RecurrentModule, tensordict: TensorDictBase) -> Entries:
    """Read and check the input, the marks and the states (None if none of them is there)."""
    lead = tensordict.batch_size
    x = tensordict.get(module.in_keys[0], None)
    if x is None:
        raise KeyError(_missing(module, module.in_keys[0], tensordict, "the input of the layer"))
    rank = len(lead)
    if x.ndim <= rank or x.shape[-1] != module._layers.input_size:
        raise RuntimeError(
            f"{_name(module)}: input {module.in_keys[0]!r} has shape {tuple(x.shape)}; expected "
            f"{_dims(lead)}, optionally agents, and input_size={module._layers.input_size} last."
        )
    shape = x.shape[:-1]
    if not module.state_keys:
        return Entries(x, None, x.new_zeros(shape, dtype=torch.bool), shape)
    marks = tensordict.get(module.init_key, None)
    if marks is None:
        raise KeyError(_missing_init(module, tensordict))
    is_init = _marks(module, marks, lead, shape)
    return Entries(x, _read_states(module, tensordict, shape), is_init, shape)


def _read_states(
    module: RecurrentModule, tensordict: TensorDictBase, shape: torch.Size
) -> tuple[Tensor, ...] | None:
    keys = module.state_keys
    states = [tensordict.get(key, None) for key in keys]
    present = [key for key, state in zip(keys, states, strict=True) if state is not None]
    if not present:
        return None
    if len(present) < len(keys):
        absent = [key for key in keys if key not in present]
        raise RuntimeError(
            f"{_name(module)}: got the state {present} but not {absent}. Give all state entries or "
            "none (none counts as zeros); get_primers_from_module(policy) makes the transform that "
            "creates all of them at resets."
        )
    num_layers = module._layers.num_layers
    for key, state, size in zip(keys, states, module.state_sizes, strict=True):
        if state.shape != (*shape, num_layers, size):
            raise RuntimeError(
                f"{_name(module)}: state {key!r} has shape {tuple(state.shape)}; expected "
                f"{(*shape, num_layers, size)}: the input's {tuple(shape)}, then "
                f"num_layers={num_layers} and size {size}. A primer made by "
                "get_primers_from_module(policy) has the right shape."
            )
    return tuple(states)


def _marks(module: RecurrentModule, marks: Tensor, lead: torch.Size, shape: torch.Size) -> Tensor:
    """Bring marks, shared ``[*lead, 1]`` or per agent, to bool ``[*lead, *agents]``."""
    if marks.dtype != torch.bool:
        marks = marks != 0
    if marks.ndim > len(lead) and marks.shape[-1] == 1:
        marks = marks.squeeze(-1)
    if marks.shape == shape:
        return marks
    if marks.ndim < len(lead) or marks.shape != shape[: marks.ndim]:
        raise RuntimeError(
            f"{_name(module)}: init key {module.init_key!r} has shape {tuple(marks.shape)} "
            f"(without its last 1); expected {_dims(lead)} (shared) or {tuple(shape)} (per agent). "
            "InitTracker writes it so."
        )
    missing = len(shape) - marks.ndim
    return marks[(..., *(None,) * missing)].expand(shape)


def check_time_is_last(tensordict: TensorDictBase) -> None:
    """Raise if the TensorDict names its time dimension and it is not the last one."""
    if is_compiling() or in_transform():
        return
    names = list(tensordict.names)
    if "time" in names[:-1]:
        raise ValueError(
            f"In recurrent mode time is the last batch dimension. Got a TensorDict of batch size "
            f"{list(tensordict.batch_size)} whose dimensions are named {names}. Move time to the "
            f"end, tensordict.transpose({names.index('time')}, -1), or rename the dimensions."
        )


def check_trajectories(tensordict: TensorDictBase, is_init: Tensor, init_key: NestedKey) -> None:
    """Raise if trajectories change along time where no start is marked.

    Looks only where it costs nothing: in eager mode, on the CPU, where a collector has written
    trajectory ids.
    """
    if is_compiling() or in_transform():
        return
    ids = tensordict.get(TRAJECTORY_KEY, None)
    rank = tensordict.ndim
    if ids is None or ids.device.type != "cpu" or ids.shape != tensordict.batch_size:
        return
    starts = is_init.reshape(*tensordict.batch_size, -1).any(-1) if is_init.ndim > rank else is_init
    broken = (ids[..., 1:] != ids[..., :-1]) & ~starts[..., 1:]
    mask = tensordict.get(MASK_KEY, None)
    if mask is not None:
        broken &= mask.reshape(ids.shape)[..., 1:]
    if broken.any():
        where = broken.nonzero()[0].tolist()
        where[-1] += 1
        raise RuntimeError(
            f"In recurrent mode, trajectory ids change at position {where} (and "
            f"{int(broken.sum()) - 1} more) where {init_key!r} marks no start: these are single "
            "transitions or unmarked slices, not sequences. Sample sequences (SliceSampler), and "
            "mark next views (rnnkeys.objectives.recurrent_loss or NextInitTracker)."
        )


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype to compute in, the parameters' or autocast's; the input must fit."""
    if _is_autocast(x) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype != weight.dtype:
        raise RuntimeError(
            f"The input has dtype {x.dtype} and the parameters {weight.dtype}; expected the same. "
            "Cast the observation (torchrl's DoubleToFloat or DTypeCastTransform), or give the "
            "module dtype=."
        )
    return weight.dtype


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off: operands have been cast once, and states are kept in that dtype."""
    if _is_autocast(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _is_autocast(x: Tensor) -> bool:
    # Torch refuses to say for tensors without data.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def flat_step(
    data: Entries, module: RecurrentModule, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Flatten one step to ``x [N, I]`` and states ``[N, L, H]``, zero where an episode starts."""
    x = as_dtype(data.x.reshape(-1, data.x.shape[-1]), dtype)
    num_layers = module._layers.num_layers
    if data.states is None:
        sizes = module.state_sizes
        return x, tuple(x.new_zeros(x.shape[0], num_layers, size) for size in sizes)
    # A select: a NaN in a stale state does not pass.
    fresh = data.is_init.reshape(-1, 1, 1)
    states = tuple([s.reshape(-1, *s.shape[-2:]).masked_fill(fresh, 0) for s in data.states])
    return x, states if states[0].dtype == dtype else tuple(s.to(dtype) for s in states)


def has_data(x: Tensor) -> bool:
    """Whether there are values to look at: none on the meta device, nor of a fake tensor."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``x`` where it has another dtype; a call that would not is not free."""
    return x if x.dtype == dtype else x.to(dtype)


def time_second(
    data: Entries, lead: torch.Size, module: RecurrentModule, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Fold batch and agents: ``x [B, T, I]``, states ``[B, T, L, H]``, marks ``[B, T]``."""
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
        num_layers = module._layers.num_layers
        zeros = (x.new_zeros(()).expand(*x.shape[:2], num_layers, n) for n in module.state_sizes)
        return x, tuple(zeros), is_init
    return x, tuple([as_dtype(fold(s, 2), dtype) for s in data.states]), is_init


def time_last(entry: Tensor, lead: torch.Size, shape: torch.Size) -> Tensor:
    """Undo the folding of :func:`time_second`: ``[B, T, ...]`` to ``[*lead, *agents, ...]``."""
    time, agents = len(lead) - 1, len(shape) - len(lead)
    if time == 1 and not agents:
        return entry
    unfolded = entry.reshape(*lead[:-1], *shape[len(lead) :], lead[-1], *entry.shape[2:])
    return unfolded.movedim(time + agents, time) if agents else unfolded


def _name(module: RecurrentModule) -> str:
    return str(type(module).__name__)


def _dims(lead: torch.Size) -> str:
    return f"the batch {tuple(lead)} first"


def _missing(module: RecurrentModule, key: NestedKey, tensordict: TensorDictBase, what: str) -> str:
    keys = sorted(str(k) for k in tensordict.keys(include_nested=True, leaves_only=True))
    return (
        f"{_name(module)}: entry {key!r} ({what}) is not in the TensorDict, which has "
        f"{', '.join(keys)}. Change in_keys or write the entry before this module."
    )


def _missing_init(module: RecurrentModule, tensordict: TensorDictBase) -> str:
    message = _missing(module, module.init_key, tensordict, "the marks of episodes' first steps")
    leaf = as_tuple(module.init_key)[-1]
    keys = [as_tuple(key) for key in tensordict.keys(True, True)]
    elsewhere = [unravel_key(key) for key in keys if key[-1] == leaf and key[0] != "next"]
    if elsewhere:
        return f"{message} It is at {elsewhere[0]!r}: pass init_key={elsewhere[0]!r}."
    return (
        message + " Environments write it with the InitTracker transform: "
        "env = env.append_transform(get_env_transforms_from_module(policy)) appends it and the "
        "primers."
    )
