"""Checks of an environment with a policy in it: the entries that it provides, and a rollout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from torch import nn
from torchrl.envs import EnvBase

from ..checks import Problem
from ..mode import set_recurrent_mode
from ..modules.network import RecurrentLayer, RecurrentNetwork
from ..sequences import find_sequence_problems
from ..sequences.segment_starts import expand_flags, find_steps_after_done
from ..sequences.segments import Segments
from ..sequences.stored_states import find_zero_state_problems
from .report import Report

_APPEND = "env = env.append_transform({}(policy))"
TRANSFORMS = _APPEND.format("get_env_transforms_from_module")
PRIMERS = _APPEND.format("get_primers_from_module")


def check_environment(
    policy: nn.Module, network: RecurrentNetwork, env: EnvBase, steps: int, report: Report
) -> TensorDictBase | None:
    """Check what an environment provides; if that is enough, run the policy in it.

    Returns:
        The rollout, or None if it was not possible.
    """
    if not report.add(_find_spec_problems(policy, network, env)):
        return None
    module: Any = policy
    try:
        with torch.no_grad(), set_recurrent_mode(False):
            rollout = env.rollout(steps, module, break_when_any_done=False)
    except Exception as error:  # the report names it, whatever it is
        report.add([_rollout_failed(error)])
        return None
    report.add(_find_rollout_problems(network, rollout))
    return rollout


def _rollout_failed(error: Exception) -> Problem:
    return Problem(
        "rollout",
        f"The policy cannot act in the environment: {type(error).__name__}: {error}",
        "See the error: env.rollout(8, policy, break_when_any_done=False)",
    )


def _find_spec_problems(policy: Any, network: RecurrentNetwork, env: EnvBase) -> Iterator[Problem]:
    provided = {unravel_key(key) for key in env.observation_spec.keys(True, True)}
    for key in network.init_keys:
        if key not in provided:
            yield Problem(
                "init-tracker",
                f"The environment provides no {key!r}, which flags the first step of episodes.",
                TRANSFORMS,
            )
    for layer in network.layers:
        yield from _find_primer_problems(layer, env, provided)
    own = {*network.init_keys, *network.state_keys}
    read = [unravel_key(key) for key in getattr(policy, "in_keys", [])]
    missing = [key for key in read if key not in provided and key not in own]
    if missing:
        yield Problem(
            "keys",
            f"The policy reads {missing}, which the environment does not provide (it has "
            f"{sorted(map(str, provided))}).",
            "Rename the policy's in_keys, or append "
            f"RenameTransform(in_keys=[...], out_keys={missing}) to the environment.",
        )


def _find_primer_problems(
    layer: RecurrentLayer, env: EnvBase, provided: set[Any]
) -> Iterator[Problem]:
    name = layer.name
    missing = [key for key in layer.state_keys if key not in provided]
    if missing:
        yield Problem(
            "primer",
            f"The environment creates no state {missing} for {name}, so the state is lost at every "
            "step.",
            PRIMERS,
        )
        return
    for key, wanted in _wanted_states(layer).items():
        spec: Any = env.observation_spec[key]
        if spec.shape[-2:] != wanted.shape[-2:] or spec.dtype != wanted.dtype:
            yield Problem(
                "state-shape",
                f"The environment creates {key!r} as {_show(spec)}, and {name} keeps it as "
                f"{_show(wanted)}: the primer was made for another module.",
                PRIMERS + " in place of that primer",
            )


def _wanted_states(layer: RecurrentLayer) -> dict[Any, Any]:
    module: Any = layer.module
    made = module.make_tensordict_primer().primers
    specs = {unravel_key(key): spec for key, spec in made.items(True, True)}
    # The spec of a nested key may be wrapped once for each of its groups.
    return {key: spec for key, spec in specs.items() if key in layer.state_keys}


def _show(spec: Any) -> str:
    return f"{list(spec.shape[-2:])} of {spec.dtype}"


def _find_rollout_problems(network: RecurrentNetwork, rollout: TensorDictBase) -> Iterator[Problem]:
    """Yield problems that real data show: flags, initial states, states that do not arrive."""
    problems = [*_find_flag_problems(network, rollout), *_find_start_problems(network, rollout)]
    yield from problems
    if problems:
        return
    # States are compared bit by bit with what was written, so that dropout changes nothing.
    sequences = find_sequence_problems(rollout, network.init_keys, network.pairs, read_values=True)
    found = [problem for problem in sequences if problem.check == "continuity"]
    for key, init_key in network.pairs:
        found += find_zero_state_problems(Segments(rollout, init_key), key, everywhere=True)
    if found:
        yield Problem(
            "state-lost",
            f"The states {list(network.state_keys)} of a rollout are not those that its steps "
            f"write: the environment drops or resets them on the way. {found[0].message}",
            PRIMERS + ", last of all transforms, and nothing else that writes these keys",
        )


def _find_flag_problems(network: RecurrentNetwork, rollout: TensorDictBase) -> Iterator[Problem]:
    for key in network.init_keys:
        flags = rollout.get(key)
        missed = find_steps_after_done(rollout, key, flags) & ~flags
        if missed.any() or not flags.select(rollout.ndim - 1, 0).all():
            yield Problem(
                "init-flags",
                f"Episodes of a rollout start without a flag at {key!r}: a transform after "
                "InitTracker takes steps in resets (NoopResetEnv does), or overwrites the flags.",
                "Append InitTracker and the primers last of all transforms: " + TRANSFORMS,
            )


def _find_start_problems(network: RecurrentNetwork, rollout: TensorDictBase) -> Iterator[Problem]:
    for key, init_key in network.pairs:
        state = rollout.get(key)
        is_start = expand_flags(rollout.get(init_key), state).expand_as(state)
        if state[is_start].any():
            yield Problem(
                "episode-state",
                f"Episodes start from a {key!r} that is not zero. Single steps start from zeros "
                "and sequences from the stored state, so the two differ.",
                PRIMERS + " in place of the primer that is there",
            )
