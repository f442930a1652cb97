"""What cannot be right with a recurrent network, each with its reason and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tensordict import TensorDictBase
from torch import nn
from torchrl.objectives import (
    CQLLoss,
    DiscreteCQLLoss,
    DiscreteSACLoss,
    DQNLoss,
    QMixerLoss,
    SACLoss,
    TQCLoss,
)
from torchrl.objectives.value import ValueEstimatorBase, VTrace

from ..modules import RecurrentModule
from ..starts import MULTI_STEP_KEY, next_key
from .networks import Recurrent

# They take their next view from the batch that their own forward on the root has just written.
READS_OWN_STATES = (DQNLoss, QMixerLoss)

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
        KeyError: if states are stored at the root, and the next ones that the loss reads are not.
        ValueError: if the batch holds multi-step transitions, if a mask would be ignored, or if
            value networks would be run on pieces of time.
    """
    keys: Any = getattr(loss, "tensor_keys", None)
    steps = getattr(keys, MULTI_STEP_KEY, MULTI_STEP_KEY)
    if tensordict.get(steps, None) is not None:
        raise ValueError(
            f"The batch holds multi-step transitions ({steps!r} is there): its next view jumps "
            "several steps and shrinks at the ends of episodes, which is no sequence a recurrent "
            "network can run. Take MultiStepTransform (or MultiStep) away and use "
            "loss.make_value_estimator(ValueEstimators.TDLambda, gamma=..., lmbda=...) for longer "
            "returns."
        )
    if isinstance(loss, QMixerLoss):
        _refuse_mask(tensordict)
    if isinstance(loss, ValueEstimatorBase):
        _refuse_chunks(loss, tensordict)
    if _reads_stored_states(loss, tensordict):
        for one in recurrent:
            _refuse_missing_states(loss, tensordict, one)


def _refuse_mask(tensordict: TensorDictBase) -> None:
    mask = tensordict.get(("collector", "mask"), None)
    if mask is not None and not mask.all():
        raise ValueError(
            "QMixerLoss averages over every step and ignores the mask ('collector', 'mask'), so "
            "padding would be learned from. Sample slices without padding (pad_output=False)."
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
