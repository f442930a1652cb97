"""One line that makes a TorchRL loss, or value estimator, right for recurrent networks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from tensordict import TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torchrl.objectives import LossModule
from torchrl.objectives.value import ValueEstimatorBase

from ..checks import find_shared_key_problems, raise_first
from ..checks.losses import find_loss_problems
from ..modules.tied_actions import choose_one_action
from .loss_inputs import keep_dropped_keys
from .loss_parameters import find_parameters
from .padded_losses import choose_wired_base
from .wiring import Wired, make_wiring

Loss = TypeVar("Loss", LossModule, ValueEstimatorBase)


def recurrent_loss(loss: Loss, init_key: NestedKey | list[NestedKey] | None = None) -> Loss:
    """Wire a TorchRL loss or value estimator for recurrent networks, so that its targets are right.

    Called with a batch of sequences, ``[*, T]`` or slices laid end to end ``[N]``, the wired loss

    - checks the batch, and raises where it cannot be right, with the reason and the remedy
      (``docs/what_is_checked.md``);
    - runs in recurrent mode (losses do so by themselves, estimators do not);
    - flags segment starts in ``next`` too, so that each segment there starts from the state stored
      at ``("next", state)``;
    - ends returns where a segment ends, with or without ``done``;
    - values one action where several have the greatest value (``QValueModule`` takes all of them);
    - runs on a shallow copy: the batch stays as it is, except for the results of the loss
      (priorities, advantages, value targets);
    - keeps the states that the loss would drop (TD3, REDQ and IQL those of the critic, SAC with a
      value network those of the others); where they are not stored, they are zero;
    - keeps padding, where ``("collector", "mask")`` is False, out of losses, gradients, normalized
      advantages and reported figures.

    Args:
        loss: any ``LossModule``, or a ``ValueEstimatorBase`` such as ``GAE``. Wire it before
            ``torch.compile``.
        init_key: key of the ``is_init`` flags, or a list of keys; by default those that the
            recurrent modules inside read.

    Returns:
        The same object, wired in place. Its class becomes a subclass of the former one. Parameters,
        target parameters, ``state_dict``, ``set_keys``, ``make_value_estimator`` and target
        updaters are untouched; copies and pickles stay wired. A wired loss is returned as it is.

    Raises:
        TypeError: if it is neither a loss nor a value estimator.
        ValueError: if nothing inside is recurrent, or if the loss cannot be right.

    Warns:
        UserWarning: if two networks with parameters of their own, such as an actor and a critic,
            keep their states under one key.

    Examples:
        >>> import torch
        >>> from rnnkeys import GRUModule
        >>> from tensordict.nn import TensorDictModule, TensorDictSequential
        >>> from torchrl.modules import QValueModule
        >>> from torchrl.objectives import DQNLoss
        >>> policy = TensorDictSequential(
        ...     GRUModule(4, 8, in_key="observation", out_key="embed"),
        ...     TensorDictModule(torch.nn.Linear(8, 2), ["embed"], ["action_value"]),
        ...     QValueModule(action_space="categorical"),
        ... )
        >>> loss = recurrent_loss(DQNLoss(policy, action_space="categorical"))
        >>> isinstance(loss, DQNLoss)
        True
    """
    if not isinstance(loss, (LossModule, ValueEstimatorBase)):
        raise TypeError(
            "recurrent_loss expects a LossModule or a ValueEstimatorBase of torchrl.objectives. "
            f"Got {type(loss).__name__}: wire a loss before it is compiled or wrapped."
        )
    if isinstance(loss, Wired):
        return loss
    wiring = make_wiring(loss, init_key)
    if not wiring.layers and init_key is None:
        raise ValueError(
            f"There is no recurrent module inside {type(loss).__name__}, so there is nothing to "
            "wire. Expected an LSTMModule or GRUModule in one of its networks. For recurrent "
            "modules of your own, name their flags with init_key=."
        )
    raise_first(find_loss_problems(loss, wiring.layers))
    shared = find_shared_key_problems(str(type(loss).__name__), find_parameters(loss))
    raise_first(replace(problem, error=UserWarning) for problem in shared)
    keep_dropped_keys(loss)
    choose_one_action(loss)
    loss.__class__ = _wired_class(type(loss))
    # Not by setattr, which for modules looks through parameters first.
    vars(loss)["_wiring"] = wiring
    return loss


@functools.cache
def _wired_class(base: Any) -> Any:
    """Make the subclass of a loss whose methods that take a batch prepare it first."""
    metaclass: Any = type(base)
    name = f"Recurrent{base.__name__}"
    namespace = {"__doc__": base.__doc__, "__module__": __name__, "__reduce_ex__": _reduce}
    wired = metaclass(name, (choose_wired_base(base), base), {**namespace, "wired_class": base})
    for method_name in dir(base):
        method = inspect.getattr_static(wired, method_name)
        if _takes_batch(method_name, method):
            setattr(wired, method_name, _wire_method(method_name, method))
    return wired


def _takes_batch(name: str, method: Any) -> bool:
    """Whether a method is one that users call with a batch: ``forward``, ``actor_loss``, ..."""
    if not inspect.isfunction(method) or name.startswith("_"):
        return False
    arguments = list(inspect.signature(method).parameters)
    takes_batch = len(arguments) > 1 and arguments[1] in ("tensordict", "input_tensordict")
    named = name in ("forward", "value_estimate") or "loss" in name.split("_")
    return named and takes_batch


def _wire_method(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, tensordict: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tensordict, TensorDictBase):
            return method(self, tensordict, *args, **kwargs)
        return self.call_wired(method, tensordict, args, kwargs)

    batch = list(inspect.signature(method).parameters)[1]
    # Entries that are passed one by one are gathered to a batch first.
    gather: Any = dispatch
    return gather(call) if name == "forward" and batch == "tensordict" else call


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle a wired loss as its class before wiring, and its state."""
    _, _, *state = object.__reduce_ex__(self, protocol)
    return (_new_wired, (self.wired_class,), *state)


def _new_wired(base: Any) -> Any:
    wired = _wired_class(base)
    return wired.__new__(wired)
