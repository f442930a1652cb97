"""Losses for recurrent value learning, and the wiring of TorchRL's."""

from __future__ import annotations

from .wiring import recurrent_loss as recurrent_loss
