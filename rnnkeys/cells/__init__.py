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
from .linear import FFM as FFM
from .linear import FFM_CELL as FFM_CELL
from .linear import LRU as LRU
from .linear import LRU_CELL as LRU_CELL
from .linear import MIN_GRU_CELL as MIN_GRU_CELL
from .linear import MIN_LSTM_CELL as MIN_LSTM_CELL
from .linear import S5 as S5
from .linear import S5_CELL as S5_CELL
from .linear import ConvexCell as ConvexCell
from .linear import LinearCell as LinearCell
from .linear import MinGRU as MinGRU
from .linear import MinLSTM as MinLSTM
from .linear import ResidualBlock as ResidualBlock
