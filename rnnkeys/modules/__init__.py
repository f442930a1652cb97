"""Recurrent modules: keys and shapes of the state that lives in a TensorDict."""

from torchrl.modules import canonicalize_rnn_subset as canonicalize_rnn_subset

from .cell_module import CellModule as CellModule
from .lstm_gru import GRUModule as GRUModule
from .lstm_gru import LSTMModule as LSTMModule
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
from .time_distributed import TimeDistributed as TimeDistributed
