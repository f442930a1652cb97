"""The goals of the package on a CPU, and the figures that a run reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from rnnkeys.backends import Options, choose

from .cases import GATES
from .contestants import (
    AUTO,
    NATIVE,
    NO_RESETS,
    PAD,
    SCAN,
    TORCHRL_PAD,
)
from .contestants import TORCHRL as TORCHRL_BACKENDS
from .memory import MemoryRecord
from .records import Results
from .sequences import BOTH, Record
from .steps import FLOOR, MODULE, OURS, TORCHRL, StepRecord
from .timing import geomean

LONG_ROWS = 512
_SHORT_ROWS = 256


@dataclass(frozen=True)
class Goal:
    """One line of the table of goals.

    Attributes:
        against: what is compared, and on which batches.
        cell: ``"LSTM"`` or ``"GRU"``.
        wanted: the bound, in words.
        reached: the figure, in words; None if nothing was measured.
        met: whether it holds; None if nothing was measured.
    """

    against: str
    cell: str
    wanted: str
    reached: str | None = None
    met: bool | None = None


def all_goals(results: Results) -> list[Goal]:
    """Judge every goal for both cells, in the order of the goals."""
    makers: list[Callable[[Results, str], Goal]] = [
        _faster_on_short_rows,
        _faster_on_long_rows,
        _without_resets,
        _against_torch_without_resets,
        _against_torch_with_resets,
        _price_of_resets,
        _growth,
        _share_of_bound,
        _regret,
        _single_step,
        _memory,
        _memory_growth,
    ]
    judged = [make(results, cell) for make in makers for cell in GATES]
    return [*judged, _single_step_time(results)]


def _grid(results: Results, cell: str, keep: Callable[[Record], bool]) -> list[Record]:
    return [
        record
        for record in results.sequences
        if record.phase == BOTH and record.case.cell == cell and keep(record)
    ]


def torchrl_best(record: Record) -> float:
    """Time of the better of those of TorchRL's backends that ran."""
    return min(record.seconds(name) for name in TORCHRL_BACKENDS if name in record.timings)


def speedup(record: Record) -> float:
    """Speed relative to the better of TorchRL's backends."""
    return torchrl_best(record) / record.seconds(AUTO)


def regret(record: Record, others: Iterable[str] = (PAD, SCAN)) -> float:
    """Time of the choice that ``auto`` makes over that of the best of others.

    ``auto`` and the backend that it chooses are one code, timed twice; the lower time counts.
    """
    own = min(record.seconds(AUTO), record.seconds(choose("auto", Options())))
    return own / min(own, *map(record.seconds, others))


def _at_least(goal: Goal, ratios: Sequence[float], bound: float, everywhere: float) -> Goal:
    if not ratios:
        return goal
    mean, least = geomean(ratios), min(ratios)
    reached = f"{mean:.2f} times faster; least {least:.2f}, {len(ratios)} cases"
    return replace(goal, reached=reached, met=mean >= bound and least >= everywhere)


def _at_most(
    goal: Goal, ratios: Sequence[float], bound: float, everywhere: float = float("inf")
) -> Goal:
    if not ratios:
        return goal
    mean, most = geomean(ratios), max(ratios)
    reached = f"{mean:.2f} times; most {most:.2f}, {len(ratios)} cases"
    return replace(goal, reached=reached, met=mean <= bound and most <= everywhere)


def _faster(results: Results, cell: str, rows: str, bound: float, keep) -> Goal:
    goal = Goal(
        f"the better of TorchRL's `pad` and `scan`, batches with resets, {rows}",
        cell,
        f"{bound:g} times faster or more, nowhere slower",
    )
    records = _grid(results, cell, lambda r: r.case.has_resets and keep(r.case.shape.T))
    return _at_least(goal, [speedup(record) for record in records], bound, 1.0)


def _faster_on_short_rows(results: Results, cell: str) -> Goal:
    bound = {"LSTM": 3.0, "GRU": 1.5}[cell]
    return _faster(results, cell, f"T up to {_SHORT_ROWS}", bound, lambda T: T <= _SHORT_ROWS)


def _faster_on_long_rows(results: Results, cell: str) -> Goal:
    bound = {"LSTM": 8.0, "GRU": 3.0}[cell]
    return _faster(results, cell, f"T of {LONG_ROWS} and more", bound, lambda T: T >= LONG_ROWS)


def _ratios(results: Results, cell: str, name: str, other: str, resets: bool) -> list[float]:
    records = _grid(results, cell, lambda r: r.case.has_resets == resets)
    return [record.seconds(name) / record.seconds(other) for record in records]


def _without_resets(results: Results, cell: str) -> Goal:
    bound = {"LSTM": 1.4, "GRU": 1.0}[cell]
    goal = Goal(
        "TorchRL's `pad` (which writes zeros), batches with no resets",
        cell,
        "nowhere slower" if bound == 1.0 else f"at most {bound:g} times its time",
    )
    everywhere = 1.0 if bound == 1.0 else float("inf")
    ratios = _ratios(results, cell, AUTO, TORCHRL_PAD, resets=False)
    return _at_most(goal, ratios, bound, everywhere)


