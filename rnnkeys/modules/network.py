"""A network with recurrent modules inside: their keys, and ways to run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.modules import QValueModule
from torchrl.objectives import LossModule
from torchrl.objectives.value import ValueEstimatorBase

from ..keys import as_tuple, next_key
from ..mode import set_recurrent_mode
from .recurrent import RecurrentModule
from .time_distributed import TimeDistributed

# Names under which distributions take an action mask.
_MASK_ARGUMENTS = ("mask", "action_mask")
# Modules that read all dimensions after the first as one observation.
_UNBATCHED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Flatten,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)


class RecurrentLayer(NamedTuple):
    """A recurrent module inside a network, and the keys that it works with.

    Attributes:
        module: the module, of this package or of TorchRL.
        init_key: key of the ``is_init`` flags that it reads.
        state_keys: keys of its recurrent states; the next states are at ``("next", key)``.
    """

    module: TensorDictModuleBase
    init_key: NestedKey
    state_keys: tuple[NestedKey, ...]

    @property
    def writes_states(self) -> bool:
        """Whether recurrent mode writes the state after every step; TorchRL's writes zeros."""
        return isinstance(self.module, RecurrentModule)


class RecurrentNetwork:
    """A network, the recurrent modules inside it, and their keys.

    Modules of this package and TorchRL's ``LSTMModule`` and ``GRUModule`` are found, each once,
    also inside losses and value estimators. Keys are read when the object is made.

    Args:
        network: a policy, a value network, a loss or any module that contains them.

    Attributes:
        network: the network that the methods run.
        layers: the recurrent modules inside, each with its keys.
        state_keys: keys of all recurrent states, each once.
        init_keys: keys of the ``is_init`` flags of all layers, each once.
        pairs: ``(state key, init key)`` for every recurrent state.

    Examples:
        >>> from rnnkeys import GRUModule
        >>> network = RecurrentNetwork(GRUModule(3, 5, in_key="observation", out_key="embed"))
        >>> network.pairs
        (('recurrent_state', 'is_init'),)
        >>> network.input_keys, network.output_keys
        (('observation',), ('embed', ('next', 'recurrent_state')))
        >>> network.initial_states([2])["recurrent_state"].shape
        torch.Size([2, 1, 5])
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.layers = tuple(_find_layers(network))
        self.pairs = tuple(
            dict.fromkeys((key, one.init_key) for one in self.layers for key in one.state_keys)
        )
        self.state_keys = tuple(dict.fromkeys(key for key, _ in self.pairs))
        # Also those of layers without state: they show where sequences start.
        self.init_keys = tuple(dict.fromkeys(one.init_key for one in self.layers))

    @property
    def modules(self) -> tuple[TensorDictModuleBase, ...]:
        """The recurrent modules inside."""
        return tuple(one.module for one in self.layers)

    @property
    def input_keys(self) -> tuple[NestedKey, ...]:
        """Keys that the network reads, without recurrent states and ``is_init`` flags."""
        network: Any = self.network
        recurrent = {*self.state_keys, *self.init_keys}
        keys = map(unravel_key, network.in_keys)
        return tuple(dict.fromkeys(key for key in keys if key not in recurrent))

    @property
    def output_keys(self) -> tuple[NestedKey, ...]:
        """Keys that any module inside writes, next states included."""
        written: dict[Any, None] = {}
        for one in find_networks(self.network):
            holds_networks = isinstance(one, (LossModule, ValueEstimatorBase))
            if isinstance(one, TensorDictModuleBase) and not holds_networks:
                written |= dict.fromkeys(map(unravel_key, one.out_keys))
        return tuple(written)

    @property
    def action_mask_keys(self) -> tuple[NestedKey, ...]:
        """Keys of action masks that value modules and distributions inside read, each once."""
        found: dict[Any, None] = {}
        for one in find_networks(self.network):
            if isinstance(one, QValueModule) and one.action_mask_key is not None:
                found[unravel_key(one.action_mask_key)] = None
            elif isinstance(one, ProbabilisticTensorDictModule):
                pairs: Any = zip(one.dist_keys, one.in_keys, strict=True)
                keys = [key for argument, key in pairs if as_tuple(argument)[-1] in _MASK_ARGUMENTS]
                found |= dict.fromkeys(map(unravel_key, keys))
        return tuple(found)

    def check_is_recurrent(self) -> None:
        """Raise if there is no recurrent module inside.

        Raises:
            ValueError: names the network.
        """
        if not self.layers:
            raise ValueError(
                f"There is no recurrent module inside {type(self.network).__name__}. Pass the "
                "network that contains an rnnkeys.LSTMModule, a GRUModule or another recurrent "
                "module."
            )

    def run_sequences(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run the network over whole sequences, on a shallow copy of the entries that it reads.

        Args:
            tensordict: sequences ``[*, T]``; it stays as it is.

        Returns:
            A TensorDict ``[*, T]`` with the entries that were read and those that were written.
        """
        with explain_encoder_errors(self.network, tensordict):
            return self._run(tensordict, recurrent_mode=True)

    def run_step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run the network for one time step, on a shallow copy of the entries that it reads.

        Args:
            tensordict: one step of a batch ``[*]``; it stays as it is.

        Returns:
            A TensorDict ``[*]`` with the entries that were read and those that were written.
        """
        return self._run(tensordict, recurrent_mode=False)

    def _run(self, tensordict: TensorDictBase, recurrent_mode: bool) -> TensorDictBase:
        keys = (*self.input_keys, *self.state_keys, *self.init_keys)
        with set_recurrent_mode(recurrent_mode):
            return self.network(tensordict.select(*keys, strict=False))

    def initial_states(
        self, batch_size: Any = (), example: TensorDictBase | None = None
    ) -> TensorDict:
        """Make the states that episodes start from.

        Args:
            batch_size: batch size of the result.
            example: one step with the entries of ``input_keys``, of any batch size. It is needed
                where states have dimensions of agents, which no module knows: the network runs
                once on it, without gradient.

        Returns:
            A TensorDict of zeros ``[*batch_size, *agents, L, H]``, one for each of ``state_keys``,
            in the dtype and on the device of the parameters.
        """
        states = TensorDict({}, batch_size)
        for key, zero in self._zeros(example).items():
            states.set(key, zero.expand(*states.batch_size, *zero.shape).clone())
        return states

    def _zeros(self, example: TensorDictBase | None) -> dict[Any, torch.Tensor]:
        """Return a zero for each state, without batch dimensions."""
        zeros: dict[Any, torch.Tensor] = {}
        if example is None:
            for module in self.modules:
                recurrent: Any = module
                primers = recurrent.make_tensordict_primer().primers
                zeros |= {unravel_key(k): v.zero() for k, v in primers.items(True, True)}
            return {key: zeros[key] for key in self.state_keys}
        step = example.exclude(*self.state_keys)
        for key in self.init_keys:
            step.set(key, torch.ones(*step.batch_size, 1, dtype=torch.bool, device=step.device))
        with torch.no_grad():
            written = self.run_step(step)
        for key in self.state_keys:
            shape = written.get(next_key(key)).shape[step.ndim :]
            zeros[key] = written.get(next_key(key)).new_zeros(shape)
        return zeros


def find_networks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield every module inside, once; losses and estimators keep networks outside ``modules()``.

    Examples:
        >>> from torchrl.objectives.value import TD0Estimator
        >>> net = nn.Linear(1, 1)
        >>> net in list(find_networks(TD0Estimator(gamma=0.9, value_network=net)))
        True
    """
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        for one in waiting.pop().modules():
            if id(one) in seen:
                continue
            seen.add(id(one))
            yield one
            if isinstance(one, (LossModule, ValueEstimatorBase)):
                waiting += [v for v in vars(one).values() if isinstance(v, nn.Module)]


