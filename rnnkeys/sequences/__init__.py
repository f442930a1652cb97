"""Batches of sequences: segment starts, masks, states and windows. No network and no kernel."""

from __future__ import annotations

from .check_sequences import find_sequence_problems as find_sequence_problems
from .masks import allow_where_empty as allow_where_empty
from .masks import append_dims as append_dims
from .masks import read_mask as read_mask
from .masks import sequence_mask as sequence_mask
from .masks import zero_masked as zero_masked
from .next_is_init import set_next_is_init as set_next_is_init
from .segment_starts import find_segment_starts as find_segment_starts
from .segment_starts import read_is_init as read_is_init
from .segment_starts import set_segment_starts as set_segment_starts
from .segment_starts import shift_states as shift_states
from .windows import Spans as Spans
from .windows import cut_windows as cut_windows
from .windows import find_spans as find_spans
from .windows import flag_padding as flag_padding
