"""Errors of a network that does not take a batch: they name entries and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor, nn

from ..checks import Problem
from .submodules import find_networks
from .time_distributed import TimeDistributed

# Modules that read all dimensions after the first as one observation.
_UNBATCHED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Flatten,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)


# What torch, tensordict and TorchRL raise. Other types, such as a user's own, pass as they are.
_EXPLAINED = (
    RuntimeError,
    NotImplementedError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
)
_DOCUMENTED = (RuntimeError, ValueError, KeyError, TypeError)


@contextmanager
def explain_network_errors(network: nn.Module, batch: TensorDictBase) -> Iterator[None]:
    """Name the entries and the remedy in the errors of a network that does not take a batch.

    Args:
        network: a policy, a network or a loss that runs in the block.
        batch: sequences or steps that it runs on.

    Raises:
        RuntimeError: in place of an error of the block, if the batch has more than one dimension
            and the network has an encoder that takes one.
        Exception: in place of an error of other packages, one that lists the entries that the
            network reads, with their dtypes and shapes. It has the same type if that is one of
            RuntimeError, ValueError, KeyError and TypeError; else it is a RuntimeError.
    """
    try:
        yield
    except _EXPLAINED as error:
        names = _find_unbatched(network) if batch.ndim > 1 else []
        if names:
            raise _encoder_problem(names, batch, error).as_error() from error
        if type(error) not in _EXPLAINED or _is_own(error):
            raise
        raise _input_problem(network, batch, error).as_error() from error


def _encoder_problem(names: list[str], batch: TensorDictBase, error: Exception) -> Problem:
    return Problem(
        "encoder-time",
        f"The network has {', '.join(names)}, which takes one batch dimension. In recurrent mode "
        f"an encoder gets [B, T, ...], here {list(batch.batch_size)} and the observation. The "
        f"error was: {error}.",
        "Wrap the encoder: rnnkeys.TimeDistributed(encoder, observation_ndim=3) for frames (C, H, "
        "W).",
        RuntimeError,
    )


def _is_own(error: Exception) -> bool:
    """Return whether code of this package raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(module).partition(".")[0] == __name__.partition(".")[0]


def _input_problem(network: Any, batch: TensorDictBase, error: Exception) -> Problem:
    keys = dict.fromkeys(unravel_key(key) for key in getattr(network, "in_keys", ()))
    entries = ", ".join(f"{key!r} {_describe(batch.get(key, None))}" for key in keys)
    name = getattr(network, "wired_class", type(network)).__name__
    return Problem(
        "network-input",
        f"{name} does not run on this batch {list(batch.batch_size)}. It reads {entries}. The "
        f"error was: {error}.",
        _find_remedy(network, error, [key for key in keys if batch.get(key, None) is None]),
        type(error) if type(error) in _DOCUMENTED else RuntimeError,
    )


def _find_remedy(network: Any, error: Exception, missing: list[NestedKey]) -> str:
    if isinstance(error, IndexError) and _has_zero_decay(network):
        return (
            "TorchRL's vectorized returns need gamma * lmbda above 0: pass vectorized=False to the "
            "value estimator, also by make_value_estimator()."
        )
    if "randomness" in str(error):
        return "To draw dropout for each critic: loss.set_vmap_randomness('different')."
    if isinstance(error, KeyError) and missing:
        return f"Give what is missing, {missing}, or name its key: by set_keys() to a loss."
    return "Compare the dtypes and shapes with those that its modules were made for."


def _has_zero_decay(network: Any) -> bool:
    """Return whether a value estimator, or that of a loss, weighs later steps by zero."""
    estimator = getattr(network, "_value_estimator", network)
    factors = (getattr(estimator, name, None) for name in ("gamma", "lmbda"))
    return any(isinstance(one, Tensor) and not one.any() for one in factors)


def _describe(entry: Any) -> str:
    if entry is None:
        return "(missing)"
    if not isinstance(entry, Tensor):
        return f"({type(entry).__name__})"
    return f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"


def _find_unbatched(network: nn.Module) -> list[str]:
    """Return the names of encoders' classes that take one batch dimension and are not wrapped."""
    wrapped: set[int] = set()
    found: dict[str, None] = {}
    for module in find_networks(network):
        handles_time: Any = isinstance(module, TimeDistributed) or (
            # TorchRL's networks fold leading dimensions.
            type(module).__module__.startswith("torchrl.modules.models")
        )
        if handles_time:
            wrapped |= {id(inner) for inner in module.modules()}
        elif isinstance(module, _UNBATCHED) and id(module) not in wrapped:
            found[type(module).__name__] = None
    return list(found)
