"""Transforms of batches of sequences: windows, burn-in, recomputed states; and state primers."""

from __future__ import annotations

from ..modules.primers import StatePrimer as StatePrimer
from ..modules.primers import get_env_transforms_from_module as get_env_transforms_from_module
from ..modules.primers import get_primers_from_module as get_primers_from_module
from ..sequences.masks import sequence_mask as sequence_mask
from .burn_in import BurnIn as BurnIn
from .previous import PreviousActionReward as PreviousActionReward
from .refresh import RefreshStates as RefreshStates
from .staleness import measure_staleness as measure_staleness
from .staleness import state_staleness as state_staleness
from .windows import Windows as Windows
