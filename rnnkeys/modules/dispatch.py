"""Calls of recurrent modules with plain tensors in place of a TensorDict."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, is_tensor_collection
from torch import Tensor

from ..keys import as_tuple
from .entries import lacks_last


def dispatch_tensors(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a recurrent module be called with tensors, in the order of ``in_keys`` or by their names.

    The call then returns the tensors of ``out_keys``, one alone or a tuple. The name of a nested
    key is its parts joined by ``"_"``. It differs from ``tensordict.nn.dispatch`` in the batch
    size: the last dimension of the input holds features and that of the ``is_init`` flags is 1, so
    neither is a batch dimension, whatever their sizes.

    Args:
        forward: a method that takes a TensorDict and returns it.
    """

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and is_tensor_collection(args[0]):
            return forward(self, *args, **kwargs)
        if "tensordict" in kwargs:
            return forward(self, kwargs.pop("tensordict"), *args, **kwargs)
        out = forward(self, _join(self, args, kwargs))
        written = tuple(out.get(key) for key in self.out_keys)
        return written[0] if len(written) == 1 else written

    return call


def _join(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TensorDict:
    """Return a TensorDict of the tensors of a call."""
    names = {"_".join(as_tuple(key)): key for key in module.in_keys}
    given = dict(zip(names, args, strict=False))
    unknown = [name for name in kwargs if name not in names or name in given]
    if len(args) > len(names) or unknown:
        raise TypeError(
            f"{type(module).__name__} takes a TensorDict, or the tensors {list(names)}, each once. "
            f"Got {len(args)} tensors and the names {list(kwargs)}."
        )
    wrong = [
        type(value).__name__ for value in (given | kwargs).values() if not isinstance(value, Tensor)
    ]
    if wrong:
        raise TypeError(
            f"{type(module).__name__} takes a TensorDict, or the tensors {list(names)}. Got "
            f"{', '.join(wrong)}."
        )
    entries: dict[Any, Tensor] = {names[name]: value for name, value in (given | kwargs).items()}
    data = TensorDict({}, [])
    for key, value in entries.items():
        data.set(key, value)
    x, flags = (data.get(key, None) for key in (module.in_keys[0], module.init_key))
    lead = torch.Size() if x is None else x.shape[:-1]
    if flags is not None and not lacks_last(flags, lead, flags.ndim - 1):
        lead = lead[: flags.ndim - 1]
    data.auto_batch_size_(batch_dims=len(lead))
    return data
