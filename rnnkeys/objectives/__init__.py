"""Wiring of TorchRL's losses for recurrent networks, and minibatches for policy gradients."""

from __future__ import annotations

from .minibatches import SequenceMinibatches as SequenceMinibatches
from .r2d2 import R2D2Loss as R2D2Loss
from .recurrent_loss import recurrent_loss as recurrent_loss
from .rescaling import value_rescale as value_rescale
from .rescaling import value_rescale_inverse as value_rescale_inverse
