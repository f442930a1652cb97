"""Cells: the equations of one time step. Backends run time, modules know keys."""

from .base import Cell as Cell
from .base import State as State
from .feed_forward import FEED_FORWARD_CELL as FEED_FORWARD_CELL
from .feed_forward import FeedForward as FeedForward
from .gated import GRU_CELL as GRU_CELL
from .gated import LAYER_NORM_LSTM_CELL as LAYER_NORM_LSTM_CELL
from .gated import LSTM_CELL as LSTM_CELL
from .gated import GatedCell as GatedCell
from .gated import GatedRecurrentUnit as GatedRecurrentUnit
from .gated import LayerNormLongShortTermMemory as LayerNormLongShortTermMemory
from .gated import LongShortTermMemory as LongShortTermMemory
from .gated import Weights as Weights
