"""Recurrent layers by name, and the network of a deep recurrent Q-network (DRQN)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Binary, Categorical, MultiOneHot, OneHot, TensorSpec
from torchrl.modules import MLP, ConvNet, QValueModule

from .cells import FEED_FORWARD_CELL, LAYER_NORM_LSTM_CELL
from .modules.cell_module import CellModule
from .modules.lstm_gru import GRUModule, LSTMModule
from .modules.named_modules import (
    FFMModule,
    LRUModule,
    MinGRUModule,
    MinLSTMModule,
    RNNModule,
    S5Module,
    S6Module,
)
from .modules.recurrent import RecurrentModule
from .modules.tied_actions import choose_one_action
from .modules.time_distributed import TimeDistributed

CellName = Literal[
    "lstm",
    "gru",
    "rnn",
    "lstm_ln",
    "mingru",
    "minlstm",
    "lru",
    "s5",
    "s6",
    "ffm",
    "feed_forward",
]
"""Names of the cells that :func:`recurrent_module` makes."""

_LINEAR: dict[str, Callable[..., RecurrentModule]] = {
    "mingru": MinGRUModule,
    "minlstm": MinLSTMModule,
    "lru": LRUModule,
    "s5": S5Module,
    "s6": S6Module,
    "ffm": FFMModule,
}
_MODULES: dict[str, Callable[..., RecurrentModule]] = {
    **_LINEAR,
    "lstm": LSTMModule,
    "gru": GRUModule,
    "rnn": RNNModule,
    "lstm_ln": partial(CellModule, LAYER_NORM_LSTM_CELL),
    "feed_forward": partial(CellModule, FEED_FORWARD_CELL),
}


def recurrent_module(
    kind: str,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    dropout: float = 0.0,
    block: str | None = None,
    **arguments: Any,
) -> RecurrentModule:
    """Make a recurrent module by the name of its cell, so that a network changes it by one word.

    Args:
        kind: ``"lstm"``, ``"gru"``, ``"rnn"`` (Elman) or ``"lstm_ln"`` (an LSTM with layer
            normalization); a linear cell, whose time runs as a parallel scan: ``"mingru"``,
            ``"minlstm"``, ``"lru"``, ``"s5"``, ``"s6"`` (of Mamba) or ``"ffm"``; or
            ``"feed_forward"``, a layer without state, the baseline. ``docs/which_cell.md`` compares
            them.
        input_size: size ``I`` of the input.
        hidden_size: size ``H`` of the output.
        num_layers: number ``L`` of layers.
        dropout: probability of dropout between layers, in training.
        block: ``"residual"`` (the default of linear cells) puts each layer of a linear cell inside
            :class:`rnnkeys.cells.ResidualBlock`; ``"plain"`` is the cell alone.
        **arguments: of the module's class (``LSTMModule``, ``LRUModule``, ...): ``in_key=``,
            ``out_key=``, ``state_key=``, ...

    Raises:
        ValueError: if there is no such kind or block, or the cell of the block is not linear.

    Examples:
        >>> recurrent_module("lstm_ln", 3, 5, in_key="observation", out_key="embed").state_keys
        ('recurrent_state_h', 'recurrent_state_c')
        >>> recurrent_module("lru", 3, 5, max_radius=0.99, in_key="x", out_key="y").state_sizes
        (10,)
    """
    kinds = get_args(CellName)
    if kind not in kinds:
        raise ValueError(
            f"kind must be one of {', '.join(map(repr, kinds))}. Got {kind!r}; for a cell of your "
            "own use CellModule(cell, ...)."
        )
    arguments = {"num_layers": num_layers, "dropout": dropout, **arguments}
    if kind in _LINEAR:
        arguments["block"] = "residual" if block is None else block
    elif block not in (None, "plain"):
        raise ValueError(
            f"block must be 'plain', or 'residual' with one of the linear cells {list(_LINEAR)}. "
            f"Got block={block!r} with kind={kind!r}."
        )
    return _MODULES[kind](input_size, hidden_size, **arguments)


class DuelingHead(nn.Module):
    """Turn features ``[..., H]`` into a value for each action, ``[..., A]``.

    ``Q(a) = V + A(a) - mean(A)``; see "Dueling Network Architectures for Deep Reinforcement
    Learning", Wang et al., 2016 (arXiv:1511.06581).

    Args:
        input_size: ``H``.
        num_actions: ``A``.
        sizes: of the hidden layers of both branches.
        device: of the parameters.

    Examples:
        >>> DuelingHead(5, 2)(torch.zeros(3, 5)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        input_size: int,
        num_actions: int,
        sizes: Sequence[int] = (64,),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.value = _mlp(input_size, sizes, 1, device)
        self.advantage = _mlp(input_size, sizes, num_actions, device)

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        advantage = self.advantage(features)
        return self.value(features) + advantage - advantage.mean(-1, keepdim=True)


def drqn_policy(
    action_spec: TensorSpec,
    observation_shape: Sequence[int],
    *,
    cell: str = "lstm",
    hidden_size: int = 64,
    encoder: nn.Module | None = None,
    encoder_sizes: Sequence[int] = (128, 128),
    dueling: bool = True,
    head_sizes: Sequence[int] = (64,),
    in_key: NestedKey = "observation",
    action_mask_key: NestedKey | None = None,
    device: torch.device | str | None = None,
    **arguments: Any,
) -> TensorDictSequential:
    """Make a deep recurrent Q-network: encoder, recurrent layer, head, greedy action.

    See "Deep Recurrent Q-Learning for Partially Observable MDPs", Hausknecht and Stone, 2015
    (arXiv:1507.06527).

    Args:
        action_spec: of discrete actions, one-hot or categorical.
        observation_shape: of one observation. A vector ``(F,)`` is encoded by linear layers, frames
            ``(C, H, W)`` of at least 36 by 36 pixels, bytes or floats, by the three convolutions of
            "Human-level control through deep reinforcement learning", Mnih et al., 2015
            (https://doi.org/10.1038/nature14236).
        cell: name of the recurrent layer's cell, as in :func:`recurrent_module`, such as
            ``"lstm"`` or, for the feed-forward baseline, ``"feed_forward"``.
        hidden_size: of the recurrent layer.
        encoder: the encoder to use, instead of the one made from the shape. It maps observations
            ``[N, *observation_shape]`` to features ``[N, F]``, ``F`` the last of ``encoder_sizes``.
        encoder_sizes: of the linear layers before the recurrent layer (of frames: the last one
            only). ``()`` leaves them out.
        dueling: whether the head is dueling, or a plain network.
        head_sizes: of the head's hidden layers.
        in_key: key of the observation.
        action_mask_key: key of the action mask, bool ``[*, A]``. Actions where it is False are
            never chosen, and their values are the least number of the dtype. None: all are allowed.
        device: of the parameters.
        **arguments: for the recurrent module, as in :func:`recurrent_module`.

    Returns:
        A policy that reads ``in_key`` and the states, and writes ``"features"``, ``"embed"`` (the
        output of the recurrent layer, ``policy[1]``), ``"action_value"``, ``"action"`` and
        ``"chosen_action_value"``.

    Raises:
        ValueError: if the observation is neither a vector nor frames, or if no action is discrete.

    Examples:
        >>> from torchrl.data import OneHot
        >>> policy = drqn_policy(OneHot(2), (4,), hidden_size=8)
        >>> policy[1].state_keys
        ('recurrent_state_h', 'recurrent_state_c')
    """
    num_actions = _count_actions(action_spec)
    see, width = _make_encoder(encoder, observation_shape, encoder_sizes, device)
    keys = {"in_key": "features", "out_key": "embed", "device": device}
    recurrent = recurrent_module(cell, width, hidden_size, **{**keys, **arguments})
    if dueling:
        head: nn.Module = DuelingHead(hidden_size, num_actions, head_sizes, device)
    else:
        head = _mlp(hidden_size, head_sizes, num_actions, device)
    choose = QValueModule(spec=action_spec, action_mask_key=action_mask_key)
    choose_one_action(choose)
    modules: Any = (
        TensorDictModule(see, in_keys=[in_key], out_keys=["features"]),
        recurrent,
        TensorDictModule(head, in_keys=["embed"], out_keys=["action_value"]),
        choose,
    )
    return TensorDictSequential(*modules)


def _count_actions(spec: TensorSpec) -> int:
    # Subclasses of these that hold several actions.
    if not isinstance(spec, (OneHot, Categorical)) or isinstance(spec, (Binary, MultiOneHot)):
        raise ValueError(
            "drqn_policy chooses one of several discrete actions: action_spec must be OneHot or "
            f"Categorical. Got {spec}. For several actions at a time, list all their combinations "
            "as one discrete action."
        )
    return int(spec.space.n)


def _make_encoder(
    encoder: nn.Module | None,
    shape: Sequence[int],
    sizes: Sequence[int],
    device: torch.device | str | None,
) -> tuple[nn.Module, int]:
    if encoder is None and len(shape) not in (1, 3):
        raise ValueError(
            "observation_shape must be (features,) or (channels, height, width). Got "
            f"{tuple(shape)}: flatten the observation, or pass an encoder=."
        )
    if encoder is not None or len(shape) == 3:
        if not sizes:
            raise ValueError(
                "encoder_sizes must end with the size of the features. Got (), which leaves the "
                "encoder of a vector out; frames and an encoder= need one."
            )
        if encoder is None and min(shape[1:]) < 36:
            raise ValueError(
                "observation_shape of frames must be (channels, height, width), both at least 36. "
                f"Got {tuple(shape)}: enlarge frames, or pass an encoder=."
            )
        layers = encoder or ImageEncoder(shape, num_features=sizes[-1], device=device)
        return TimeDistributed(layers, len(shape)), sizes[-1]
    if not sizes:
        return nn.Identity(), shape[0]
    layers = _mlp(shape[0], sizes[:-1], sizes[-1], device)
    return nn.Sequential(layers, nn.ReLU()), sizes[-1]


class ImageEncoder(nn.Module):
    """Turn images ``[*, C, Y, X]`` into features, ``[*, F]``.

    See "Human-level control through deep reinforcement learning", Mnih et al., 2015
    (https://doi.org/10.1038/nature14236).

    Args:
        shape: ``(C, Y, X)`` of an image, at least 36 by 36. Bytes are divided by 255; floats stay
            as they are.
        ortho_init: make weights orthogonal and biases zero.
        num_features: ``F``.
        device: of the parameters.

    Examples:
        >>> ImageEncoder((1, 84, 84))(torch.zeros(2, 7, 1, 84, 84, dtype=torch.uint8)).shape
        torch.Size([2, 7, 512])
    """

    num_features = 512

    def __init__(
        self,
        shape: Sequence[int],
        ortho_init: bool = False,
        num_features: int = num_features,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.convolutions = ConvNet(
            in_features=shape[0],
            num_cells=[32, 64, 64],
            kernel_sizes=[8, 4, 3],
            strides=[4, 2, 1],
            activation_class=nn.ReLU,
            device=device,
        )
        with torch.no_grad():
            size = self.convolutions(torch.zeros(1, *shape, device=device)).shape[-1]
        self.linear = nn.Linear(size, num_features, device=device)
        if ortho_init:
            layers: list[Any] = [*self.convolutions, self.linear]
            for layer in layers:
                if hasattr(layer, "weight"):
                    nn.init.orthogonal_(layer.weight, math.sqrt(2))
                    nn.init.zeros_(layer.bias)

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        if not image.is_floating_point():
            image = image.to(self.linear.weight.dtype) / 255
        return self.linear(self.convolutions(image)).relu()


def _mlp(
    inputs: int, hidden: Sequence[int], outputs: int, device: torch.device | str | None
) -> MLP:
    return MLP(
        in_features=inputs,
        out_features=outputs,
        num_cells=list(hidden),
        activation_class=nn.ReLU,
        device=None if device is None else torch.device(device),
    )
