"""Policies in folders that can be shared: weights, the call that makes them, a model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.data import Categorical, OneHot

from .._version import __version__
from ..checks import as_int
from ..policies import drqn_policy
from .model_card import write_model_card

FORMAT = 1
"""Version of ``config.json``; it changes if a reader of an older one would be wrong."""

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_BUILDERS: dict[str, Callable[..., Any]] = {"drqn_policy": drqn_policy}
_SPECS: dict[str, Any] = {"OneHot": OneHot, "Categorical": Categorical}


class PretrainedError(ValueError):
    """A folder that holds no policy of :func:`save_pretrained`, or one that is damaged."""


def save_pretrained(
    policy: TensorDictModuleBase,
    folder: str | Path,
    *,
    builder: Callable[..., TensorDictModuleBase],
    arguments: Mapping[str, Any],
    result: Mapping[str, Any] | None = None,
) -> None:
    """Write a policy to a folder: weights, the call that makes the network, and a model card.

    ``model.safetensors`` has the weights, ``config.json`` the name of the builder and its
    arguments, and ``README.md`` a model card with the result. Nothing is pickled, and nothing is
    sent; ``huggingface_hub.upload_folder`` can upload the folder as it is. Needs
    ``pip install rnnkeys[hub]``.

    Args:
        policy: network to save.
        folder: made if it is missing. Files of a policy that was saved there are replaced.
        builder: function that makes the network: ``builder(**arguments)``. It is called once, to
            see that the weights fit.
        arguments: of the builder: numbers, strings, bools, None, lists and dicts of them, and the
            specs ``OneHot`` and ``Categorical`` of TorchRL.
        result: a row of results for the model card, such as
            ``{"environment": "CartPole-v1", "mean return": 500.0, "episodes": 20}``.

    Raises:
        ImportError: if safetensors is missing.
        TypeError: if an argument is of another type.
        ValueError: if the builder makes a network with other weights.

    Examples:
        >>> import tempfile
        >>> from rnnkeys import drqn_policy
        >>> arguments = {"action_spec": OneHot(2), "observation_shape": (4,), "hidden_size": 8}
        >>> folder = tempfile.mkdtemp()
        >>> policy = drqn_policy(**arguments)
        >>> save_pretrained(policy, folder, builder=drqn_policy, arguments=arguments)
        >>> load_pretrained(folder)[1].state_keys
        ('recurrent_state_h', 'recurrent_state_c')
    """
    safetensors = _import_safetensors()
    encoded = {name: _encode(value, name) for name, value in arguments.items()}
    _check_same_weights(policy, builder(**_decode(encoded)), builder.__name__)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Clones: entries may share their memory, which the file format does not allow.
    weights = {key: value.detach().clone() for key, value in policy.state_dict().items()}
    data = safetensors.torch.save(weights, metadata={"format": "pt"})
    config = {
        "library": "rnnkeys",
        "format": FORMAT,
        "builder": builder.__name__,
        "arguments": encoded,
        "result": dict(result or {}),
        "weights_sha256": hashlib.sha256(data).hexdigest(),
        "versions": {"rnnkeys": __version__, "torch": torch.__version__},
    }
    text = json.dumps(config, indent=2) + "\n"
    _replace(folder / WEIGHTS, data)
    _replace(folder / CARD, write_model_card(folder.resolve().name, config).encode())
    _replace(folder / CONFIG, text.encode())


def load_pretrained(
    folder: str | Path,
    *,
    builder: Callable[..., TensorDictModuleBase] | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Make the policy that :func:`save_pretrained` wrote to a folder.

    No code that the folder names is imported or run: the builder is one of rnnkeys', which is
    ``drqn_policy``, or the one that you pass.

    Args:
        folder: folder with ``config.json`` and ``model.safetensors``.
        builder: function that makes the network from the arguments; needed unless it is one of
            rnnkeys'.
        device: device of the policy.

    Returns:
        The policy, in eval mode; ``StatefulPolicy(policy)`` runs it.

    Raises:
        ImportError: if safetensors is missing.
        PretrainedError: if a file is missing, damaged, of another library or of a newer version, or
            if the builder does not fit.
    """
    safetensors = _import_safetensors()
    config = _read_config(folder)
    make = builder or _BUILDERS.get(config["builder"])
    if make is None:
        raise PretrainedError(
            f"The policy in {folder} is made by a function {config['builder']!r}, which is not "
            f"part of rnnkeys. Pass it: load_pretrained(folder, builder={config['builder']})."
        )
    data = _read(Path(folder, WEIGHTS))
    if hashlib.sha256(data).hexdigest() != config["weights_sha256"]:
        raise PretrainedError(
            f"{Path(folder, WEIGHTS)} is damaged, or belongs to another {CONFIG}: its SHA-256 is "
            "not the recorded one. Copy or download the folder again."
        )
    try:
        weights = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise PretrainedError(
            f"{Path(folder, WEIGHTS)} is damaged: it is not a file of safetensors ({error})."
        ) from error
    try:
        policy = make(**_decode(config["arguments"]))
        policy.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PretrainedError(
            f"{_name(make)} does not make the policy in {folder}, which was written by "
            f"{config['builder']!r} with rnnkeys {config['versions'].get('rnnkeys')}: {error}"
        ) from error
    return policy.to(device).eval()


