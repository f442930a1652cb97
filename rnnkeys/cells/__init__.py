"""Cells: the equations of one recurrent step. Backends run time, modules know keys."""

from .base import Cell as Cell
from .base import Weights as Weights
from .gated import GRU_CELL as GRU_CELL
from .gated import LAYER_NORM_LSTM_CELL as LAYER_NORM_LSTM_CELL
from .gated import LSTM_CELL as LSTM_CELL
from .gated import GatedRecurrentUnit as GatedRecurrentUnit
from .gated import LayerNormLongShortTermMemory as LayerNormLongShortTermMemory
from .gated import LongShortTermMemory as LongShortTermMemory
