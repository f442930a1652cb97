"""Wiring of TorchRL's losses for recurrent networks, and minibatches for policy gradients."""

from __future__ import annotations

from .minibatches import SequenceMinibatches as SequenceMinibatches
from .wiring import recurrent_loss as recurrent_loss
