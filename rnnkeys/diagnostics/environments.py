"""Checks of an environment with a policy in it: what it must provide, and a rollout."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from torch import nn
from torchrl.envs import EnvBase

from ..mode import set_recurrent_mode
from ..modules.network import Recurrent
from .report import Report
from .runs import staleness_by_step

_APPEND = "env = env.append_transform({}(policy))"
TRANSFORMS = _APPEND.format("get_env_transforms_from_module")
PRIMERS = _APPEND.format("get_primers_from_module")
# Fresh states differ by rounding, in half precision too; lost ones by shares of the whole.
_LOST = 0.05


def check_environment(
    policy: nn.Module, recurrent: list[Recurrent], env: EnvBase, steps: int, report: Report
) -> TensorDictBase | None:
    """Check what the environment provides; if that is enough, roll the policy out.

    Returns:
        The rollout, or None if there could be none.
    """
    provided = {unravel_key(key) for key in env.observation_spec.keys(True, True)}
    before = len(report)
    _check_marks(recurrent, provided, report)
    _check_states(recurrent, env, provided, report)
    _check_inputs(policy, recurrent, provided, report)
    if len(report) > before:
        return None
    rollout = _roll_out(policy, env, steps, report)
    if rollout is not None and recurrent:
        _check_rollout(policy, recurrent, rollout, report)
    return rollout


def _check_marks(recurrent: list[Recurrent], provided: set[Any], report: Report) -> None:
    for key in dict.fromkeys(unravel_key(one.init_key) for one in recurrent):
        if key not in provided:
            report.add(
                "init-tracker",
                f"the environment provides no {key!r}, so nothing says where episodes start",
                TRANSFORMS,
            )


def _check_states(
    recurrent: list[Recurrent], env: EnvBase, provided: set[Any], report: Report
) -> None:
    for one in recurrent:
        missing = [key for key in one.state_keys if key not in provided]
        if missing:
            report.add(
                "primer",
                f"the environment creates no state {missing} for {type(one.module).__name__}, so "
                "memory is lost at every step",
                PRIMERS,
            )
            continue
        for key, wanted in _wanted_states(one).items():
            spec: Any = env.observation_spec[key]
            if spec.shape[-2:] != wanted.shape[-2:] or spec.dtype != wanted.dtype:
                report.add(
                    "state-shape",
                    f"the environment creates {key!r} as {_show(spec)}, and "
                    f"{type(one.module).__name__} keeps it as {_show(wanted)}: the primer was made "
                    "for another module",
                    PRIMERS + " in place of that primer",
                )


def _wanted_states(recurrent: Recurrent) -> dict[Any, Any]:
    module: Any = recurrent.module
    made = module.make_tensordict_primer().primers
    specs = {unravel_key(key): spec for key, spec in made.items(True, True)}
    # Of a nested key the spec may be wrapped once for each of its groups.
    return {key: spec for key, spec in specs.items() if key in recurrent.state_keys}


def _show(spec: Any) -> str:
    return f"{list(spec.shape[-2:])} of {spec.dtype}"


def _check_inputs(
    policy: Any, recurrent: list[Recurrent], provided: set[Any], report: Report
) -> None:
    own = {key for one in recurrent for key in (unravel_key(one.init_key), *one.state_keys)}
    read = [unravel_key(key) for key in getattr(policy, "in_keys", [])]
    missing = [key for key in read if key not in provided and key not in own]
    if missing:
        report.add(
            "keys",
            f"the policy reads {missing}, which the environment does not provide (it has "
            f"{sorted(map(str, provided))})",
            "rename the policy's in_keys, or append "
            f"RenameTransform(in_keys=[...], out_keys={missing}) to the environment",
        )


def _roll_out(policy: nn.Module, env: EnvBase, steps: int, report: Report) -> TensorDictBase | None:
    module: Any = policy
    try:
        with torch.no_grad(), set_recurrent_mode(False):
            return env.rollout(steps, module, break_when_any_done=False)
    except Exception as error:  # whatever it is, the report has to say so
        report.add(
            "rollout",
            f"the policy cannot act in the environment: {type(error).__name__}: {error}",
            "see the error: env.rollout(8, policy, break_when_any_done=False)",
        )
    return None


def _check_rollout(
    policy: nn.Module, recurrent: list[Recurrent], rollout: TensorDictBase, report: Report
) -> None:
    """Check in real data that states start at zero, and arrive where they are read."""
    before = len(report)
    for one in recurrent:
        marks = rollout.get(one.init_key)
        for key in one.state_keys:
            read = rollout.get(key)
            fresh = marks.reshape(*marks.shape[:-1], *[1] * (read.ndim - marks.ndim + 1))
            if read[fresh.expand_as(read)].any():
                report.add(
                    "start-state",
                    f"episodes start from {key!r} that is not zero; single steps start from zeros "
                    "and sequences from what is stored, so the two differ",
                    PRIMERS + " in place of the primer that is there",
                )
    if len(report) > before:
        return
    difference = float(staleness_by_step(policy, rollout).difference.max())
    if not difference <= _LOST:
        keys = [key for one in recurrent for key in one.state_keys]
        report.add(
            "state-lost",
            f"the states {keys} of a rollout are not those that its steps make: the environment "
            f"drops or resets them on the way (a difference of {difference:.1e} of the largest "
            "output)",
            PRIMERS + ", last of all transforms, and nothing else that writes these keys",
        )
