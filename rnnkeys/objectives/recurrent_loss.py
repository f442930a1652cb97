"""One line that makes a TorchRL loss, or value estimator, right for recurrent networks."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.nn import TensorDictSequential, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torch.compiler import is_compiling
from torchrl.objectives import (
    A2CLoss,
    DistributionalDQNLoss,
    IQLLoss,
    LossModule,
    PPOLoss,
    REDQLoss,
    ReinforceLoss,
    SACLoss,
    TD3BCLoss,
    TD3Loss,
)
from torchrl.objectives.common import AUTO_LOSS_MASK_KEYS
from torchrl.objectives.value import ValueEstimatorBase

from ..checks.losses import refuse_batch, refuse_estimator, refuse_loss, refuse_parts, refuse_values
from ..keys import MASK_KEY, as_keys, next_key
from ..mode import set_recurrent_mode
from ..modules.network import Recurrent, find_outputs, find_recurrent
from ..sequences.masks import zero_masked
from ..sequences.segment_starts import set_next_is_init

Loss = TypeVar("Loss", LossModule, ValueEstimatorBase)

# Losses that cut a batch down to the first network's inputs before others run on what is left.
_CUTS: tuple[tuple[tuple[type[LossModule], ...], str, tuple[str, ...]], ...] = (
    ((TD3Loss, TD3BCLoss, REDQLoss, IQLLoss), "actor_network", ("qvalue_network",)),
    ((SACLoss,), "value_network", ("actor_network", "qvalue_network")),
)


def recurrent_loss(loss: Loss, init_key: NestedKey | list[NestedKey] | None = None) -> Loss:
    """Wire a TorchRL loss or value estimator for recurrent networks, so that its targets are right.

    Called with a batch of sequences, flat ``[N]`` or ``[*, T]``, the wired loss

    - marks in the next view where segments start, so that it runs from the states stored there;
    - runs on a shallow copy: the batch stays as it was, but for what the loss itself writes
      (priorities, advantages, value targets);
    - puts zeros where ``("collector", "mask")`` is False, so that not even a NaN gets out of there;
    - keeps the states that the loss would cut away (TD3, REDQ and IQL: the critic's; SAC with a
      value network: the others');
    - runs in recurrent mode (losses do by themselves, estimators do not);
    - raises where it cannot be right, with the reason and the way out.

    Args:
        loss: any ``LossModule``, or a ``ValueEstimatorBase`` such as ``GAE``. Wire it before
            ``torch.compile``.
        init_key: key of the marks, or a list of keys; by default those that the recurrent modules
            inside read.

    Returns:
        The same object, wired in place. Its class becomes a subclass of what it was; parameters,
        target parameters, ``state_dict``, ``set_keys``, ``make_value_estimator`` and target
        updaters are untouched, copies and pickles stay wired. A wired loss is returned as it is.

    Raises:
        TypeError: if it is no loss and no value estimator.
        ValueError: if nothing inside is recurrent, or if the loss cannot be right.

    Examples:
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
            f"Got {type(loss).__name__}; wire a loss before it is compiled or wrapped."
        )
    if isinstance(loss, Wired):
        return loss
    recurrent = find_recurrent(loss)
    if not recurrent and init_key is None:
        raise ValueError(
            f"There is no recurrent module inside {type(loss).__name__}, so there is nothing to "
            "wire. Expected an LSTMModule or GRUModule in one of its networks; for recurrent "
            "modules of your own, name their marks with init_key=."
        )
    refuse_loss(loss, recurrent)
    _keep_cut_keys(loss)
    base = type(loss)
    loss.__class__ = _wired_class(base)
    vars(loss)["_wiring"] = _make_wiring(loss, recurrent, init_key)
    return loss


@dataclass
class _Wiring:
    """What a wired loss knows: no parameters, nothing that a ``state_dict`` would hold."""

    recurrent: list[Recurrent]
    init_keys: list[NestedKey]
    outputs: set[Any]
    checked: bool = False
    active: bool = field(default=False)


def _make_wiring(
    loss: LossModule | ValueEstimatorBase,
    recurrent: list[Recurrent],
    init_key: NestedKey | list[NestedKey] | None,
) -> _Wiring:
    found: dict[NestedKey, None] = {unravel_key(one.init_key): None for one in recurrent}
    keys = list(found) if init_key is None else as_keys(init_key)
    return _Wiring(recurrent, keys, find_outputs(loss))


def find_cut_keys(loss: Any) -> list[NestedKey]:
    """Return what a loss cuts away from a batch although one of its networks reads it.

    Examples:
        >>> from torchrl.objectives.value import TD0Estimator
        >>> find_cut_keys(TD0Estimator(gamma=0.9, value_network=None))
        []
    """
    return [key for _, keys in _find_cuts(loss) for key in keys]


