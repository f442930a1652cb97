"""Run a tutorial without one thing that rnnkeys adds, everything else equal.

    python -m benchmarks.without recurrent_loss recurrent_dqn --seed 0
    python -m benchmarks.without recurrent_loss recurrent_sac --frames 12000
    python -m benchmarks.without stored_states recurrent_ppo --seq-len 16

Without ``recurrent_loss``, TorchRL's loss is used as it is, on whole transitions. Without
``stored_states``, the sequences of a minibatch start from zeros and not from the states that were
stored while collecting.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torchrl.objectives import LossModule

from rnnkeys.modules import RecurrentNetwork
from rnnkeys.objectives import SequenceMinibatches

TUTORIALS = Path(__file__).parents[1] / "tutorials"


def keep_plain(loss: Any) -> Any:
    """Return the loss, which adds missing states after each step to the batches that it reads.

    The DQN tutorial stores the states before each step only: ``recurrent_loss`` needs no others. A
    plain loss starts the ``next`` half of a sequence from the state after the first step, which is
    the one before the second. It is not where an episode ends with the first step.
    """
    if isinstance(loss, LossModule):
        loss.register_forward_pre_hook(add_next_states)
    return loss


def add_next_states(loss: Any, inputs: tuple[TensorDictBase]) -> None:
    """Add ``("next", state)`` to a batch ``[B, T]``, in place, if the state before is stored.

    Args:
        loss: a TorchRL loss.
        inputs: the arguments of its call: the batch.
    """
    (batch,) = inputs
    for key in RecurrentNetwork(loss).state_keys:
        if key in batch and ("next", key) not in batch:
            batch["next", key] = batch[key].roll(-1, 1)


class ZeroStartMinibatches(SequenceMinibatches):
    """Minibatches whose sequences start from zeros."""

    def __call__(self, rollout: TensorDictBase) -> Iterator[TensorDictBase]:
        keys = [key for network in self.networks for key in network.state_keys]
        return super().__call__(
            rollout.copy().update({key: rollout[key].new_zeros(rollout[key].shape) for key in keys})
        )


def remove_recurrent_loss(tutorial: Any) -> None:
    """Let a tutorial train with TorchRL's loss as it is."""
    tutorial.recurrent_loss = keep_plain


def remove_stored_states(tutorial: Any) -> None:
    """Let a tutorial start the sequences of its minibatches from zeros."""
    tutorial.SequenceMinibatches = ZeroStartMinibatches


REMOVALS: dict[str, Callable[[Any], None]] = {
    "recurrent_loss": remove_recurrent_loss,
    "stored_states": remove_stored_states,
}


def main(argv: Sequence[str]) -> None:
    """Run a tutorial without one thing.

    Args:
        argv: what to remove, the tutorial's name, and the tutorial's options.
    """
    if len(argv) < 2 or argv[0] not in REMOVALS:
        sys.exit(f"expected one of {', '.join(REMOVALS)} and a tutorial's name\n{__doc__}")
    removed, name, *options = argv
    sys.path.insert(0, str(TUTORIALS))
    tutorial = import_module(name)
    REMOVALS[removed](tutorial)
    tutorial.main(options)


if __name__ == "__main__":
    main(sys.argv[1:])
