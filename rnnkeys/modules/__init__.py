"""Recurrent modules: keys and shapes of the state that lives in a TensorDict."""

from torchrl.modules import canonicalize_rnn_subset as canonicalize_rnn_subset

from .cell_module import CellModule as CellModule
from .lstm_gru import GRUModule as GRUModule
from .lstm_gru import LSTMModule as LSTMModule
from .named_modules import FFMModule as FFMModule
from .named_modules import LRUModule as LRUModule
from .named_modules import MinGRUModule as MinGRUModule
from .named_modules import MinLSTMModule as MinLSTMModule
from .named_modules import RNNModule as RNNModule
from .named_modules import S5Module as S5Module
from .named_modules import S6Module as S6Module
from .network import RecurrentLayer as RecurrentLayer
from .network import RecurrentNetwork as RecurrentNetwork
from .primers import StatePrimer as StatePrimer
from .primers import get_env_transforms_from_module as get_env_transforms_from_module
from .primers import get_primers_from_module as get_primers_from_module
from .pure_pytorch import GRU as GRU
from .pure_pytorch import LSTM as LSTM
from .recurrent import RecurrentModule as RecurrentModule
from .step_modules import GRUCell as GRUCell
from .step_modules import LSTMCell as LSTMCell
from .tied_actions import choose_one_action as choose_one_action
from .time_distributed import TimeDistributed as TimeDistributed