def _find_cuts(loss: Any) -> Iterator[tuple[str, list[NestedKey]]]:
    """Yield the names of networks that a batch is cut down to, and what others miss then."""
    for kinds, first, others in _CUTS:
        network = getattr(loss, first, None)
        if network is None or not isinstance(loss, kinds):
            continue
        held = [unravel_key(key) for key in (*network.in_keys, *network.out_keys)]
        wanted = (unravel_key(key) for other in others for key in getattr(loss, other).in_keys)
        keys: Any = loss.tensor_keys
        action = unravel_key(keys.action)
        yield first, [key for key in dict.fromkeys(wanted) if key not in held and key != action]


def _keep_cut_keys(loss: Any) -> None:
    for name, cut in _find_cuts(loss):
        if cut:
            vars(loss)[name] = _with_in_keys(loss, name, getattr(loss, name), cut)
            loss._set_in_keys()


def _keep_masks(loss: Any, tensordict: TensorDictBase) -> None:
    """Keep the masks that IQL cuts away before its critic's loss looks for them."""
    named = loss.loss_mask_key
    keys = AUTO_LOSS_MASK_KEYS if named == "auto" else () if named is None else (named,)
    network = loss.actor_network
    there = [key for key in keys if tensordict.get(key, None) is not None]
    lost = [key for key in map(unravel_key, there) if key not in network.in_keys]
    if lost:
        vars(loss)["actor_network"] = _with_in_keys(loss, "actor_network", network, lost)


def _with_in_keys(loss: Any, name: str, network: Any, keys: list[NestedKey]) -> Any:
    """Return a view of a network (same submodules) whose ``in_keys`` name more entries to keep."""
    if not isinstance(network, TensorDictSequential):
        raise ValueError(
            f"{type(loss).__name__} would cut away the entries {keys} that its other networks "
            f"read. To keep them, its {name} must be a TensorDictSequential; got "
            f"{type(network).__name__}: wrap it, TensorDictSequential({name})."
        )
    view: Any = copy.copy(network)
    view.in_keys = [*network.in_keys, *keys]
    return view


class Wired:
    """Marks a class made by :func:`recurrent_loss`, and lets its instances be pickled."""

    _wired_base: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)  # pyright: ignore[reportGeneralTypeIssues]
        return (_new_wired, (self._wired_base,), *state)


def _new_wired(base: Any) -> Any:
    wired = _wired_class(base)
    return wired.__new__(wired)


@functools.cache
def _wired_class(base: Any) -> Any:
    """Make the subclass whose every way in marks the batch first."""
    entries = {
        name: _marking(name, method)
        for name in dir(base)
        if _is_entry(name, method := inspect.getattr_static(base, name))
    }
    namespace = {"_wired_base": base, "__doc__": base.__doc__, "__module__": __name__, **entries}
    return type(base)(f"Recurrent{base.__name__}", (Wired, base), namespace)


def _is_entry(name: str, method: Any) -> bool:
    """Whether a method is one that people call with a batch: ``forward``, ``actor_loss``, ..."""
    if not inspect.isfunction(method) or name.startswith("_"):
        return False
    arguments = list(inspect.signature(method).parameters)
    takes_batch = len(arguments) > 1 and arguments[1] in ("tensordict", "input_tensordict")
    named = name in ("forward", "value_estimate") or "loss" in name.split("_")
    return named and takes_batch


def _marking(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, tensordict: Any, *args: Any, **kwargs: Any) -> Any:
        if self._wiring.active or not isinstance(tensordict, TensorDictBase):
            return method(self, tensordict, *args, **kwargs)
        return _run(self, method, tensordict, args, kwargs)

    batch = list(inspect.signature(method).parameters)[1]
    # Entries that are passed one by one are gathered before the batch is marked.
    gather: Any = dispatch
    return gather(call) if name == "forward" and batch == "tensordict" else call


def _run(
    loss: Any, method: Callable[..., Any], tensordict: TensorDictBase, args: Any, kwargs: Any
) -> Any:
    wiring = loss._wiring
    marked = _prepare(loss, wiring, tensordict)
    flat = isinstance(loss, DistributionalDQNLoss) and marked.ndim > 1
    if flat:
        marked = _lay_end_to_end(marked, wiring.init_keys)
    before = marked.copy()
    wiring.active = True
    try:
        with set_recurrent_mode(True):
            result = method(loss, marked, *args, **kwargs)
    finally:
        wiring.active = False
    own = _value_keys(loss) if isinstance(loss, ValueEstimatorBase) else ()
    _hand_back(wiring.outputs.difference(own), before, marked, tensordict)
    return tensordict if result is marked else result


