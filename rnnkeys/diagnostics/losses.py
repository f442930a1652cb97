"""Checks of a loss or a value estimator: what it runs its next view from, and what it cannot do."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from torch import nn
from torchrl.objectives import A2CLoss, LossModule, PPOLoss, ReinforceLoss
from torchrl.objectives.value import ValueEstimatorBase

from ..checks.losses import find_batch_problems, find_loss_problems
from ..keys import MULTI_STEP_KEY, next_key
from ..mode import recurrent_mode
from ..modules.network import Recurrent
from ..objectives.loss_inputs import find_dropped_keys
from ..objectives.wiring import Wired
from .batches import next_view_is_marked
from .report import Report

WIRE = "loss = rnnkeys.objectives.recurrent_loss(loss)"
# All that they run on next views is their estimator, and estimators mark these by themselves.
_LEAVE_IT_TO_ESTIMATORS = (A2CLoss, PPOLoss, ReinforceLoss)


def check_loss(
    loss: nn.Module, recurrent: list[Recurrent], batch: TensorDictBase | None, report: Report
) -> None:
    """Check a loss, with the batch it will get if that can be run."""
    if _wires_itself(loss) and not isinstance(loss, Wired):
        # The package's own losses mark and start their sequences themselves.
        return
    problems = list(find_loss_problems(loss, recurrent))
    for problem in problems:
        report.add(problem.check, problem.message, problem.remedy)
    if problems:
        return
    if batch is not None and batch.get(MULTI_STEP_KEY, None) is None:
        _check_loss_with_batch(loss, recurrent, batch, report)
    if not _wires_itself(loss):
        _check_unwired(loss, recurrent, batch, report)


def _wires_itself(loss: nn.Module) -> bool:
    return type(loss).__module__.startswith("rnnkeys.")


def _check_loss_with_batch(
    loss: nn.Module, recurrent: list[Recurrent], batch: TensorDictBase, report: Report
) -> None:
    for problem in find_batch_problems(loss, batch, recurrent):
        report.add(problem.check, problem.message, problem.remedy)


def _check_unwired(
    loss: nn.Module, recurrent: list[Recurrent], batch: TensorDictBase | None, report: Report
) -> None:
    name = type(loss).__name__
    if isinstance(loss, ValueEstimatorBase):
        frozen: list[Any] = [one.module for one in recurrent]
        if recurrent_mode() is None and not all(module.recurrent_mode for module in frozen):
            report.add(
                "mode",
                f"{name} does not enter recurrent mode by itself: it would take every step of a "
                "batch for a step by itself, from its stored state",
                WIRE + ", or call it inside set_recurrent_mode(True)",
            )
        return
    if not isinstance(loss, LossModule):
        return
    states = {key for one in recurrent for key in one.state_keys}
    cut = [key for key in find_dropped_keys(loss) if key in states]
    if cut:
        report.add(
            "critic-state",
            f"{name} cuts the next view down to what its first network reads, and so drops the "
            f"states {cut} of the others: their next values start from zeros",
            WIRE,
        )
    if not isinstance(loss, _LEAVE_IT_TO_ESTIMATORS):
        _check_next_view(name, recurrent, batch, report)


def _check_next_view(
    name: str, recurrent: list[Recurrent], batch: TensorDictBase | None, report: Report
) -> None:
    for key in dict.fromkeys(one.init_key for one in recurrent):
        if batch is None or batch.get(key, None) is None:
            unmarked, seen = True, " (if no sampler marks them: pass a batch to see)"
        else:
            unmarked, seen = not next_view_is_marked(batch, key), ""
        if unmarked:
            report.add(
                "next-view",
                f"nothing marks starts in {next_key(key)!r}{seen}, so {name} runs its next view "
                "on from one slice and episode into the next, and bootstraps from wrong values",
                WIRE,
            )
