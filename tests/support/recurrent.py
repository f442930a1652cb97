"""Recurrent modules and batches for tests, and runs of them step by step by hand."""

from __future__ import annotations

from typing import Any

import torch
import torchrl.modules
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import Tensor, nn

from rnnkeys import GRUModule, LSTMModule, set_recurrent_mode
from rnnkeys.keys import as_tuple

KINDS: dict[str, Any] = {"lstm": LSTMModule, "gru": GRUModule}
THEIRS: dict[str, Any] = {"lstm": torchrl.modules.LSTMModule, "gru": torchrl.modules.GRUModule}
BACKENDS = ("loop", "pad", "scan", "auto")
F64 = torch.float64


def make(kind: str, **arguments: Any) -> Any:
    """Return a module of 3 inputs and 5 hidden units that reads "observation", writes "embed"."""
    return KINDS[kind](**_defaults(arguments))


def make_theirs(kind: str, **arguments: Any) -> Any:
    """Return TorchRL's module with the same sizes and keys."""
    return THEIRS[kind](**_defaults(arguments))


def _defaults(arguments: dict[str, Any]) -> dict[str, Any]:
    if not {"lstm", "gru"} & arguments.keys():
        arguments = {"input_size": 3, "hidden_size": 5, **arguments}
    if "in_keys" not in arguments:
        arguments = {"in_key": "observation", **arguments}
    if "out_keys" not in arguments:
        arguments = {"out_key": "embed", **arguments}
    return arguments


def batch(
    module: Any,
    shape: tuple[int, ...] = (2, 7),
    agents: tuple[int, ...] = (),
    *,
    states: bool = True,
    flag_rate: float = 0.3,
    shared_flags: bool = True,
) -> TensorDict:
    """Return random sequences ``[*shape]`` (time last) for a module, stored states included."""
    dtype = next(module.parameters()).dtype
    data = TensorDict({}, batch_size=shape)
    data.set(module.in_keys[0], torch.randn(*shape, *agents, module.layers.input_size, dtype=dtype))
    flag_shape = (*shape, 1) if shared_flags else (*shape, *agents, 1)
    data.set(init_key(module), torch.rand(flag_shape) < flag_rate)
    if states:
        for key, size in zip(module.state_keys, module.state_sizes, strict=True):
            layers = module.layers.num_layers
            data.set(key, torch.randn(*shape, *agents, layers, size, dtype=dtype))
    return data


def by_hand(module: Any, data: TensorDictBase) -> TensorDictBase:
    """Run sequences one step at a time, segments from the state stored at their first step."""
    time = data.ndim - 1
    flags = data.get(init_key(module))
    read = data.select(*module.in_keys, strict=False)
    steps: list[TensorDictBase] = []
    with set_recurrent_mode(False):
        for t in range(data.shape[-1]):
            step = read[(..., t)].clone()
            if t:
                _carry(module, step, steps[-1], flags.select(time, t))
            # The state is chosen here, so that single-step mode must not reset it to zero.
            step.set(init_key(module), torch.zeros_like(flags.select(time, t)))
            steps.append(module(step))
    return torch.stack(steps, time)  # pyright: ignore[reportArgumentType, reportReturnType]


def init_key(module: Any) -> Any:
    """Return the key of the ``is_init`` flags, also of a layer without state and of TorchRL's."""
    return getattr(module, "init_key", module.in_keys[-1])


def _carry(module: Any, step: TensorDictBase, before: TensorDictBase, starts: Tensor) -> None:
    for key in module.state_keys:
        carried = before.get(("next", *as_tuple(key)))
        stored = step.get(key, torch.zeros_like(carried))
        fresh = starts.squeeze(-1)
        fresh = fresh[(..., *(None,) * (carried.ndim - fresh.ndim))]
        step.set(key, torch.where(fresh, stored, carried))


def outputs(module: Any, data: TensorDictBase) -> dict[str, Tensor]:
    """Return what a module has written, by name."""
    return {str(key): data.get(key) for key in module.out_keys}


def recurrently(module: Any, data: TensorDictBase) -> TensorDictBase:
    """Run whole sequences on a copy of the data."""
    with set_recurrent_mode(True):
        return module(data.clone())


def chain(*modules: nn.Module) -> TensorDictSequential:
    """Return modules run one after the other (their constructor's types admit only lists)."""
    return TensorDictSequential(*modules)  # pyright: ignore[reportArgumentType, reportCallIssue]