def _prepare(loss: Any, wiring: _Wiring, tensordict: TensorDictBase) -> TensorDictBase:
    refuse_estimator(loss)
    # Elsewhere than on the CPU a look at values waits for the device, so the first look must do.
    look = not is_compiling() and (not wiring.checked or _on_cpu(tensordict, wiring))
    if look:
        refuse_values(loss, tensordict)
        refuse_parts(loss, tensordict, wiring.init_keys)
    refuse_batch(loss, tensordict, wiring.recurrent)
    mask = tensordict.get(MASK_KEY, None)
    if isinstance(loss, IQLLoss) and not is_compiling():
        _keep_masks(loss, tensordict)
    if mask is not None:
        # What is finite stays: torchrl's losses report ratios and values of masked steps too.
        mask = mask.reshape(tensordict.batch_size)
        tensordict = zero_masked(tensordict, mask, finite=False)
    if tensordict.get("next", None) is None:
        wiring.checked = wiring.checked or look
        return tensordict.copy()
    marked = set_next_is_init(tensordict, wiring.init_keys, check=look)
    wiring.checked = wiring.checked or look
    _mark_ends(loss, marked, wiring.init_keys, mask)
    _drop_lone_values(loss, marked)
    return marked


def _mark_ends(
    loss: Any, marked: TensorDictBase, init_keys: list[NestedKey], mask: Tensor | None
) -> None:
    """End the returns of a segment where the next one starts, or where masked steps do.

    A sampler with ``truncated_key=None`` leaves no ``done`` at the end of a slice, and neither does
    what pads one that was merely cut; TD(lambda), TD(1) and GAE would add the rewards of whatever
    lies behind it.
    """
    time = marked.ndim - 1
    key = next_key(unravel_key(getattr(loss.tensor_keys, "done", "done")))
    done = marked.get(key, None)
    if done is None or marked.shape[time] < 2 or getattr(loss, "auto_reset_env", False):
        return
    terminated = next_key(unravel_key(getattr(loss.tensor_keys, "terminated", "terminated")))
    if marked.get(terminated, None) is None:
        marked.set(terminated, done)
    starts = [marked.get(one).flatten(marked.ndim).any(-1) for one in init_keys]
    ends = torch.stack(starts).any(0).narrow(time, 1, marked.shape[time] - 1)
    if mask is not None:
        ends = ends | (mask[..., :-1] & ~mask[..., 1:])
    ends = torch.cat([ends, torch.zeros_like(ends.narrow(time, 0, 1))], time)
    marked.set(key, done | ends.reshape(*ends.shape, *[1] * (done.ndim - ends.ndim)))


def _drop_lone_values(loss: Any, marked: TensorDictBase) -> None:
    """Drop a value that was stored in one view only: both are worked out anew, stacked."""
    keys = loss.tensor_keys
    if isinstance(loss, ValueEstimatorBase):
        works_out = loss.value_network is not None and not loss.skip_existing
    else:
        makes = isinstance(loss, (A2CLoss, PPOLoss, ReinforceLoss))
        works_out = makes and marked.get(keys.advantage, None) is None
    if works_out:
        stored = [key for key in _value_keys(loss) if marked.get(key, None) is not None]
        if len(stored) == 1:
            marked.del_(stored[0])


def _on_cpu(tensordict: TensorDictBase, wiring: _Wiring) -> bool:
    marks = tensordict.get(wiring.init_keys[0], None)
    return marks is None or marks.device.type == "cpu"


def _lay_end_to_end(tensordict: TensorDictBase, init_keys: list[NestedKey]) -> TensorDictBase:
    """Flatten ``[*, T]`` to ``[N]`` for a loss that takes nothing else; rows' starts are marked."""
    time = tensordict.ndim - 1
    for key in init_keys:
        marks = tensordict.get(key).clone()
        marks.select(time, 0).fill_(True)
        tensordict.set(key, marks)
    return tensordict.reshape(-1)


def _hand_back(
    not_its_own: set[Any],
    before: TensorDictBase,
    after: TensorDictBase,
    tensordict: TensorDictBase,
) -> None:
    """Give the caller what the loss wrote, and neither the marks nor what its networks wrote."""
    for key, value in after.items(True, True):
        if key in not_its_own or value is before.get(key, None):
            continue
        if after.shape != tensordict.shape:
            value = value.reshape(*tensordict.shape, *value.shape[1:])
        tensordict.set(key, value)


def _value_keys(loss: Any) -> tuple[NestedKey, NestedKey]:
    key = unravel_key(loss.tensor_keys.value)
    return key, next_key(key)
