"""Transforms and samplers for recurrent policies."""

from __future__ import annotations

from .next_init import NextInitPrioritizedSliceSampler as NextInitPrioritizedSliceSampler
from .next_init import NextInitSliceSampler as NextInitSliceSampler
from .next_init import (
    NextInitSliceSamplerWithoutReplacement as NextInitSliceSamplerWithoutReplacement,
)
from .next_init import NextInitStreamingSliceSampler as NextInitStreamingSliceSampler
from .next_init import NextInitTracker as NextInitTracker
from .primers import StatePrimer as StatePrimer
from .primers import get_env_transforms_from_module as get_env_transforms_from_module
from .primers import get_primers_from_module as get_primers_from_module
