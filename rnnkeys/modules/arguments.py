"""Checks of constructor arguments; each error names the argument, its value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..checks import as_int

# Arguments, with their defaults, that given layers decide.
_DEFAULTS: dict[str, Any] = {
    "num_layers": 1,
    "bias": True,
    "dropout": 0,
    "proj_size": 0,
    "bidirectional": False,
    "device": None,
    "dtype": None,
}

# Arguments of LSTMModule and GRUModule that only torch's layers have.
_TORCHS = {"batch_first": True, "proj_size": 0, "bidirectional": False, "python_based": False}

# Larger sizes are typing errors: their parameters exceed memory, or take minutes to make.
MAX_SIZES = {"input_size": 2**24, "hidden_size": 2**16, "num_layers": 2**10}

# Packages whose layers compute the equations of their class.
_LIBRARIES = ("torch", "torchrl", "rnnkeys")


def make_layers(
    name: str,
    given: nn.RNNBase | None,
    python_class: type[nn.RNNBase] | None,
    native_class: type[nn.RNNBase],
    **arguments: Any,
) -> nn.RNNBase:
    """Return the layers that are given, checked against the other arguments, or make them.

    Args:
        name: of the argument that gives layers, ``"lstm"`` or ``"gru"``.
        given: its value.
        python_class: class to make if ``python_based``, else None.
        native_class: class to make otherwise.
        **arguments: of that class.

    Raises:
        ValueError: if an argument does not fit the layers given, or is out of range.
    """
    if not arguments["batch_first"]:
        raise ValueError(
            "batch_first=False is not supported: in a TensorDict of batch [B, T] time comes "
            "second. Got batch_first=False; leave it True (transpose data that has time first)."
        )
    if given is not None:
        _check_given(name, given, python_class, arguments)
        return given
    for size in ("input_size", "hidden_size"):
        if arguments[size] is None:
            raise ValueError(
                f"{size} must be passed, a positive int. Got {size}=None; or pass {name}=, an "
                f"nn.{name.upper()} to use."
            )
    for size in ("input_size", "hidden_size", "num_layers"):
        arguments[size] = as_int(size, arguments[size], maximum=MAX_SIZES[size])
    if arguments.pop("bidirectional"):
        raise ValueError(
            "bidirectional=True is not supported: a policy cannot read the future, and in single "
            "steps there is none to read. Leave it False."
        )
    return (python_class or native_class)(**arguments)


def _check_given(
    name: str,
    given: nn.RNNBase,
    python_class: type[nn.RNNBase] | None,
    arguments: dict[str, Any],
) -> None:
    """Raise ValueError if an argument contradicts the layers given, which would override it."""
    if arguments["input_size"] is not None or arguments["hidden_size"] is not None:
        raise ValueError(
            f"{name}= cannot be passed along with input_size or hidden_size (got input_size="
            f"{arguments['input_size']}, hidden_size={arguments['hidden_size']}): the instance "
            "has its sizes. Pass one or the other."
        )
    check_layers(name, given)
    parameter = next(given.parameters())
    for argument, default in _DEFAULTS.items():
        wanted = arguments.get(argument, default)
        if argument == "dtype":
            has = parameter.dtype
        elif argument == "device":
            wanted, has = wanted and torch.device(wanted).type, parameter.device.type
        else:
            has = getattr(given, argument)
        if wanted not in (default, has):
            raise ValueError(
                f"{argument}={wanted!r} contradicts {name}=, which has {argument}={has!r}: the "
                f"instance is used as it is. Leave {argument} out, or change the instance."
            )
    if python_class is not None and not isinstance(given, python_class):
        raise ValueError(
            f"python_based=True contradicts {name}=, a {type(given).__module__}."
            f"{type(given).__name__}. Leave python_based out and call make_python_based() on the "
            f"module, or pass a rnnkeys.{python_class.__name__}."
        )


def check_layers(name: str, layers: Any) -> None:
    """Raise ValueError unless ``layers`` can run as the argument ``name``, "lstm" or "gru"."""
    kind = name.upper()
    if not isinstance(layers, nn.RNNBase) or layers.mode != kind:
        raise ValueError(
            f"{name}= must be an nn.{kind} or the pure-PyTorch rnnkeys.{kind}, with parameters "
            f"to read. Got {type(layers).__module__}.{type(layers).__name__}; leave "
            f"{name!r} out of a quantization."
        )
    owner = next(cls for cls in type(layers).__mro__ if "forward" in vars(cls))
    if owner.__module__.partition(".")[0] not in _LIBRARIES:
        raise ValueError(
            f"{name}= has a forward of its own, that of {owner.__name__}, which would never run: "
            "the parameters are read and the layers are not called. Write that forward as a module "
            "around this one, or as a cell for rnnkeys.CellModule."
        )
    if not layers.batch_first:
        raise ValueError(f"The input {name} must have batch_first=True. Got batch_first=False.")
    if layers.bidirectional:
        raise ValueError(
            f"The input {name} must have bidirectional=False: a policy cannot read the future. Got "
            "bidirectional=True."
        )


def drop_torch_arguments(owner: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments without those of ``LSTMModule`` that a layer of another cell does not have.

    Args:
        owner: class of the module.
        arguments: keys, backend and modes, and perhaps some of ``LSTMModule``.

    Raises:
        ValueError: if one of those has another value than its default.

    Examples:
        >>> drop_torch_arguments("MinGRUModule", {"in_key": "x", "batch_first": True})
        {'in_key': 'x'}
    """
    for name, default in _TORCHS.items():
        if arguments.get(name, default) != default:
            raise ValueError(
                f"{name} is for LSTMModule and GRUModule: {owner} has no such argument. Got "
                f"{name}={arguments[name]!r}; leave it out."
            )
    return {name: value for name, value in arguments.items() if name not in _TORCHS}


def check_floating_dtype(argument: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a floating dtype."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ValueError(
            f"{argument} must be a floating dtype, such as torch.bfloat16. Got {value!r}."
        )
