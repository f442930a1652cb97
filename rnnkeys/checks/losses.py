"""What cannot be right with a recurrent network, each with its reason and the way out."""

from __future__ import annotations

from collections.abc import Iterable
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
    DQNLoss,
    PPOLoss,
    QMixerLoss,
    ReinforceLoss,
    SACLoss,
    TD3BCLoss,
    TQCLoss,
)
from torchrl.objectives.value import ValueEstimatorBase, VTrace

from ..keys import MASK_KEY, MULTI_STEP_KEY, next_key
from ..modules.lstm_gru import RecurrentModule
from ..modules.network import Recurrent
from ..sequences.segment_starts import check_mask, find_segment_starts

# They take their next view from the batch that their own forward on the root has just written.
READS_OWN_STATES = (DQNLoss, QMixerLoss)

# They learn from what their own policy collected, so that zeros in place of a state are a mistake.
ON_POLICY = (A2CLoss, PPOLoss, ReinforceLoss, ValueEstimatorBase)

_LOSSES: dict[type[nn.Module], str] = {
    CQLLoss: (
        "its penalty repeats every step num_random times along time, so a recurrent network runs "
        "through copies of steps. Use SACLoss or IQLLoss, or add a penalty of your own on actions "
        "drawn beside the sequence"
    ),
    DiscreteCQLLoss: (
        "it never uses its target network, recurrent or not: next values come from the network "
        "that learns. Use DQNLoss, with a penalty of your own"
    ),
}
_VTRACE = (
    "its importance ratio takes the log-probability of a freshly drawn action instead of the one "
    "that was taken. Use GAE, or TDLambdaEstimator"
)


def refuse_loss(loss: nn.Module, recurrent: Iterable[Recurrent]) -> None:
    """Raise if no marks and states can make this loss right.

    Raises:
        ValueError: with the reason and the way out.
    """
    for kind, reason in _LOSSES.items():
        if isinstance(loss, kind):
            raise ValueError(
                f"{type(loss).__name__} cannot be right with a recurrent network: {reason}."
            )
    refuse_estimator(loss)
    _refuse_skipping(loss)
    if isinstance(loss, READS_OWN_STATES):
        for one in recurrent:
            _refuse_states(loss, one)


def refuse_estimator(loss: nn.Module) -> None:
    """Raise if the value estimator of a loss, or the loss itself as one, is V-trace.

    Raises:
        ValueError: with the reason and the way out.
    """
    estimator = getattr(loss, "_value_estimator", loss)
    if isinstance(estimator, VTrace):
        raise ValueError(f"VTrace cannot be right with a recurrent network: {_VTRACE}.")


def _refuse_skipping(loss: nn.Module) -> None:
    skips = isinstance(loss, (SACLoss, DiscreteSACLoss)) and loss.skip_done_states
    if skips and not isinstance(loss, TQCLoss):
        raise ValueError(
            f"{type(loss).__name__}(skip_done_states=True) skips every step that is done, and so "
            "bootstraps nothing where an episode or a sampled slice was merely cut. Leave "
            "skip_done_states=False."
        )


def _refuse_states(loss: nn.Module, recurrent: Recurrent) -> None:
    name, kind = type(loss).__name__, type(recurrent.module).__name__
    if not recurrent.writes_states:
        raise ValueError(
            f"{name} starts its next view from the states that its own forward writes, and "
            f"{type(recurrent.module).__module__.split('.')[0]}'s {kind} writes zeros in place of "
            f"most states. Use rnnkeys.{kind}: the same arguments, keys and state_dict."
        )
    if isinstance(recurrent.module, RecurrentModule) and recurrent.module.state_grad:
        raise ValueError(
            f"{name} starts its next view from the states that its own forward writes and detaches "
            f"nothing, so with state_grad=True gradients reach the target. Make the {kind} with "
            "state_grad=False."
        )


def refuse_batch(
    loss: nn.Module, tensordict: TensorDictBase, recurrent: Iterable[Recurrent]
) -> None:
    """Raise if no marks can make this batch right for this loss.

    Raises:
        KeyError: if states are stored at the root, and the next ones that the loss reads are not;
            if a loss on collected data starts in the midst of an episode without a state.
        ValueError: if the batch holds multi-step transitions, if a mask would be ignored, or if
            value networks would be run on pieces of time.
    """
    keys: Any = getattr(loss, "tensor_keys", None)
    steps = getattr(keys, MULTI_STEP_KEY, MULTI_STEP_KEY)
    refuse_multi_step(
        tensordict,
        steps,
        "loss.make_value_estimator(ValueEstimators.TDLambda, gamma=..., lmbda=...)",
    )
    if isinstance(loss, (QMixerLoss, TD3BCLoss)):
        _refuse_mask(str(type(loss).__name__), tensordict)
    if isinstance(loss, ValueEstimatorBase):
        _refuse_chunks(loss, tensordict)
    if isinstance(loss, ON_POLICY):
        for one in recurrent:
            refuse_lost_memory(tensordict, one, str(type(loss).__name__))
    if _reads_stored_states(loss, tensordict):
        for one in recurrent:
            _refuse_missing_states(loss, tensordict, one)
            if isinstance(loss, ON_POLICY):
                _refuse_states_never_stored(loss, tensordict, one)


