"""A recurrent policy as a plain function of tensors, for deployment without TorchRL."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from .._compat import UserError as ExportUserError
from ..checks import warn_caller
from ..keys import entry_names, join_key, next_key
from ..mode import set_recurrent_mode
from ..modules.network import RecurrentNetwork, eval_mode
from .step_metadata import describe_step


class Step(nn.Module):
    """One time step of a policy: ``(*inputs, *is_init, *states)`` to ``(*outputs, *next_states)``.

    Args:
        network: the policy, with recurrent modules inside, or without.
        outputs: keys of the entries to return.
        takes_flags: whether ``is_init`` flags are inputs. If not, no step starts an episode: the
            caller passes the initial states there.

    Attributes:
        observation_keys: keys of the inputs that are neither flags nor states.
        init_keys: keys of the ``is_init`` flags of layers that have a state.
        flag_keys: those of them that are inputs.
        state_keys: keys of the states.
        input_keys: all of these, in this order.
        output_keys: ``outputs``, then the keys of the next states.
    """

    def __init__(
        self,
        network: RecurrentNetwork,
        outputs: Sequence[NestedKey],
        *,
        takes_flags: bool = True,
    ) -> None:
        super().__init__()
        self.policy = network.network
        self.network = network
        self.observation_keys = self.network.input_keys
        self.init_keys = tuple(dict.fromkeys(init_key for _, init_key in self.network.pairs))
        self.flag_keys = self.init_keys if takes_flags else ()
        self.state_keys = self.network.state_keys
        self.input_keys = [*self.observation_keys, *self.flag_keys, *self.state_keys]
        self.outputs = [unravel_key(key) for key in outputs]
        self.output_keys = [*self.outputs, *map(next_key, self.state_keys)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one time step of a batch ``[N, ...]``; where ``is_init``, states count as zeros."""
        entries: dict[Any, Any] = dict(zip(self.input_keys, tensors, strict=True))
        data = TensorDict(entries, batch_size=tensors[0].shape[:1])
        if not self.flag_keys:
            inside = tensors[0].new_zeros(*data.batch_size, 1, dtype=torch.bool)
            data.update(dict.fromkeys(self.init_keys, inside))
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
    pt2: str | Path | None = None,
) -> torch.export.ExportedProgram:
    """Export one time step with explicit states, as a ``torch.export`` program and as ONNX.

    The program takes tensors, not TensorDicts: the observations, the ``is_init`` flags and the
    states, in the order of the policy's ``in_keys``. It returns ``outputs`` and the next states,
    which are the states of the next call. Where ``is_init`` is True an episode starts, and the
    states that were passed do not count. If neither the example has flags nor a file is written,
    the program takes none: at an episode's start its caller passes the initial states, zeros.
    Actions are chosen without exploration. The batch is of any size, unless the policy runs the
    size of the example only (then it warns).

    The policy is exported as it is: if its environment normalizes observations, put the normalizer
    before it, ``TensorDictSequential(normalizer, policy)``, such as the one of
    ``VecNormV2.to_observation_norm()``.

    Files contain a description of the step, in JSON: names, shapes and dtypes of inputs, flags,
    states and outputs, which output is which state's next one, the initial states, and versions.
    It is ONNX metadata with the key ``"rnnkeys"``, and the extra file ``"rnnkeys.json"`` of a
    program. See ``docs/export.md``.

    Args:
        policy: with recurrent modules inside, or without. Its weights are copied as they are.
        example: an entry for each input, with one batch dimension, as ``env.reset()`` of several
            environments returns it; only shapes and dtypes count. Flags and states may be missing.
        outputs: keys of the entries to return besides the next states.
        onnx: file to write the same step to. Needs ``pip install rnnkeys[onnx]``. Inputs and
            outputs are named by their keys, nested ones with dots.
        pt2: file to write the program to, for ``torch.export.load``.

    Returns:
        The program; ``program.module()(observation, is_init, *states)`` runs it, without
        ``is_init`` where the program takes no flags.

    Raises:
        ImportError: if ``onnx`` is given and the extra is missing.
        KeyError: if the example misses an observation, or if the policy writes no entry that
            ``outputs`` names.
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
    network = RecurrentNetwork(policy)
    writes_file = onnx is not None or pt2 is not None
    has_flags = any(init_key in example for _, init_key in network.pairs)
    step = Step(network, outputs, takes_flags=writes_file or has_flags)
    inputs = _make_inputs(step, example)
    with _for_export(step):
        program = _trace(step, tuple(inputs.get(key) for key in step.input_keys))
    description = describe_step(
        program,
        inputs=step.observation_keys,
        init_keys=step.flag_keys,
        states=inputs.select(*step.state_keys),
        outputs=step.outputs,
    )
    if onnx is not None:
        _write_onnx(program, step, description, Path(onnx))
    if pt2 is not None:
        extra = {"rnnkeys.json": json.dumps(description)}
        torch.export.save(program, str(pt2), extra_files=extra)
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
    warn_caller(
        f"The policy runs batches of {number} only, the size of the example, so the program does "
        "too: something in it has one value for each environment, such as VecNormV2's statistics "
        "(use VecNormV2(reduce_batch_dims=True))."
    )
    return program


@contextmanager
def _for_export(step: Step) -> Iterator[None]:
    """Put a policy in eval mode, without gradient, and its scalar bool buffers in Python's form.

    TorchRL's ``ObservationNorm`` branches on such a buffer, and a program that is exported cannot
    branch on a value.
    """
    flags = [
        (module, name, buffer)
        for module in step.policy.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.dtype == torch.bool and not buffer.ndim
    ]
    for module, name, buffer in flags:
        del module._buffers[name]
        setattr(module, name, bool(buffer))
    try:
        with eval_mode(step):
            yield
    finally:
        for module, name, buffer in flags:
            delattr(module, name)
            module._buffers[name] = buffer


def _make_inputs(step: Step, example: TensorDictBase) -> TensorDictBase:
    """Return observations of the example, and flags and states of episodes that start."""
    network = step.network
    missing = [key for key in network.input_keys if example.get(key, None) is None]
    if missing:
        raise KeyError(
            f"The example misses {missing}, which the policy reads. Entries here: "
            f"{entry_names(example)}."
        )
    inputs = example.select(*step.observation_keys, *step.flag_keys, strict=False)
    if len(example) < 2:
        # A batch of one would be exported as a constant.
        inputs = inputs[[0, 0]]
    flags = torch.ones(*inputs.batch_size, 1, dtype=torch.bool)
    for key in step.flag_keys:
        if inputs.get(key, None) is None:
            inputs.set(key, flags)
    return inputs.update(network.initial_states(inputs.batch_size, inputs))


def _write_onnx(
    program: torch.export.ExportedProgram, step: Step, description: dict[str, Any], path: Path
) -> None:
    if find_spec("onnxscript") is None:
        raise ImportError("Writing ONNX needs onnxscript: pip install 'rnnkeys[onnx]'.")
    takes_any = program.range_constraints
    with warnings.catch_warnings():
        # torch's exporter warns about its own internals.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        written: Any = torch.onnx.export(
            program,
            input_names=[join_key(key) for key in step.input_keys],
            output_names=[join_key(key) for key in step.output_keys],
            # The first input names the size that all share.
            dynamic_shapes=[
                {0: "batch"} if takes_any else None,
                *[None] * len(step.input_keys[1:]),
            ],
            dynamo=True,
            verbose=False,
        )
    description = {**description, "opset": written.model.opset_imports[""]}
    written.model.metadata_props["rnnkeys"] = json.dumps(description)
    written.save(str(path))
