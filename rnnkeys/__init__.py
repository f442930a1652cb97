"""Recurrent policies for TorchRL: exact at every time step, fast across episode boundaries."""

from .backends import linear_scan as linear_scan
from .cells import Cell as Cell
from .cells import GatedCell as GatedCell
from .deploy import StatefulPolicy as StatefulPolicy
from .deploy import export_step as export_step
from .deploy import load_pretrained as load_pretrained
from .deploy import save_pretrained as save_pretrained
from .diagnostics import check_recurrent_policy as check_recurrent_policy
from .diagnostics import plot_episode_states as plot_episode_states
from .diagnostics import plot_state_staleness as plot_state_staleness
from .mode import recurrent_mode as recurrent_mode
from .mode import set_recurrent_mode as set_recurrent_mode
from .modules import GRU as GRU
from .modules import LSTM as LSTM
from .modules import CellModule as CellModule
from .modules import FFMModule as FFMModule
from .modules import GRUCell as GRUCell
from .modules import GRUModule as GRUModule
from .modules import LRUModule as LRUModule
from .modules import LSTMCell as LSTMCell
from .modules import LSTMModule as LSTMModule
from .modules import MinGRUModule as MinGRUModule
from .modules import MinLSTMModule as MinLSTMModule
from .modules import RecurrentModule as RecurrentModule
from .modules import RNNModule as RNNModule
from .modules import S5Module as S5Module
from .modules import S6Module as S6Module
from .modules import TimeDistributed as TimeDistributed
from .modules import canonicalize_rnn_subset as canonicalize_rnn_subset
from .modules import get_env_transforms_from_module as get_env_transforms_from_module
from .modules import get_primers_from_module as get_primers_from_module
from .policies import CellName as CellName
from .policies import drqn_policy as drqn_policy
from .policies import recurrent_module as recurrent_module
from .precision import RecurrentMatmulPrecision as RecurrentMatmulPrecision
from .precision import RecurrentMatmulPrecisionUserMode as RecurrentMatmulPrecisionUserMode
from .precision import get_recurrent_matmul_precision as get_recurrent_matmul_precision
from .precision import set_recurrent_matmul_precision as set_recurrent_matmul_precision

__version__ = "0.2.0"