def refuse_parts(
    loss: nn.Module, tensordict: TensorDictBase, init_keys: Iterable[NestedKey]
) -> None:
    """Raise if SAC with a value network would cut slices when it deals them out to its critics.

    Reads values, so that the host waits for a device that holds them.

    Raises:
        ValueError: with the batch size and the remedy.
    """
    if not isinstance(loss, SACLoss) or getattr(loss, "value_network", None) is None:
        return
    parts, number = loss.num_qvalue_nets, tensordict.shape[0]
    fits = number % parts == 0
    if fits and tensordict.ndim == 1:
        cuts = torch.arange(1, parts) * (number // parts)
        fits = all(bool(find_segment_starts(tensordict, key)[cuts].all()) for key in init_keys)
    if not fits:
        raise ValueError(
            f"{type(loss).__name__} with a value_network gives each of its {parts} critics a part "
            f"of the batch, and would cut this one, {list(tensordict.batch_size)}, in the midst of "
            "a slice. Reshape slices of one length to rows, batch.reshape(-1, "
            f"slice_len), and take a multiple of {parts} of them; or leave value_network out."
        )


def refuse_multi_step(tensordict: TensorDictBase, key: NestedKey, instead: str) -> None:
    """Raise if the next view is no shifted sequence.

    Args:
        tensordict: the batch.
        key: of the number of steps to the next observation, which multi-step transforms write.
        instead: what makes longer returns, for the message.

    Raises:
        ValueError: with the remedy.
    """
    if tensordict.get(key, None) is not None:
        raise ValueError(
            f"The batch holds multi-step transitions ({key!r} is there): its next view jumps "
            "several steps and shrinks at the ends of episodes, which is no sequence a recurrent "
            "network can run. Take MultiStepTransform (or MultiStep) away and use "
            f"{instead} for longer returns."
        )


def _refuse_mask(name: str, tensordict: TensorDictBase) -> None:
    mask = tensordict.get(MASK_KEY, None)
    if mask is not None and not mask.all():
        raise ValueError(
            f"{name} averages over every step and ignores the mask ('collector', 'mask'), so "
            "padding would be learned from. Sample slices without padding (pad_output=False)."
        )


def refuse_values(loss: nn.Module, tensordict: TensorDictBase) -> None:
    """Raise if a loss would learn from nothing or, on collected data, from what is no number.

    Reads values, so that the host waits for a device that holds them.

    Raises:
        ValueError: if there are no unmasked steps or, on collected data, no steps, or if the
            reward, advantage or value target of an unmasked one is not finite.
    """
    name = str(type(loss).__name__)
    if not isinstance(loss, ON_POLICY):
        read_mask(tensordict, name)
        return
    refuse_emptiness(tensordict, name)
    mask = read_mask(tensordict, name)
    names: Any = loss.tensor_keys
    read = {key: unravel_key(getattr(names, key, key)) for key in ("advantage", "value_target")}
    for key in (next_key(unravel_key(getattr(names, "reward", "reward"))), *read.values()):
        if not (isinstance(loss, ValueEstimatorBase) and key in read.values()):
            refuse_not_finite(tensordict, key, mask)


def refuse_emptiness(tensordict: TensorDictBase, reader: str) -> None:
    """Raise if there is no step.

    Raises:
        ValueError: with the batch size.
    """
    if not tensordict.ndim or not tensordict.batch_size.numel():
        raise ValueError(
            f"{reader} takes sequences [*, T]; at least one step is expected. Got batch size "
            f"{list(tensordict.batch_size)}: there are no sequences in it."
        )


def read_mask(tensordict: TensorDictBase, reader: str) -> Tensor | None:
    """Return the mask ``[*, T]`` if there is one, checked.

    Raises:
        TypeError: if it is not bool.
        ValueError: if it is False everywhere.
    """
    mask = tensordict.get(MASK_KEY, None)
    check_mask(mask)
    if mask is None:
        return None
    mask = mask.reshape(tensordict.batch_size)
    if not mask.any():
        raise ValueError(
            f"The mask {MASK_KEY!r} of this batch {list(tensordict.batch_size)} is False "
            f"everywhere, so there is nothing that {reader} could learn from. Expected a step at "
            "least that is True: skip such a batch."
        )
    return mask


def refuse_not_finite(tensordict: TensorDictBase, key: NestedKey, mask: Tensor | None) -> None:
    """Raise if an entry ``[*, T, ...]`` is there and is NaN or infinite at an unmasked step.

    Raises:
        ValueError: with the number of such steps and the place of the first.
    """
    value = tensordict.get(key, None)
    if value is None or value.isfinite().all():
        return
    bad = (~value.isfinite()).reshape(*tensordict.batch_size, -1).any(-1)
    if mask is not None:
        bad &= mask
    if bad.any():
        raise ValueError(
            f"{key!r} is not finite at {int(bad.sum())} of {bad.numel()} steps, first at "
            f"{bad.nonzero()[0].tolist()}: nothing can be learned from that. Look for the reward "
            "or the network that made it."
        )


def _refuse_chunks(estimator: ValueEstimatorBase, tensordict: TensorDictBase) -> None:
    if estimator.value_chunk_size is None and estimator.num_chunks is None:
        return
    if estimator.value_chunk_dim % tensordict.ndim == tensordict.ndim - 1:
        raise ValueError(
            f"{type(estimator).__name__}(value_chunk_dim={estimator.value_chunk_dim}) would cut a "
            f"batch of shape {list(tensordict.shape)} along time, its last dimension, and with it "
            "the memory of the value network. Chunk another dimension, or drop value_chunk_size "
            "and num_chunks."
        )


def _reads_stored_states(loss: nn.Module, tensordict: TensorDictBase) -> bool:
    """Whether a next view will be run from states that the batch holds."""
    if tensordict.get("next", None) is None or isinstance(loss, READS_OWN_STATES):
        return False
    if isinstance(loss, ValueEstimatorBase):
        return True
    # Losses on advantages that were worked out before run nothing on the next view.
    advantage = getattr(getattr(loss, "tensor_keys", None), "advantage", None)
    return advantage is None or tensordict.get(advantage, None) is None


def _refuse_missing_states(
    loss: nn.Module, tensordict: TensorDictBase, recurrent: Recurrent
) -> None:
    for key in recurrent.state_keys:
        ahead = next_key(key)
        if tensordict.get(key, None) is not None and tensordict.get(ahead, None) is None:
            raise KeyError(
                f"The state {key!r} is in the batch and {ahead!r} is not, so {type(loss).__name__} "
                "would run its next view from zeros. Store both in the replay buffer, or neither "
                "(then sequences start from zeros in both views)."
            )


def _refuse_states_never_stored(loss: Any, tensordict: TensorDictBase, one: Recurrent) -> None:
    """Raise if the next view of a value network would start from zeros behind a first step."""
    missing = [key for key in one.state_keys if tensordict.get(next_key(key), None) is None]
    if not missing:
        return
    is_estimator = isinstance(loss, ValueEstimatorBase)
    network: Any = loss.value_network if is_estimator else getattr(loss, "critic_network", None)
    estimator = loss if is_estimator else getattr(loss, "_value_estimator", None)
    value = next_key(unravel_key(loss.tensor_keys.value))
    is_known = getattr(estimator, "skip_existing", None) and tensordict.get(value, None) is not None
    if network is None or getattr(estimator, "shifted", False) or is_known:
        return
    if any(module is one.module for module in network.modules()):
        raise KeyError(
            f"The state {missing} is not in the batch, so {type(loss).__name__} would run the next "
            "view of its value network from zeros, and not from the state behind the first step. "
            "Collect with it, TensorDictSequential(actor, critic) as the collector's policy, and "
            "append get_env_transforms_from_module(...) of the same to the environment; or make "
            "the estimator with shifted=True."
        )


def refuse_lost_memory(tensordict: TensorDictBase, recurrent: Recurrent, reader: str) -> None:
    """Raise if a row starts in the midst of an episode and holds no state to start from.

    Args:
        tensordict: ``[*, T]``, time last.
        recurrent: the module that would run on it.
        reader: what runs it, for the message.

    Raises:
        KeyError: with the keys that are missing, and how they get there.
    """
    missing = [key for key in recurrent.state_keys if tensordict.get(key, None) is None]
    marks = tensordict.get(recurrent.init_key, None)
    if not missing or marks is None or not tensordict.ndim:
        return
    if not marks.select(tensordict.ndim - 1, 0).all():
        raise KeyError(
            f"{reader} would run {type(recurrent.module).__name__} from zeros in the midst of "
            f"episodes: the state {missing} is not in the data. Collect with it, "
            "TensorDictSequential(actor, critic) as the collector's policy, and append "
            "get_env_transforms_from_module(...) of the same to the environment."
        )


def refuse_unknown_states(recurrent: Recurrent, reader: str) -> None:
    """Raise unless a module writes the state after every step.

    Raises:
        ValueError: with the module and the remedy.
    """
    module = recurrent.module
    if not recurrent.writes_states:
        raise ValueError(
            f"{reader} reads the states that networks write, and {type(module).__name__} of "
            f"{type(module).__module__.split('.')[0]} writes zeros in place of most. Use rnnkeys': "
            "the same arguments, keys and state_dict."
        )
