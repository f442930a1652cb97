"""Transforms and samplers for recurrent policies."""

from __future__ import annotations

from .next_init import NextInitPrioritizedSliceSampler as NextInitPrioritizedSliceSampler
from .next_init import NextInitSliceSampler as NextInitSliceSampler
from .next_init import (
    NextInitSliceSamplerWithoutReplacement as NextInitSliceSamplerWithoutReplacement,
)
from .next_init import NextInitStreamingSliceSampler as NextInitStreamingSliceSampler
from .next_init import NextInitTracker as NextInitTracker
