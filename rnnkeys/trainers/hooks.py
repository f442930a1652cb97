"""Hooks of TorchRL's trainers for recurrent policies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensordict import TensorDictBase
from torchrl.trainers import Trainer, TrainerHookBase

from ..objectives import SequenceMinibatches


class SequenceMinibatchesHook(TrainerHookBase):
    """Let a trainer of TorchRL learn from minibatches of whole sequences.

    A trainer with a replay buffer flattens its batches, and draws single steps from them, which
    are not sequences. This hook takes the buffer's place: every epoch it cuts the collected batch
    ``[*, T]`` into minibatches, and the epoch ends with the last one. The trainer needs
    ``replay_buffer=None`` and ``optim_steps_per_batch=None``.

    Args:
        minibatches: how to cut; its ``epochs`` must be 1, for the trainer's ``num_epochs`` counts.

    Raises:
        ValueError: if ``minibatches`` has more than one epoch.

    Examples:
        >>> hook = SequenceMinibatchesHook(SequenceMinibatches(minibatch_steps=64, seq_len=16))
        >>> # hook.register(PPOTrainer(...)), after the trainer has registered its estimator
    """

    def __init__(self, minibatches: SequenceMinibatches) -> None:
        if minibatches.epochs != 1:
            raise ValueError(
                f"minibatches has epochs={minibatches.epochs}: expected 1. The trainer repeats "
                "them: set its num_epochs."
            )
        self.minibatches = minibatches
        self._waiting: Iterator[TensorDictBase] = iter(())

    def start_epoch(self, batch: TensorDictBase) -> TensorDictBase:
        """Cut a collected batch into the minibatches of an epoch; returns the batch.

        Args:
            batch: sequences ``[*, T]``, with advantages if the loss is to use them.
        """
        self._waiting = self.minibatches(batch)
        return batch

    def take_minibatch(self, batch: TensorDictBase) -> TensorDictBase:
        """Return the next minibatch ``[sequences, seq_len]``.

        Args:
            batch: is not read.

        Raises:
            StopIteration: after the last one, which ends the trainer's epoch.
        """
        return next(self._waiting)

    def register(self, trainer: Trainer, name: str = "sequence_minibatches") -> None:
        """Register the hook at a trainer.

        Args:
            trainer: calls the hook.
            name: of the hook.

        Raises:
            ValueError: if the trainer has a replay buffer, or a fixed number of steps per batch.
        """
        for argument in ("replay_buffer", "optim_steps_per_batch"):
            value: Any = getattr(trainer, argument, None)
            if value is not None:
                raise ValueError(
                    f"{type(trainer).__name__} has {argument}={value}: expected None. Minibatches "
                    "of sequences take the place of a buffer, and the last one ends an epoch."
                )
        trainer.register_op("pre_epoch", self.start_epoch)
        trainer.register_op("process_optim_batch", self.take_minibatch)
        trainer.register_module(name, self)

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict: an epoch does not outlive a checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing.

        Args:
            state_dict: an empty dict.
        """