def read_arguments(folder: str | Path) -> dict[str, Any]:
    """Return the builder's arguments of a folder that :func:`save_pretrained` wrote.

    Args:
        folder: folder with ``config.json``.

    Returns:
        The arguments, with specs as specs: ``read_arguments(folder)["action_spec"]`` is what
        ``StatefulPolicy`` takes as ``action_spec``.

    Raises:
        PretrainedError: as for :func:`load_pretrained`.
    """
    arguments = _read_config(folder)["arguments"]
    try:
        return _decode(arguments)
    except ValueError as error:
        raise PretrainedError(
            f"{Path(folder, CONFIG)} is damaged: it holds {arguments!r} as arguments: {error}"
        ) from error


def _read_config(folder: str | Path) -> dict[str, Any]:
    path = Path(folder, CONFIG)
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise PretrainedError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(config, dict) or config.get("library") != "rnnkeys":
        raise PretrainedError(
            f"{path} is of another library: it has no entry 'library': 'rnnkeys'. Expected a "
            "folder of rnnkeys.save_pretrained."
        )
    if not isinstance(config.get("format"), int) or config["format"] > FORMAT:
        raise PretrainedError(
            f"{path} has format {config.get('format')!r}; this version of rnnkeys reads up to "
            f"{FORMAT}. It was written by {config.get('versions')}: install a newer rnnkeys."
        )
    expected = {"builder": str, "arguments": dict, "weights_sha256": str, "versions": dict}
    wrong = [name for name, kind in expected.items() if not isinstance(config.get(name), kind)]
    if wrong:
        raise PretrainedError(
            f"{path} is damaged: the entries {wrong} are missing or of a wrong type."
        )
    return config


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PretrainedError(
            f"{path} cannot be read ({error.strerror}). Expected a folder of "
            f"rnnkeys.save_pretrained, with {CONFIG} and {WEIGHTS}."
        ) from error


def _replace(path: Path, data: bytes) -> None:
    """Write a file whose name never points to a part of it."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def _encode(value: Any, name: str) -> Any:
    """Return an argument in the types of JSON."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_encode(one, name) for one in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _encode(one, name) for key, one in value.items()}
    kind = type(value).__name__
    number = value.space.n if isinstance(value, (OneHot, Categorical)) else 0
    if number and kind in _SPECS and value == _SPECS[kind](number):
        return {"spec": kind, "n": int(number)}
    raise TypeError(
        f"The argument {name!r} is a {kind}: expected numbers, strings, bools, None, lists or "
        "dicts of them, or a spec OneHot or Categorical of one action. Write a function that makes "
        "it from such values, and pass that one as builder."
    )


def _decode(value: Any) -> Any:
    """Return what :func:`_encode` encoded; tuples come back as lists."""
    if isinstance(value, list):
        return [_decode(one) for one in value]
    if isinstance(value, dict):
        if value.keys() == {"spec", "n"} and value["spec"] in tuple(_SPECS):
            return _SPECS[value["spec"]](as_int("n", value["n"]))
        return {key: _decode(one) for key, one in value.items()}
    return value


def _check_same_weights(policy: nn.Module, other: nn.Module, name: str) -> None:
    has, makes = ({k: v.shape for k, v in one.state_dict().items()} for one in (policy, other))
    if has == makes:
        return
    wrong = sorted(key for key in has.keys() | makes.keys() if has.get(key) != makes.get(key))
    raise ValueError(
        f"{name}(**arguments) makes a network whose weights differ from the policy's in number or "
        f"shape: {', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}. Pass the function and "
        "the arguments that made the policy."
    )


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _import_safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Policies are saved as safetensors: pip install 'rnnkeys[hub]'."
        ) from error
    return safetensors
