"""Checks of losses and value estimators, and of a batch for one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.objectives import (
    A2CLoss,
    CQLLoss,
    DiscreteCQLLoss,
    DiscreteSACLoss,
    DistributionalDQNLoss,
    DQNLoss,
    GAILLoss,
    PPOLoss,
    QMixerLoss,
    ReinforceLoss,
    SACLoss,
    TD3BCLoss,
    TQCLoss,
)
from torchrl.objectives.value import ValueEstimatorBase, VTrace

from ..keys import MASK_KEY, MULTI_STEP_KEY, TRAJECTORY_KEY, as_tuple, next_key
from .entries import find_done_problems, find_finite_problems, find_multi_step_problems
from .problem import Problem
from .state_keys import RecurrentLayer

# Their next tensordict comes from the batch into which their own forward wrote the next states.
READS_OWN_STATES = (DQNLoss, QMixerLoss)

# Their targets take the best action, or all actions, of the next observation.
TAKES_BEST_ACTION = (DQNLoss, DistributionalDQNLoss, QMixerLoss, DiscreteSACLoss)

# They weigh log-probabilities by advantages.
POLICY_GRADIENT = (A2CLoss, PPOLoss, ReinforceLoss)

# They learn from data that their own policy has just collected.
ON_POLICY = (*POLICY_GRADIENT, ValueEstimatorBase)

# Alternatives that remedies name.
LONGER_RETURNS = "loss.make_value_estimator(ValueEstimators.TDLambda, gamma=..., lmbda=...)"
_COLLECT_BOTH = (
    "Collect with it, TensorDictSequential(actor, critic) as the collector's policy, and append "
    "get_env_transforms_from_module(...) of the same to the environment"
)

_LOSSES: dict[type[nn.Module], tuple[str, str]] = {
    CQLLoss: (
        "its penalty repeats every step num_random times along time, so a recurrent network runs "
        "through copies of steps",
        "Use SACLoss or IQLLoss, or add a penalty of your own on actions drawn beside the "
        "sequence.",
    ),
    DiscreteCQLLoss: (
        "it never uses its target network: next values come from the network that learns",
        "Use DQNLoss, with a penalty of your own.",
    ),
    GAILLoss: (
        "it passes observations and actions alone to its discriminator, without is_init flags and "
        "states, and concatenates expert and collected steps",
        "Use a discriminator without recurrent layers, on stacked observations for instance, or a "
        "loss of your own.",
    ),
    VTrace: (
        "its importance ratio uses the log-probability of a freshly drawn action instead of the "
        "one that was taken",
        "Use GAE or TDLambdaEstimator.",
    ),
}


def read_loss_name(thing: Any) -> str:
    """Return the name of a class; of a wired loss that of the class before wiring."""
    return str(getattr(thing, "wired_class", type(thing)).__name__)


def find_loss_problems(loss: nn.Module, layers: Iterable[RecurrentLayer]) -> Iterator[Problem]:
    """Yield problems of a loss that no flags and states can make right.

    Args:
        loss: a TorchRL loss or value estimator.
        layers: the recurrent layers inside.

    Examples:
        >>> from torchrl.objectives.value import VTrace
        >>> issubclass(VTrace, ValueEstimatorBase)
        True
    """
    for kind, (reason, remedy) in _LOSSES.items():
        if isinstance(loss, kind):
            yield _unsupported(read_loss_name(loss), reason, remedy)
    yield from find_estimator_problems(loss)
    if isinstance(loss, (SACLoss, DiscreteSACLoss)) and not isinstance(loss, TQCLoss):
        if loss.skip_done_states:
            yield _unsupported(
                f"{read_loss_name(loss)}(skip_done_states=True)",
                "it skips every step that is done, and so bootstraps nothing where an episode or a "
                "sampled slice was merely cut",
                "Leave skip_done_states=False.",
            )
    if isinstance(loss, READS_OWN_STATES):
        for layer in layers:
            yield from _find_own_state_problems(read_loss_name(loss), layer)


def _unsupported(name: str, reason: str, remedy: str) -> Problem:
    return Problem(
        "unsupported-loss", f"{name} cannot be right with a recurrent network: {reason}.", remedy
    )


def find_estimator_problems(loss: nn.Module) -> Iterator[Problem]:
    """Yield a problem if the value estimator of a loss is V-trace."""
    if isinstance(getattr(loss, "_value_estimator", None), VTrace):
        yield _unsupported("VTrace", *_LOSSES[VTrace])


def _find_own_state_problems(name: str, layer: RecurrentLayer) -> Iterator[Problem]:
    starts = f"{name} starts its next tensordict from the states that its own forward writes"
    yield from _find_unwritten_problems(layer, starts)
    if getattr(layer.module, "state_grad", False):
        yield Problem(
            "state-grad",
            f"{starts}, without detaching them, so with state_grad=True gradients reach the "
            "target.",
            f"Make the {layer.name} with state_grad=False.",
        )


def find_written_state_problems(layer: RecurrentLayer, reader: str) -> Iterator[Problem]:
    """Yield a problem if a module does not write the state after every step.

    Args:
        layer: of a network whose next states are used.
        reader: name of the function or option that uses them.
    """
    yield from _find_unwritten_problems(layer, f"{reader} reads the states that networks write")


def _find_unwritten_problems(layer: RecurrentLayer, reason: str) -> Iterator[Problem]:
    if not layer.writes_states:
        library = type(layer.module).__module__.split(".")[0]
        yield Problem(
            "states-not-written",
            f"{reason}, and {library}'s {layer.name} writes zeros in place of most states.",
            f"Use rnnkeys.{layer.name}: the same arguments, keys and state_dict.",
        )


def find_batch_problems(
    loss: nn.Module, batch: TensorDictBase, layers: Iterable[RecurrentLayer]
) -> Iterator[Problem]:
    """Yield problems of a batch for a loss that keys, dtypes and shapes show.

    Values are read only where an entry is unusual: a mask for a loss that ignores it, or a state
    that is missing.

    Args:
        loss: a TorchRL loss or value estimator.
        batch: sequences ``[*, T]``.
        layers: the recurrent layers inside.
    """
    name = read_loss_name(loss)
    keys = getattr(loss, "tensor_keys", None)
    steps_key = getattr(keys, MULTI_STEP_KEY, MULTI_STEP_KEY)
    yield from find_multi_step_problems(batch, steps_key, LONGER_RETURNS)
    for end in ("done", "terminated"):
        yield from find_done_problems(batch, next_key(getattr(keys, end, end)))
    if isinstance(loss, (QMixerLoss, TD3BCLoss)):
        yield from _find_padding_problems(name, batch)
    if isinstance(loss, ValueEstimatorBase):
        yield from _find_chunk_problems(loss, batch)
    else:
        yield from _find_gradient_problems(name, batch, keys)
    if isinstance(loss, POLICY_GRADIENT):
        yield from _find_advantage_problems(batch, keys)
    layers = list(layers)
    if isinstance(loss, ON_POLICY):
        for layer in layers:
            yield from find_start_problems(batch, layer, name)
    yield from _find_stored_state_problems(loss, name, batch, layers)


def _find_stored_state_problems(
    loss: nn.Module, name: str, batch: TensorDictBase, layers: Iterable[RecurrentLayer]
) -> Iterator[Problem]:
    reads_next = _reads_stored_states(loss, batch)
    for layer in layers:
        yield from _find_primer_problems(name, batch, layer, reads_next)
        if reads_next:
            yield from _find_next_state_problems(name, batch, layer)
            if isinstance(loss, ON_POLICY):
                yield from _find_value_state_problems(loss, batch, layer)


def _find_gradient_problems(name: str, batch: TensorDictBase, keys: Any) -> Iterator[Problem]:
    """Yield a problem if an action or its log-probability would pass gradients to the actor."""
    for argument in ("action", "sample_log_prob"):
        named = getattr(keys, argument, None) or []
        for key in named if isinstance(named, list) else [named]:
            if getattr(batch.get(key, None), "requires_grad", False):
                yield Problem(
                    "collected-with-gradient",
                    f"{key!r} of the batch requires a gradient, which {name} would pass on to the "
                    "run that collected it.",
                    "Collect under torch.no_grad(), as TorchRL's collectors do, or pass "
                    "batch.detach().",
                    RuntimeError,
                )


def _find_advantage_problems(batch: TensorDictBase, keys: Any) -> Iterator[Problem]:
    """Yield a problem if an advantage has no last dimension: products would mix the steps."""
    for key, value in _read_advantages(batch, keys):
        if value.ndim <= batch.ndim:
            yield Problem(
                "advantage-shape",
                f"The entry {key!r} must have the shape [*batch, 1], as GAE writes it. Got "
                f"{list(value.shape)} for the batch {list(batch.batch_size)}.",
                f"Add the last dimension: batch[{key!r}] = batch[{key!r}].unsqueeze(-1).",
            )


def find_advantage_rank_problems(
    loss: nn.Module, batch: TensorDictBase, log_prob_ndim: int
) -> Iterator[Problem]:
    """Yield a problem if an advantage has more dimensions than log-probabilities and one more.

    Args:
        loss: a TorchRL loss, with or without advantages.
        batch: sequences ``[*, T]``.
        log_prob_ndim: number of dimensions of the log-probabilities, ``[*, T]`` or per agent.
    """
    if not isinstance(loss, POLICY_GRADIENT):
        return
    for key, value in _read_advantages(batch, loss.tensor_keys):
        if value.ndim > log_prob_ndim + 1:
            yield Problem(
                "advantage-shape",
                f"The entry {key!r} must have one number for each log-probability, in "
                f"{log_prob_ndim + 1} dimensions. Got {list(value.shape)} for the batch "
                f"{list(batch.batch_size)}.",
                f"Remove a dimension of 1: batch[{key!r}] = batch[{key!r}].squeeze(-1).",
            )


def _read_advantages(batch: TensorDictBase, keys: Any) -> Iterator[tuple[NestedKey, Tensor]]:
    """Yield the advantage and the value target of a batch, where they are stored."""
    for key in map(unravel_key, (keys.advantage, keys.value_target)):
        value = batch.get(key, None)
        if isinstance(value, Tensor):
            yield key, value


def _find_padding_problems(name: str, batch: TensorDictBase) -> Iterator[Problem]:
    mask = batch.get(MASK_KEY, None)
    if mask is not None and not mask.all():
        yield Problem(
            "padding",
            f"{name} averages over every step and ignores the mask {MASK_KEY!r}, so it would learn "
            "from padding.",
            "Sample slices without padding (pad_output=False).",
        )


def _find_chunk_problems(estimator: ValueEstimatorBase, batch: TensorDictBase) -> Iterator[Problem]:
    if estimator.value_chunk_size is None and estimator.num_chunks is None:
        return
    if batch.ndim and estimator.value_chunk_dim % batch.ndim == batch.ndim - 1:
        yield Problem(
            "chunks-of-time",
            f"{read_loss_name(estimator)}(value_chunk_dim={estimator.value_chunk_dim}) would cut a "
            f"batch of shape {list(batch.shape)} along time, its last dimension, and the value "
            "network would lose its state at the cuts.",
            "Chunk another dimension, or leave out value_chunk_size and num_chunks.",
        )


def _find_primer_problems(
    name: str, batch: TensorDictBase, layer: RecurrentLayer, reads_next: bool
) -> Iterator[Problem]:
    """Yield a problem if the states after steps are stored, and those before them are not.

    For a loss that does not read the states after steps it is a warning, since those before them
    may have been dropped on purpose, and looks only at what a collector played: a network that ran
    a batch in recurrent mode has written the states after steps, too.
    """
    missing = [key for key in layer.state_keys if batch.get(key, None) is None]
    is_read = reads_next or batch.get(TRAJECTORY_KEY, None) is not None
    if is_read and any(batch.get(next_key(key), None) is not None for key in missing):
        yield Problem(
            "primer-missing",
            f"The state {missing} is in the next tensordict of the batch and not at its root, "
            f"where {name} starts sequences. Without a primer every step is played from zeros.",
            "Append get_env_transforms_from_module(policy) to the environment, or store the state "
            "before each step. If it was dropped to start from zeros, drop that of next, too.",
            KeyError if reads_next else UserWarning,
        )


def find_start_problems(
    batch: TensorDictBase, layer: RecurrentLayer, reader: str
) -> Iterator[Problem]:
    """Yield a problem if a row starts inside an episode and holds no state to start from.

    Reads the flags of the first steps only where a state is missing.

    Args:
        batch: sequences ``[*, T]``.
        layer: the recurrent module that would run on it.
        reader: who runs it, for the message.
    """
    missing = [key for key in layer.state_keys if batch.get(key, None) is None]
    flags = batch.get(layer.init_key, None)
    if not missing or flags is None or not batch.ndim or not batch.batch_size.numel():
        return
    if not flags.is_meta and not flags.select(batch.ndim - 1, 0).all():
        yield Problem(
            "state-missing",
            f"{reader} would run {layer.name} from zeros inside episodes: the state "
            f"{missing} is not in the batch, and not every row starts with an episode.",
            f"{_COLLECT_BOTH}.",
            KeyError,
        )


def needs_next(loss: Any, batch: TensorDictBase) -> bool:
    """Return whether the ``forward`` of a loss reads the ``next`` tensordict of a batch.

    Losses on advantages that were computed before do not, and neither does behavior cloning.
    """
    if isinstance(loss, ValueEstimatorBase):
        return True
    if isinstance(loss, ON_POLICY):
        return _computes_advantage(loss, batch)
    # Distributional DQN does not name the entries of next among its in_keys.
    is_distributional = isinstance(loss, DistributionalDQNLoss)
    return is_distributional or any(as_tuple(key)[0] == "next" for key in loss.in_keys)


def _computes_advantage(loss: Any, batch: TensorDictBase) -> bool:
    return batch.get(loss.tensor_keys.advantage, None) is None


def _reads_stored_states(loss: nn.Module, batch: TensorDictBase) -> bool:
    """Return whether the next tensordict will be run from states that the batch holds."""
    if batch.get("next", None) is None or isinstance(loss, READS_OWN_STATES):
        return False
    if isinstance(loss, ValueEstimatorBase) or not isinstance(loss, ON_POLICY):
        return True
    return _computes_advantage(loss, batch)


def _find_next_state_problems(
    name: str, batch: TensorDictBase, layer: RecurrentLayer
) -> Iterator[Problem]:
    for key in layer.state_keys:
        ahead = next_key(key)
        if batch.get(key, None) is not None and batch.get(ahead, None) is None:
            yield Problem(
                "next-state-missing",
                f"The state {key!r} is in the batch and {ahead!r} is not, so {name} would run its "
                "next tensordict from zeros.",
                f"Store {ahead!r} in the replay buffer too, or neither: then both start from 0.",
                KeyError,
            )


def _find_value_state_problems(
    loss: Any, batch: TensorDictBase, layer: RecurrentLayer
) -> Iterator[Problem]:
    """Yield a problem if a value network would run the next tensordict from zeros."""
    missing = [key for key in layer.state_keys if batch.get(next_key(key), None) is None]
    if not missing:
        return
    is_estimator = isinstance(loss, ValueEstimatorBase)
    network: Any = loss.value_network if is_estimator else getattr(loss, "critic_network", None)
    estimator = loss if is_estimator else getattr(loss, "_value_estimator", None)
    value = next_key(unravel_key(loss.tensor_keys.value))
    is_known = getattr(estimator, "skip_existing", None) and batch.get(value, None) is not None
    if network is None or getattr(estimator, "shifted", False) or is_known:
        return
    if any(module is layer.module for module in network.modules()):
        yield Problem(
            "next-state-missing",
            f"The state {missing} is not in the batch, so {read_loss_name(loss)} would run the "
            "next tensordict of its value network from zeros instead of the state after the first "
            "step.",
            f"{_COLLECT_BOTH}; or make the estimator with shifted=True.",
            KeyError,
        )


def find_value_problems(
    loss: Any,
    batch: TensorDictBase,
    mask: Tensor | None,
    find_starts: Callable[[TensorDictBase], Tensor],
) -> Iterator[Problem]:
    """Yield problems of a batch for a loss that only values show. Reads values.

    Args:
        loss: a TorchRL loss or value estimator.
        batch: sequences ``[*, T]``, not empty.
        mask: bool ``[*, T]``, False at padding.
        find_starts: returns bool ``[*, T]`` of a batch, True where a segment starts.
    """
    if isinstance(loss, ON_POLICY):
        yield from find_finite_problems(batch, find_number_keys(loss), mask)
    if isinstance(loss, SACLoss) and getattr(loss, "value_network", None) is not None:
        yield from _find_part_problems(loss, batch, find_starts(batch))


def find_number_keys(loss: Any) -> list[NestedKey]:
    """Return the keys of the reward, and of the advantage and value target that a loss reads.

    Losses that are not on collected data read none of the latter.
    """
    keys = loss.tensor_keys
    reward = next_key(unravel_key(getattr(keys, "reward", "reward")))
    if isinstance(loss, ValueEstimatorBase) or not isinstance(loss, ON_POLICY):
        return [reward]
    computed = (getattr(keys, key, key) for key in ("advantage", "value_target"))
    return [reward, *map(unravel_key, computed)]


def _find_part_problems(loss: Any, batch: TensorDictBase, starts: Tensor) -> Iterator[Problem]:
    """SAC with a value network deals the batch out to its critics along the first dimension."""
    parts = loss.num_qvalue_nets
    number = batch.shape[0]
    fits = number % parts == 0
    if fits and batch.ndim == 1:
        cuts = torch.arange(1, parts, device=starts.device) * (number // parts)
        fits = bool(starts[cuts].all())
    if not fits:
        yield Problem(
            "parts",
            f"{read_loss_name(loss)} with a value_network gives each of its {parts} critics a part "
            f"of the batch, and would cut this one, {list(batch.batch_size)}, inside a slice.",
            "Reshape slices of one length to rows, batch.reshape(-1, slice_len), and take a "
            f"multiple of {parts} of them; or leave value_network out.",
        )