def _find_layers(module: nn.Module) -> Iterator[RecurrentLayer]:
    for one in find_networks(module):
        # TorchRL's recurrent modules share no base class, but all have this property.
        if isinstance(one, TensorDictModuleBase) and hasattr(one, "recurrent_mode"):
            init_key = unravel_key(getattr(one, "init_key", "is_init"))
            yield RecurrentLayer(one, init_key, _state_keys(one))


def _state_keys(module: TensorDictModuleBase) -> tuple[NestedKey, ...]:
    """Return the keys that are read and whose ``("next", key)`` is written."""
    if isinstance(module, RecurrentModule):
        return module.state_keys
    written = set(map(unravel_key, module.out_keys))
    return tuple(key for key in map(unravel_key, module.in_keys) if next_key(key) in written)


@contextmanager
def explain_encoder_errors(network: nn.Module, batch: TensorDictBase) -> Iterator[None]:
    """Add the remedy to the error of an encoder that does not take sequences ``[B, T, ...]``.

    Args:
        network: a policy, a network or a loss that runs in the block.
        batch: sequences that it runs on.

    Raises:
        RuntimeError: in place of an error of the block, if the batch has more than one dimension
            and the network has an encoder that takes one.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        names = _find_unbatched(network) if batch.ndim > 1 else []
        if not names:
            raise
        raise RuntimeError(
            f"The network has {', '.join(names)}, which takes one batch dimension. In recurrent "
            f"mode an encoder gets [B, T, ...], here {list(batch.batch_size)} and the observation. "
            "Wrap the encoder: rnnkeys.TimeDistributed(encoder, observation_ndim=3) for frames (C, "
            f"H, W). [encoder-time] The error was: {error}"
        ) from error


def _find_unbatched(network: nn.Module) -> list[str]:
    """Return the names of encoders' classes that take one batch dimension and are not wrapped."""
    wrapped: set[int] = set()
    found: dict[str, None] = {}
    for module in find_networks(network):
        handles_time: Any = isinstance(module, TimeDistributed) or (
            # TorchRL's networks fold leading dimensions.
            type(module).__module__.startswith("torchrl.modules.models")
        )
        if handles_time:
            wrapped |= {id(inner) for inner in module.modules()}
        elif isinstance(module, _UNBATCHED) and id(module) not in wrapped:
            found[type(module).__name__] = None
    return list(found)
