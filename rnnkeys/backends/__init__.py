"""Backends: ways to run time, on tensors only."""

from .allocator import keep_freed_memory as keep_freed_memory
from .batch import Options as Options
from .contract import BACKENDS as BACKENDS
from .contract import choose as choose
from .contract import unroll_layers as unroll_layers
from .contract import why_not as why_not
from .scan_ops import linear_scan as linear_scan
