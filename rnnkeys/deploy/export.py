"""A recurrent policy as a plain function of tensors, for deployment without TorchRL."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from .._compat import UserError as ExportUserError
from ..keys import as_tuple, entry_names, next_key
from ..mode import set_recurrent_mode
from ..modules.network import RecurrentNetwork


class Step(nn.Module):
    """One time step of a policy: tensors ``(*inputs, *states)`` to ``(*outputs, *next_states)``.

    Args:
        policy: with recurrent modules inside, or without.
        outputs: keys of the entries to return.

    Attributes:
        input_keys: keys of the inputs, then those of the states.
        output_keys: ``outputs``, then the keys of the next states.
    """

    def __init__(self, policy: TensorDictModuleBase, outputs: Sequence[NestedKey]) -> None:
        super().__init__()
        network = RecurrentNetwork(policy)
        self.policy = policy
        self.init_keys = network.init_keys
        self.state_keys = network.state_keys
        self.input_keys = [*network.input_keys, *network.state_keys]
        self.output_keys = [*map(unravel_key, outputs), *map(next_key, network.state_keys)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one time step of a batch ``[N, ...]``; an episode starts from states of zeros."""
        batch = tensors[0].shape[:1]
        data = TensorDict(
            dict(zip(self.input_keys, tensors, strict=True)),  # pyright: ignore[reportArgumentType]
            batch_size=batch,
        )
        for key in self.init_keys:
            # The caller restarts an episode by zeros, not by a flag.
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
    """Export one time step with explicit states, as a ``torch.export`` program and as ONNX.

    The program takes tensors, not TensorDicts: the observations and the states, in the order of the
    policy's ``in_keys``. It returns ``outputs`` and the next states. Actions are chosen without
    exploration. The batch is of any size, unless the policy runs the size of the example only (then
    a warning says so). An episode starts from states of zeros.

    The policy is exported as it is: if its environment normalizes observations, put the normalizer
    before it, ``TensorDictSequential(normalizer, policy)``, such as the one of
    ``VecNormV2.to_observation_norm()``.

    Args:
        policy: with recurrent modules inside, or without. Its weights are copied as they are.
        example: an entry for each input, with one batch dimension, as ``env.reset()`` of several
            environments returns it; only shapes and dtypes count. States may be missing.
        outputs: keys of the entries to return besides the next states.
        onnx: file to write the same step to. Needs ``pip install rnnkeys[onnx]``. Inputs and
            outputs are named by their keys, nested ones with dots.

    Returns:
        The program; ``program.module()(observation, *states)`` runs it.

    Raises:
        KeyError: if the example misses an input that is not a state, or if the policy writes no
            entry that ``outputs`` names.
        TypeError: if ``outputs`` is one key instead of a list.
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
    step = Step(policy, outputs)
    with _for_export(step):
        program = _trace(step, _make_inputs(step, example))
    if onnx is not None:
        _write_onnx(program, step, Path(onnx))
    return program


def _trace(step: Step, tensors: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Export a step for batches of any size, or else for the size that the policy needs."""
    batch = torch.export.Dim("batch", min=1)
    shapes = (tuple({0: batch} for _ in tensors),)
    try:
        return torch.export.export(step, tensors, dynamic_shapes=shapes, strict=False)
    except ExportUserError:
        number = len(tensors[0])
        program = torch.export.export(step, tensors, strict=False)
    warnings.warn(
        f"The policy runs batches of {number} only, the size of the example, so the program does "
        "too: something in it has one value for each environment, such as VecNormV2's statistics "
        "(use VecNormV2(reduce_batch_dims=True)).",
        stacklevel=3,
    )
    return program


@contextmanager
def _for_export(step: Step) -> Iterator[None]:
    """Put a policy in eval mode, without gradient, and its scalar bool buffers in Python's form.

    TorchRL's ``ObservationNorm`` branches on such a buffer, and a program that is exported cannot
    branch on a value.
    """
    training = {module: module.training for module in step.policy.modules()}
    flags = [
        (module, name, buffer)
        for module in step.policy.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.dtype == torch.bool and not buffer.ndim
    ]
    step.eval()
    for module, name, buffer in flags:
        del module._buffers[name]
        setattr(module, name, bool(buffer))
    try:
        with torch.no_grad():
            yield
    finally:
        for module, name, buffer in flags:
            delattr(module, name)
            module._buffers[name] = buffer
        for module, mode in training.items():
            module.training = mode


def _make_inputs(step: Step, example: TensorDictBase) -> tuple[Tensor, ...]:
    network = RecurrentNetwork(step.policy)
    missing = [key for key in network.input_keys if example.get(key, None) is None]
    if missing:
        raise KeyError(
            f"The example misses {missing}, which the policy reads. Entries here: "
            f"{entry_names(example)}."
        )
    inputs = example.select(*step.input_keys, strict=False)
    if len(example) < 2:
        # A batch of one would be exported as a constant.
        inputs = inputs[[0, 0]]
    if any(inputs.get(key, None) is None for key in step.state_keys):
        inputs.update(network.initial_states(inputs.batch_size, inputs))
    return tuple(inputs.get(key) for key in step.input_keys)


def _write_onnx(program: torch.export.ExportedProgram, step: Step, path: Path) -> None:
    if find_spec("onnxscript") is None:
        raise ImportError("Writing ONNX needs onnxscript: pip install 'rnnkeys[onnx]'.")
    with warnings.catch_warnings():
        # torch's exporter warns about its own internals.
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
