"""Checks of the entries of a batch of sequences: flags, masks, finite values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tensordict import TensorDictBase, is_non_tensor, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor

from ..keys import MASK_KEY, as_tuple, entry_names
from .problem import Problem, make_bool_problem


def find_type_problems(batch: Any, reader: str) -> Iterator[Problem]:
    """Yield a problem if a batch is not a TensorDict.

    Args:
        batch: the argument of a caller.
        reader: who reads the batch, for the message.

    Examples:
        >>> [problem.check for problem in find_type_problems(None, "Windows")]
        ['batch-type']
    """
    if not isinstance(batch, TensorDictBase):
        yield Problem(
            "batch-type",
            f"{reader} expects a TensorDict. Got {type(batch).__name__}.",
            "Pass TensorDict(entries, batch_size), or what a collector or replay buffer returns.",
            TypeError,
        )


def find_meta_problems(batch: TensorDictBase, key: NestedKey, reader: str) -> Iterator[Problem]:
    """Yield a problem if a batch is on the meta device, for a reader that looks at values.

    Args:
        batch: sequences ``[*, T]``.
        key: an entry of it; it may be missing.
        reader: who reads the batch, for the message.

    Examples:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"is_init": torch.zeros(2, 1)}, [2]).to("meta")
        >>> [problem.check for problem in find_meta_problems(batch, "is_init", "Windows")]
        ['no-data']
    """
    value: Any = batch.get(key, None)
    if isinstance(value, Tensor) and value.is_meta:
        yield Problem(
            "no-data",
            f"{reader} reads the values of the batch, and {key!r} is on the meta device, which "
            "holds none.",
            "Pass a batch with data.",
        )


def find_step_problems(batch: TensorDictBase, reader: str) -> Iterator[Problem]:
    """Yield a problem if a batch is not a TensorDict, or has no time dimension or no step.

    Args:
        batch: sequences ``[*, T]``.
        reader: who reads the batch, for the message.

    Examples:
        >>> from tensordict import TensorDict
        >>> [problem.check for problem in find_step_problems(TensorDict({}, [0, 5]), "DQNLoss")]
        ['no-steps']
    """
    if not isinstance(batch, TensorDictBase):
        yield from find_type_problems(batch, reader)
        return
    shape = list(batch.batch_size)
    if not batch.ndim:
        yield Problem(
            "no-time",
            f"{reader} expects sequences [*, T], time in the last batch dimension. Got batch size "
            f"{shape}.",
            "Pass a batch with a time dimension.",
        )
    elif not batch.batch_size.numel():
        yield Problem(
            "no-steps",
            f"{reader} expects sequences [*, T] with at least one step. Got batch size {shape}.",
            "Skip empty batches.",
        )


def find_tensor_problems(batch: TensorDictBase, keys: Iterable[NestedKey]) -> Iterator[Problem]:
    """Yield a problem for each entry that is not a tensor, or on another device than the first.

    Args:
        batch: sequences ``[*, T]``, or single steps ``[*]``.
        keys: entries that are read; missing ones are left out, and so are nested tensordicts, such
            as the parameters of a composite distribution.

    Examples:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"h": torch.zeros(2), "x": torch.zeros(2, device="meta")}, [2])
        >>> [problem.check for problem in find_tensor_problems(batch, ["h", "x"])]
        ['device']
    """
    first = None
    for key in keys:
        value: Any = batch.get(key, None)
        # Texts of a batch are a kind of stacked tensordict.
        is_nested = isinstance(value, TensorDictBase) and not is_non_tensor(value)
        if value is None or is_nested:
            continue
        if not isinstance(value, Tensor):
            yield Problem(
                "entry-type",
                f"The entry {key!r} must be a tensor. Got {type(value).__name__}.",
                "Store numbers there, or name another key.",
                TypeError,
            )
            continue
        first = first or (key, value.device)
        if value.device != first[1]:
            yield Problem(
                "device",
                f"The entries of a batch must be on one device. {first[0]!r} is on {first[1]} and "
                f"{key!r} on {value.device}.",
                "Move the batch: batch.to(device).",
            )


def find_next_problems(batch: TensorDictBase) -> Iterator[Problem]:
    """Yield a problem if a batch has no ``next`` tensordict.

    Args:
        batch: sequences ``[*, T]``.

    Examples:
        >>> from tensordict import TensorDict
        >>> [problem.check for problem in find_next_problems(TensorDict({}, [5]))]
        ['next']
    """
    if batch.get("next", None) is None:
        yield Problem(
            "next",
            f"The batch has no 'next' tensordict. Entries: {entry_names(batch)}.",
            "Pass transitions as collectors and replay buffers return them.",
            KeyError,
        )


def find_init_problems(batch: TensorDictBase, init_key: NestedKey) -> Iterator[Problem]:
    """Yield problems of the ``is_init`` flags: missing, not bool, or of a wrong shape.

    Args:
        batch: sequences ``[*, T]``, or single steps ``[*]``.
        init_key: key of the flags, bool ``[*, T, 1]`` or per agent ``[*, T, agents, 1]``.

    Examples:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"is_init": torch.zeros(2, 5, 1)}, [2, 5])
        >>> [problem.check for problem in find_init_problems(batch, "is_init")]
        ['init-dtype']
    """
    flags = batch.get(init_key, None)
    if flags is None:
        yield _missing_init(batch, init_key)
    else:
        yield from _flag_problems("init", "init key", init_key, flags, batch)


def _missing_init(batch: TensorDictBase, init_key: NestedKey) -> Problem:
    name = as_tuple(init_key)[-1]
    others = [as_tuple(key) for key in batch.keys(True, True)]
    elsewhere = [unravel_key(key) for key in others if key[-1] == name and key[0] != "next"]
    remedy = (
        f"It is at {elsewhere[0]!r}: pass init_key={elsewhere[0]!r}."
        if elsewhere
        else "InitTracker writes it. Append it together with the primers: env = "
        "env.append_transform(get_env_transforms_from_module(policy)). If the flags have another "
        "name, pass it as init_key=."
    )
    return Problem(
        "init-key",
        f"The init key {init_key!r}, which flags the first step of every episode, is missing. "
        f"Entries: {entry_names(batch)}.",
        remedy,
        KeyError,
    )


def find_done_problems(batch: TensorDictBase, done_key: NestedKey) -> Iterator[Problem]:
    """Yield problems of a ``done`` or ``terminated`` entry: not bool, or of a wrong shape.

    A missing entry is not a problem here.

    Args:
        batch: sequences ``[*, T]``.
        done_key: such as ``("next", "done")``, bool ``[*, T, 1]`` or per agent.

    Examples:
        >>> from tensordict import TensorDict
        >>> done = torch.zeros(2, 5, 1, dtype=torch.uint8)
        >>> batch = TensorDict({"next": {"done": done}}, [2, 5])
        >>> [problem.check for problem in find_done_problems(batch, ("next", "done"))]
        ['done-dtype']
    """
    done = batch.get(done_key, None)
    if done is not None:
        yield from _flag_problems("done", "entry", unravel_key(done_key), done, batch)


def _flag_problems(
    check: str, noun: str, key: NestedKey, flags: Tensor, batch: TensorDictBase
) -> Iterator[Problem]:
    if flags.dtype is not torch.bool:
        yield make_bool_problem(f"{check}-dtype", noun, key, flags)
    if flags.ndim <= batch.ndim or flags.shape[-1] != 1:
        yield Problem(
            f"{check}-shape",
            f"The {noun} {key!r} must have the shape [*batch, 1] or, per agent, [*batch, agents, "
            f"1], with batch {list(batch.batch_size)}. Got {list(flags.shape)}.",
            "Add the last dimension with .unsqueeze(-1).",
        )


def find_mask_problems(
    batch: TensorDictBase, reader: str, mask_key: NestedKey = MASK_KEY
) -> Iterator[Problem]:
    """Yield problems of the valid mask: not bool, not one value for each step, or elsewhere.

    Without a mask every step is valid. ``split_trajectories`` writes one at ``"mask"``, beside
    ``"traj_ids"``, if it splits a batch that no collector returned.

    Args:
        batch: sequences ``[*, T]``.
        reader: who reads the batch, for the message.
        mask_key: key of the mask, bool ``[*, T]`` or ``[*, T, 1]``, False at padding.

    Examples:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"collector": {"mask": torch.ones(2, 5)}}, [2, 5])
        >>> [problem.check for problem in find_mask_problems(batch, "DQNLoss")]
        ['mask-dtype']
    """
    mask = batch.get(mask_key, None)
    if mask is None:
        split = batch.get("mask", None) if batch.get("traj_ids", None) is not None else None
        if split is not None and split.dtype is torch.bool and split.shape == batch.batch_size:
            yield Problem(
                "mask-key",
                f"The mask of this batch is at 'mask', as split_trajectories writes it, and "
                f"{reader} reads it at {mask_key!r}.",
                f"Move it: batch.set({mask_key!r}, batch.get('mask')).",
            )
        return
    if mask.dtype is not torch.bool:
        yield make_bool_problem("mask-dtype", "mask", mask_key, mask)
    if mask.shape not in (batch.batch_size, (*batch.batch_size, 1)):
        yield Problem(
            "mask-shape",
            f"The mask {mask_key!r} must have one value for each step, {list(batch.batch_size)}. "
            f"Got {list(mask.shape)}.",
            f"To leave out single agents, store their mask under a key of its own, such as "
            f'"alive", and name it to the loss: loss.loss_mask_key = "alive"; {mask_key!r} is for '
            f"padding, which {reader} removes.",
        )


def find_loss_mask_problems(
    batch: TensorDictBase, mask_keys: Iterable[NestedKey]
) -> Iterator[Problem]:
    """Yield problems of the masks that a loss reads: not bool.

    Args:
        batch: sequences ``[*, T]``.
        mask_keys: keys of masks, bool ``[*, T]``, ``[*, T, 1]`` or per agent; missing ones are
            left out.

    Examples:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"learned": torch.ones(2, 5, dtype=torch.uint8)}, [2, 5])
        >>> [problem.check for problem in find_loss_mask_problems(batch, ["learned"])]
        ['mask-dtype']
    """
    for key in mask_keys:
        mask = batch.get(key, None)
        if mask is not None and mask.dtype is not torch.bool:
            yield make_bool_problem("mask-dtype", "mask", key, mask)


def find_empty_mask_problems(
    mask: Tensor, reader: str, mask_key: Any = MASK_KEY
) -> Iterator[Problem]:
    """Yield a problem if a mask is False everywhere. Reads values.

    Args:
        mask: bool ``[*, T]``, or per agent.
        reader: who reads the batch, for the message.
        mask_key: key of the mask, or a list of keys if it is several masks together.

    Examples:
        >>> mask = torch.zeros(2, 5, dtype=torch.bool)
        >>> [problem.check for problem in find_empty_mask_problems(mask, "DQNLoss")]
        ['mask-empty']
    """
    if not mask.any():
        yield Problem(
            "mask-empty",
            f"The mask {mask_key!r} of this batch {list(mask.shape)} is False everywhere, so "
            f"{reader} has no step to learn from.",
            "Skip such batches.",
        )


def find_multi_step_problems(
    batch: TensorDictBase, steps_key: NestedKey, instead: str
) -> Iterator[Problem]:
    """Yield a problem if a batch holds multi-step transitions.

    Their ``next`` tensordict lies several steps ahead, so it is not the sequence of the next steps.

    Args:
        batch: sequences ``[*, T]``.
        steps_key: number of steps to the next observation, which multi-step transforms write.
        instead: the option that computes longer returns, for the remedy.

    Examples:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"steps_to_next_obs": torch.ones(5, 1)}, [5])
        >>> problems = find_multi_step_problems(batch, "steps_to_next_obs", "n_steps=")
        >>> [problem.check for problem in problems]
        ['multi-step']
    """
    if batch.get(steps_key, None) is not None:
        yield Problem(
            "multi-step",
            f"The batch holds multi-step transitions: it has {steps_key!r}. Their next tensordict "
            "lies several steps ahead, so it is not a sequence that a recurrent network can run.",
            f"Remove MultiStepTransform (or MultiStep). For longer returns use {instead}.",
        )


_NOT_FINITE = (
    "Find out where the environment or the network that writes it makes NaN or infinity, or mask "
    "those steps."
)
_AUTORESET = (
    " Environments that reset themselves write NaN as the last observation of an episode: replace "
    "it by zeros where the episode is terminated, which bootstraps no value, and mask the step "
    "where it is truncated."
)


def find_finite_problems(
    batch: TensorDictBase, keys: Iterable[NestedKey], mask: Tensor | None = None
) -> Iterator[Problem]:
    """Yield a problem for each entry that is NaN or infinite at a valid step. Reads values.

    Args:
        batch: sequences ``[*, T]``.
        keys: entries to read; missing ones, integers and those on the meta device are left out.
        mask: bool ``[*, T]``, False at padding.

    Examples:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"observation": torch.tensor([[0.0], [float("nan")]])}, [2])
        >>> [problem] = find_finite_problems(batch, ["observation"])
        >>> problem.message
        "The entry 'observation' is not finite at 1 of 2 valid steps, first at [1]."
    """
    for key in keys:
        value = batch.get(key, None)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
            continue
        if value.isfinite().all():
            continue
        bad = (~value.isfinite()).reshape(*batch.batch_size, -1).any(-1)
        if mask is not None:
            bad &= mask
        if bad.any():
            steps = bad.numel() if mask is None else int(mask.sum())
            yield Problem(
                "not-finite",
                f"The entry {unravel_key(key)!r} is not finite at {int(bad.sum())} of {steps} "
                f"valid steps, first at {bad.nonzero()[0].tolist()}.",
                _NOT_FINITE + _AUTORESET * (as_tuple(key)[0] == "next"),
            )