def _against_torch(results: Results, cell: str, resets: bool) -> Goal:
    bound = {"LSTM": 1.4, "GRU": 0.8}[cell]
    goal = Goal(
        f"`nn.{cell}` on the same batch without resets; batches {'with' if resets else 'without'} "
        "resets",
        cell,
        f"at most {bound:g} times its time",
    )
    return _at_most(goal, _ratios(results, cell, AUTO, NATIVE, resets), bound)


def _against_torch_without_resets(results: Results, cell: str) -> Goal:
    return _against_torch(results, cell, resets=False)


def _against_torch_with_resets(results: Results, cell: str) -> Goal:
    return _against_torch(results, cell, resets=True)


def _price_of_resets(results: Results, cell: str) -> Goal:
    bound = {"LSTM": 1.3, "GRU": 1.2}[cell]
    goal = Goal(
        "reset probability .1 instead of 0, same module", cell, f"at most {bound:g} times its time"
    )
    records = _grid(results, cell, lambda r: NO_RESETS in r.timings)
    return _at_most(goal, [r.seconds(AUTO) / r.seconds(NO_RESETS) for r in records], bound)


def _growth(results: Results, cell: str) -> Goal:
    goal = Goal(
        "rows of growing length, constant B*T, resets .05", cell, "at most 1.5 times the shortest's"
    )
    records = [record for record in results.growth if record.case.cell == cell]
    if len(records) < 2:
        return goal
    shortest, *others = sorted(records, key=lambda record: record.case.shape.T)
    steps = [(r.seconds(AUTO) / shortest.seconds(AUTO), r.case.shape.T) for r in others]
    most, T = max(steps)
    reached = f"{steps[-1][0]:.2f} times from T={shortest.case.shape.T} to {steps[-1][1]}"
    reached += f"; most {most:.2f} at {T}"
    return replace(goal, reached=reached, met=most <= 1.5)


def _share_of_bound(results: Results, cell: str) -> Goal:
    goal = Goal("the machine's matmul bound", cell, "60 % of it (an aim)")
    records = _grid(results, cell, lambda r: True)
    if not records:
        return goal
    own, native = (
        geomean(record.bound() / record.seconds(name) for record in records)
        for name in (AUTO, NATIVE)
    )
    reached = f"{own:.0%} (`nn.{cell}` without resets {native:.0%}), {len(records)} cases"
    return replace(goal, reached=reached, met=own >= 0.6)


def _regret(results: Results, cell: str) -> Goal:
    goal = Goal("`auto` against the best single backend", cell, "nowhere more than 1.15 times")
    ratios = [regret(record) for record in _grid(results, cell, lambda r: True)]
    return _at_most(goal, ratios, 1.15, 1.15)


def _one_step(results: Results, cell: str) -> StepRecord | None:
    found = [r for r in results.steps if (r.kind, r.cell, r.batch) == (MODULE, cell, 1)]
    return found[0] if found else None


def _single_step(results: Results, cell: str) -> Goal:
    bound = {"LSTM": 3.0, "GRU": 2.0}[cell]
    goal = Goal("TorchRL's module, one step at B = 1, one core", cell, f"{bound:g} times faster")
    record = _one_step(results, cell)
    if record is None:
        return goal
    ratio = record.seconds(TORCHRL) / record.seconds(OURS)
    return replace(goal, reached=f"{ratio:.2f} times faster", met=ratio >= bound)


def _single_step_time(results: Results) -> Goal:
    cell = "LSTM"
    wanted = "at most 140 us on a core where TorchRL takes 408"
    goal = Goal("time of one step at B = 1, one core", cell, wanted)
    record = _one_step(results, cell)
    if record is None:
        return goal
    ours, theirs, floor = (1e6 * record.seconds(name) for name in (OURS, TORCHRL, FLOOR))
    there = ours * 408 / theirs
    reached = f"{ours:.0f} us where TorchRL takes {theirs:.0f} and `nn.{cell}Cell` {floor:.0f}: "
    reached += f"{there:.0f} on such a core"
    return replace(goal, reached=reached, met=there <= 140)


def memory_ratio(record: MemoryRecord) -> float:
    """Peak over that of torch's layers, with the state entries added to theirs."""
    return record.peaks[AUTO] / (record.peaks[NATIVE] + record.case.state_bytes)


def _memory(results: Results, cell: str) -> Goal:
    goal = Goal(f"peak memory: that of `nn.{cell}` plus the state entries", cell, "nowhere more")
    ratios = [memory_ratio(record) for record in results.memory if record.case.cell == cell]
    return _at_most(goal, ratios, 1.0, 1.0)


def _memory_growth(results: Results, cell: str) -> Goal:
    goal = Goal(
        "peak memory of rows of growing length", cell, "grows at most 1.1 times as much as T"
    )
    records = [record for record in results.memory_growth if record.case.cell == cell]
    if len(records) < 2:
        return goal
    records.sort(key=lambda record: record.case.shape.T)
    first, last = records[0], records[-1]
    longer = last.case.shape.T / first.case.shape.T
    more = last.peaks[AUTO] / first.peaks[AUTO]
    reached = f"{more:.1f} times for rows {longer:g} times longer"
    return replace(goal, reached=reached, met=more <= 1.1 * longer)
