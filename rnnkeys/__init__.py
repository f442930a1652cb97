"""Recurrent policies for TorchRL: right at every position, fast across episode boundaries."""

from .canonical import canonicalize_rnn_subset as canonicalize_rnn_subset
from .cells import Cell as Cell
from .cells import GRUCell as GRUCell
from .cells import LSTMCell as LSTMCell
from .doctor import check_recurrent_policy as check_recurrent_policy
from .export import export_step as export_step
from .mode import recurrent_mode as recurrent_mode
from .mode import set_recurrent_mode as set_recurrent_mode
from .modules import GRUModule as GRUModule
from .modules import LSTMModule as LSTMModule
from .plots import plot_episode_states as plot_episode_states
from .plots import plot_state_staleness as plot_state_staleness
from .policies import drqn_policy as drqn_policy
from .policies import recurrent_module as recurrent_module
from .precision import RecurrentMatmulPrecision as RecurrentMatmulPrecision
from .precision import RecurrentMatmulPrecisionUserMode as RecurrentMatmulPrecisionUserMode
from .precision import get_recurrent_matmul_precision as get_recurrent_matmul_precision
from .precision import set_recurrent_matmul_precision as set_recurrent_matmul_precision
from .recurrent import RecurrentModule as RecurrentModule
from .rnn import GRU as GRU
from .rnn import LSTM as LSTM
from .stateful import StatefulPolicy as StatefulPolicy
from .transforms.primers import get_env_transforms_from_module as get_env_transforms_from_module
from .transforms.primers import get_primers_from_module as get_primers_from_module

__version__ = "0.1.0"
