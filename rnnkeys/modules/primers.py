"""Transforms that create recurrent states at resets and flag episode starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import nn
from torch.compiler import is_compiling
from torchrl.data import Composite, Unbounded
from torchrl.envs.transforms import InitTracker, TensorDictPrimer, Transform

from .._compat import NestableCompose
from ..checks import warn_caller
from ..mode import recurrent_mode


class StatePrimer(TensorDictPrimer):
    """Create zero states at every reset, one per agent where the environment has agents.

    Args:
        shapes: for every state key its shape without batch and agents, ``(L, H)``.
        dtype: of the states.
        device: of the states; the environment's once appended to one that has a device.

    Examples:
        >>> StatePrimer({("agents", "h"): (1, 5)}).primers["agents", "h"].shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        shapes: Mapping[NestedKey, tuple[int, ...]],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.shapes = {unravel_key(key): tuple(shape) for key, shape in shapes.items()}
        self.state_dtype = dtype
        self._fitted = False
        super().__init__(_specs(self.shapes, {}, dtype, device), expand_specs=True)

    def set_container(self, container: Any) -> None:
        """Attach the transform; shapes are then read from the new environment."""
        super().set_container(container)
        self._fitted = False

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Add the states to the specs, those of observations and those of inputs alike."""
        self._fit()
        return super().transform_observation_spec(observation_spec)

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        # Agents need no batch, and a reset may come before the specs are read.
        if not self._fitted:
            self._fit()
        return super()._reset(tensordict, tensordict_reset)

    def _expand_shape(self, spec: Composite) -> Composite:
        self._fit()
        return self.primers

    def _fit(self) -> None:
        """Give the specs the environment's batch and, for nested keys, their group's agents."""
        parent = self.parent
        if parent is None:
            return
        env_spec = parent.observation_spec
        batch = parent.batch_size
        groups = {_group(key) for key in self.shapes}
        agents = {group: _agents(env_spec, group, batch) for group in groups if group}
        # The spec's device may have become the environment's since construction.
        device = None if self.primers.device is None else torch.device(self.primers.device)
        fresh = _specs(self.shapes, agents, self.state_dtype, device)
        self.primers = fresh.expand((*batch, *fresh.shape)) if batch else fresh
        # Where agents end at different times, their own reset entry applies.
        self.reset_key = _reset_key(parent._filtered_reset_keys, groups)
        self._fitted = True


class SingleSteps(NestableCompose):
    """Transforms of an environment whose policy is recurrent.

    They warn if the environment runs in recurrent mode, in which a policy takes the batch of
    environments for time.
    """

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        _warn_in_recurrent_mode()
        return super()._reset(tensordict, tensordict_reset)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        _warn_in_recurrent_mode()
        return super()._step(tensordict, next_tensordict)


def _specs(
    shapes: Mapping[NestedKey, tuple[int, ...]],
    agents: Mapping[tuple[str, ...], tuple[int, ...]],
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> Composite:
    spec = Composite(device=device)
    for group, dims in agents.items():
        spec[group] = Composite(shape=torch.Size(dims), device=device)
    for key, shape in shapes.items():
        dims = agents.get(_group(key), ())
        spec[key] = Unbounded(shape=torch.Size((*dims, *shape)), dtype=dtype, device=device)
    return spec


def _group(key: NestedKey) -> tuple[str, ...]:
    return () if isinstance(key, str) else tuple(str(part) for part in key[:-1])


def _reset_key(
    reset_keys: Iterable[NestedKey], groups: Iterable[tuple[str, ...]]
) -> NestedKey | None:
    """Return the innermost reset key that covers all groups; None if there is none."""
    ruling = [
        key
        for key in reset_keys
        if all(group[: len(_group(key))] == _group(key) for group in groups)
    ]
    return max(ruling, key=lambda key: len(_group(key)), default=None)


def _agents(spec: Composite, group: tuple[str, ...], batch: torch.Size) -> tuple[int, ...]:
    try:
        nested = spec[group]
    except KeyError:
        return ()
    return tuple(nested.shape[len(batch) :])


def get_primers_from_module(
    module: nn.Module, warn: bool = True, strict: bool = True
) -> Transform | None:
    """Make the transforms that create the state of every recurrent module inside ``module``.

    Warns if two modules with parameters of their own keep their state under the same keys.

    Args:
        module: a policy, or any module; every submodule with ``make_tensordict_primer()`` counts,
            TorchRL's too.
        warn: whether to warn if there is none.
        strict: whether an error of a submodule's primer propagates; otherwise it becomes a warning
            and the primers of the others are returned.

    Returns:
        None, one primer, or a ``Compose`` of several. A state shared by two modules is created
        once.

    Raises:
        ValueError: if two modules want states of different shapes under one key.

    Examples:
        >>> from rnnkeys import GRUModule
        >>> policy = GRUModule(3, 5, in_key="observation", out_key="embed")
        >>> get_primers_from_module(policy).primers["recurrent_state"].shape
        torch.Size([1, 5])
    """
    primers = list(_distinct(_find_primers(module, strict)))
    if not primers:
        if warn:
            warn_caller("No primers found in the module.")
        return None
    return primers[0] if len(primers) == 1 else _compose(*primers)


def _compose(*transforms: Any) -> SingleSteps:
    # Typed apart: torchrl annotates the starred argument as if it were the list.
    return SingleSteps(*transforms)


def make_primer(
    shapes: Mapping[NestedKey, tuple[int, ...]],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> TensorDictPrimer:
    """Make a primer of zero states: TorchRL's own unless a key is nested, so may have agents.

    Args:
        shapes: for every state key its shape without batch and agents, ``(L, H)``.
        dtype: of the states.
        device: of the states.

    Examples:
        >>> type(make_primer({"h": (1, 5)})).__name__
        'TensorDictPrimer'
    """
    if any(map(_group, shapes)):
        return StatePrimer(shapes, dtype=dtype, device=device)
    return TensorDictPrimer(_specs(shapes, {}, dtype, device), expand_specs=True)


def _warn_in_recurrent_mode() -> None:
    if not is_compiling() and recurrent_mode():
        warn_caller(
            "An environment runs inside set_recurrent_mode(True), in which a policy takes a batch "
            "of environments for the steps of one sequence. Run it in single steps: with "
            "set_recurrent_mode(False): env.rollout(...). Losses enter recurrent mode themselves. "
            "[mode]"
        )


def _find_primers(module: nn.Module, strict: bool) -> Iterator[tuple[nn.Module, Any]]:
    failures = set()
    for submodule in module.modules():
        make = getattr(submodule, "make_tensordict_primer", None)
        if make is None:
            continue
        try:
            yield submodule, make()
        except Exception as error:
            if strict:
                raise
            failures.add(f"{type(submodule).__name__}: {error}")
    if failures:
        warn_caller(
            f"No primer could be made for: {'; '.join(sorted(failures))}. Configure these modules, "
            "or append their primers by hand."
        )


def _distinct(primers: Iterator[tuple[nn.Module, Any]]) -> Iterator[Transform]:
    """Leave out primers whose keys an earlier one creates, all with the same shapes."""
    shapes: dict[NestedKey, torch.Size] = {}
    owners: dict[NestedKey, nn.Module] = {}
    for module, primer in primers:
        wanted = {key: spec.shape for key, spec in primer.primers.items(True, True)}
        if not wanted:
            continue  # a feed-forward layer has no state
        for key, shape in wanted.items():
            if shapes.setdefault(key, shape) != shape:
                raise ValueError(
                    f"Two modules keep a state under {key!r}, of shapes {tuple(shapes[key])} and "
                    f"{tuple(shape)}: each would overwrite the other's. Give one of them other "
                    "state keys (in_keys and out_keys)."
                )
        if not wanted.keys() <= owners.keys():
            yield primer
        else:
            _check_shared(next(iter(wanted)), module, owners)
        owners = dict.fromkeys(wanted, module) | owners


def _check_shared(key: NestedKey, module: nn.Module, owners: Mapping[NestedKey, nn.Module]) -> None:
    """Warn if two modules with different parameters keep their states under one key."""
    one, other = (set(map(id, m.parameters())) for m in (module, owners[key]))
    if one != other:
        warn_caller(
            f"Two modules with parameters of their own, {type(owners[key]).__name__} and "
            f"{type(module).__name__}, keep their state under {key!r}: where both run, each "
            "overwrites the other's. Give one of them other state keys (in_keys and out_keys)."
        )


def get_env_transforms_from_module(
    module: nn.Module, init_key: NestedKey | None = None
) -> Transform:
    """Make the transforms that an environment needs for a recurrent policy.

    They write the ``is_init`` flags and create the recurrent states. They may be composed with
    other transforms: ``Compose(get_env_transforms_from_module(policy), RewardSum())``.

    Args:
        module: the policy.
        init_key: key of the flags; by default the one that the modules inside read (``"is_init"``
            if there is none).

    Returns:
        ``Compose(InitTracker, primers)``, or the bare ``InitTracker`` for a module without state.

    Examples:
        >>> from rnnkeys import GRUModule
        >>> policy = GRUModule(3, 5, in_key="observation", out_key="embed")
        >>> [type(t).__name__ for t in get_env_transforms_from_module(policy)]
        ['InitTracker', 'TensorDictPrimer']
    """
    keys = [init_key] if init_key is not None else _init_keys(module)
    # InitTracker writes beside every done entry, so a nested key is named by its last part.
    names = dict.fromkeys(key if isinstance(key, str) else str(key[-1]) for key in keys)
    trackers = [InitTracker(init_key=name) for name in names]
    primers = get_primers_from_module(module, warn=False)
    if primers is None and len(trackers) == 1:
        return trackers[0]
    return _compose(*trackers, *([] if primers is None else [primers]))


def _init_keys(module: nn.Module) -> list[NestedKey]:
    recurrent = (m for m in module.modules() if hasattr(m, "make_tensordict_primer"))
    keys: list[Any] = [m.init_key for m in recurrent if hasattr(m, "init_key")]
    return keys or ["is_init"]
