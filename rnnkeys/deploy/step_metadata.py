"""Metadata of an exported step for a runtime: names, shapes, and the output of each state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensordict
import torch
import torchrl
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

from .._version import __version__
from ..keys import join_key, next_key

FORMAT = 1
"""Version of the description; it changes if a reader of an older one would be wrong."""


def describe_step(
    program: torch.export.ExportedProgram,
    *,
    inputs: Sequence[NestedKey],
    init_keys: Sequence[NestedKey],
    states: TensorDict,
    outputs: Sequence[NestedKey],
) -> dict[str, Any]:
    """Describe an exported step, for its file.

    Args:
        program: takes ``inputs``, ``init_keys`` and states, and returns ``outputs`` and the next
            states, each in this order.
        inputs: keys of the observations.
        init_keys: keys of the ``is_init`` flags.
        states: the states that episodes start from, ``[N]``, one for each state key.
        outputs: keys of the results.

    Returns:
        A dict that JSON can hold. Its shapes have ``"batch"`` where any size may be.
    """
    state_keys = list(states.keys(include_nested=True, leaves_only=True))
    taken, returned = _find_values(program)
    before = iter(taken)
    after = iter(returned)
    return {
        "format": FORMAT,
        "inputs": _describe(inputs, before),
        "is_init": _describe(init_keys, before),
        "states": [
            {
                "input": join_key(key),
                "output": join_key(next_key(key)),
                **_shape_and_dtype(value),
                "initial": _as_json(states.get(key)[0]),
            }
            for key, value in zip(state_keys, before, strict=True)
        ],
        "outputs": _describe(outputs, after),
        "versions": {
            "rnnkeys": __version__,
            "torch": torch.__version__,
            "torchrl": torchrl.__version__,
            "tensordict": tensordict.__version__,
        },
    }


def _find_values(program: torch.export.ExportedProgram) -> tuple[list[Tensor], list[Tensor]]:
    """Return stand-ins of a program's arguments and results, with their shapes and dtypes."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    signature = program.graph_signature
    taken: Any = [values[name] for name in signature.user_inputs]
    returned: Any = [values[name] for name in signature.user_outputs]
    return taken, returned


def _describe(keys: Iterable[NestedKey], values: Iterable[Tensor]) -> list[dict[str, Any]]:
    # The keys come first: zip would take a value too many.
    return [
        {"name": join_key(key), **_shape_and_dtype(value)}
        for key, value in zip(keys, values, strict=False)
    ]


def _shape_and_dtype(value: Tensor) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else "batch" for size in value.shape]
    return {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}


def _as_json(state: Tensor) -> Any:
    """Return the number that fills a state, or nested lists where there is more than one."""
    first = state.flatten()[0]
    return first.item() if bool((state == first).all()) else state.tolist()
