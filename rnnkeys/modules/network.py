"""A network with recurrent modules inside: their keys, and ways to run it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.modules import QValueModule
from torchrl.objectives import LossModule
from torchrl.objectives.value import ValueEstimatorBase

from ..checks import RecurrentLayer as RecurrentLayer
from ..keys import as_tuple, next_key
from ..mode import set_recurrent_mode
from ..sequences import find_segment_starts, shift_states
from .network_errors import explain_network_errors
from .recurrent import RecurrentModule
from .submodules import find_networks

# Names under which distributions take an action mask.
_MASK_ARGUMENTS = ("mask", "action_mask")


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
        if not isinstance(network, nn.Module):
            raise TypeError(f"Expected a network, an nn.Module. Got {network!r}. [network]")
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
        with explain_network_errors(self.network, tensordict), set_recurrent_mode(recurrent_mode):
            return self.network(tensordict.select(*keys, strict=False))

    @torch.no_grad()
    def recompute_states(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return a shallow copy of sequences with the states that the network computes now.

        Args:
            tensordict: sequences ``[*, T]``; segments start from the states stored there, or from
                zeros.
        """
        out = self.run_sequences(tensordict)
        fresh = tensordict.copy()
        for key, init_key in self.pairs:
            after = out.get(next_key(key))
            stored = tensordict.get(key, None)
            stored = torch.zeros_like(after) if stored is None else stored
            starts = find_segment_starts(tensordict, init_key)
            fresh.set(key, shift_states(after, stored, starts, tensordict.ndim - 1))
            fresh.set(next_key(key), after)
        return fresh

    def initial_states(
        self, batch_size: Any = (), example: TensorDictBase | None = None
    ) -> TensorDict:
        """Make the states that episodes start from.

        Args:
            batch_size: batch size of the result.
            example: one step with the entries of ``input_keys``, of any batch size, on which the
                network runs once, without gradient. It is needed where states have dimensions of
                agents, which no module contains.

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


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, without gradient; the mode of each module inside is restored."""
    training = {one: one.training for one in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for one, mode in training.items():
            one.training = mode


def _find_layers(module: nn.Module) -> Iterator[RecurrentLayer]:
    for one in find_networks(module):
        # TorchRL's recurrent modules share no base class, but all have this property.
        if isinstance(one, TensorDictModuleBase) and hasattr(one, "recurrent_mode"):
            init_key = unravel_key(getattr(one, "init_key", "is_init"))
            is_own = isinstance(one, RecurrentModule)
            yield RecurrentLayer(one, init_key, _state_keys(one), writes_states=is_own)


def _state_keys(module: TensorDictModuleBase) -> tuple[NestedKey, ...]:
    """Return the keys that are read and whose ``("next", key)`` is written."""
    if isinstance(module, RecurrentModule):
        return module.state_keys
    written = set(map(unravel_key, module.out_keys))
    return tuple(key for key in map(unravel_key, module.in_keys) if next_key(key) in written)


def as_networks(networks: Any) -> tuple[RecurrentNetwork, ...]:
    """Return one network or several as a tuple.

    Args:
        networks: a network, or a sequence of networks.

    Raises:
        TypeError: if it is anything else.

    Examples:
        >>> as_networks(None)
        Traceback (most recent call last):
        TypeError: networks must be an nn.Module or a sequence of them. Got None. [network]
    """
    listed = [networks] if isinstance(networks, nn.Module) else networks
    if not isinstance(listed, (Sequence, nn.ModuleList)) or not all(
        isinstance(one, nn.Module) for one in listed
    ):
        raise TypeError(
            f"networks must be an nn.Module or a sequence of them. Got {networks!r}. [network]"
        )
    return tuple(map(RecurrentNetwork, listed))
