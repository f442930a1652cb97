"""A recurrent policy as a plain function of tensors: for deployment without TorchRL."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from ..keys import as_tuple, next_key
from ..mode import set_recurrent_mode
from ..modules.network import find_recurrent


class Step(nn.Module):
    """One step of a policy: tensors ``(*inputs, *states)`` to ``(*outputs, *next_states)``.

    Attributes:
        input_keys: what the policy reads that is no state, then the states.
        output_keys: what was asked for, then the states after the step, in the same order.
    """

    def __init__(self, policy: TensorDictModuleBase, outputs: Sequence[NestedKey]) -> None:
        super().__init__()
        recurrent = find_recurrent(policy)
        states = list(dict.fromkeys(unravel_key(k) for one in recurrent for k in one.state_keys))
        self.init_keys = list(dict.fromkeys(unravel_key(one.init_key) for one in recurrent))
        given = [unravel_key(key) for key in policy.in_keys]
        self.state_keys = states
        self.observation_keys = [k for k in given if k not in states and k not in self.init_keys]
        self.input_keys = [*self.observation_keys, *states]
        self.output_keys = [*map(unravel_key, outputs), *(next_key(key) for key in states)]
        self.policy = policy

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one step for a batch ``[N, ...]``; an episode starts from states of zeros."""
        batch = tensors[0].shape[:1]
        data = TensorDict(
            dict(zip(self.input_keys, tensors, strict=True)),  # pyright: ignore[reportArgumentType]
            batch_size=batch,
        )
        for key in self.init_keys:
            # The caller resets by passing zeros.
            data.set(key, torch.zeros(*batch, 1, dtype=torch.bool, device=tensors[0].device))
        with set_recurrent_mode(False), set_exploration_type(ExplorationType.DETERMINISTIC):
            data = self.policy(data)
        missing = [key for key in self.output_keys if data.get(key, None) is None]
        if missing:
            raise KeyError(
                f"The policy writes no {missing}, which outputs={self.output_keys} asks for. Pass "
                f"outputs=, a list of keys. Entries: {sorted(map(str, data.keys(True)))}."
            )
        return tuple(data.get(key) for key in self.output_keys)


def export_step(
    policy: TensorDictModuleBase,
    example: TensorDictBase,
    *,
    outputs: Sequence[NestedKey] = ("action",),
    onnx: str | Path | None = None,
) -> torch.export.ExportedProgram:
    """Export a single step with explicit states, as a ``torch.export`` program and as ONNX.

    The program takes tensors, not TensorDicts: the observations and the states, in the order of the
    policy's ``in_keys``; it returns ``outputs`` and the states after the step. Actions are chosen
    without exploration. The batch is of any size, and an episode starts from states of zeros.

    Args:
        policy: with recurrent modules inside, or without. Its weights are copied as they are.
        example: an entry for each input, with one batch dimension, as ``env.reset()`` of several
            environments gives it; only shapes and dtypes count. States may be missing.
        outputs: what to return besides the states.
        onnx: file to write the same step to. Needs ``pip install rnnkeys[onnx]``. Inputs and
            outputs are named by their keys, nested ones with dots.

    Returns:
        The program; ``program.module()(observation, *states)`` runs it.

    Raises:
        KeyError: if the example misses an input that is no state, or the policy writes no entry
            that ``outputs`` names.
        TypeError: if ``outputs`` is one key and no list.
        ValueError: if the example has no batch dimension, or more than one.

    Examples:
        >>> from rnnkeys import GRUModule
        >>> policy = GRUModule(3, 5, in_key="observation", out_key="embed")
        >>> example = TensorDict(observation=torch.zeros(2, 3), batch_size=[2])
        >>> program = export_step(policy, example, outputs=["embed"])
        >>> embed, state = program.module()(torch.randn(4, 3), torch.zeros(4, 1, 5))
        >>> embed.shape, state.shape
        (torch.Size([4, 5]), torch.Size([4, 1, 5]))
    """
    if isinstance(outputs, str):
        raise TypeError(f"outputs must be a list of keys. Got {outputs!r}: pass [{outputs!r}].")
    if example.ndim != 1:
        raise ValueError(
            "example must have one batch dimension, [N]. Got batch size "
            f"{list(example.batch_size)}: reshape it, example.reshape(-1), or add a dimension, "
            "example.unsqueeze(0)."
        )
    training = {module: module.training for module in policy.modules()}
    step = Step(policy, outputs).eval()
    tensors = _example_tensors(step, example)
    batch = torch.export.Dim("batch", min=1)
    shapes = (tuple({0: batch} for _ in tensors),)
    try:
        with torch.no_grad():
            program = torch.export.export(step, tensors, dynamic_shapes=shapes, strict=False)
    finally:
        for module, mode in training.items():
            module.training = mode
    if onnx is not None:
        _write_onnx(program, step, Path(onnx))
    return program


def _example_tensors(step: Step, example: TensorDictBase) -> tuple[Tensor, ...]:
    shapes: dict[Any, Tensor] = {}
    for module in step.policy.modules():
        if hasattr(module, "make_tensordict_primer"):
            primers: Any = module.make_tensordict_primer().primers  # pyright: ignore[reportCallIssue]
            shapes.update({unravel_key(k): v.zero() for k, v in primers.items(True, True)})
    tensors = []
    for key in step.input_keys:
        value = example.get(key, None)
        if value is None and key in shapes:
            value = shapes[key].expand(len(example), *shapes[key].shape).clone()
        if value is None:
            raise KeyError(
                f"The example misses {key!r}, which the policy reads. Entries here: "
                f"{sorted(map(str, example.keys()))}."
            )
        # A batch of one would be taken for a constant.
        tensors.append(value[:1].repeat(2, *[1] * (value.ndim - 1)))
    return tuple(tensors)


def _write_onnx(program: torch.export.ExportedProgram, step: Step, path: Path) -> None:
    if find_spec("onnxscript") is None:
        raise ImportError("Writing ONNX needs onnxscript: pip install 'rnnkeys[onnx]'.")
    with warnings.catch_warnings():
        # torch's exporter warns about its own insides.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            program,
            f=str(path),
            input_names=[".".join(as_tuple(key)) for key in step.input_keys],
            output_names=[".".join(as_tuple(key)) for key in step.output_keys],
            dynamo=True,
            verbose=False,
            external_data=False,
        )
