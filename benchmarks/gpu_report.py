"""The report of a run on a GPU: ratios, shares of the bound, and whether goals are reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .cases import Case
from .gpu_bounds import Rates, least_seconds
from .gpu_contestants import ALL, CUDNN, OURS, THEIRS, THEIRS_TRITON
from .timing import geomean

LEAST_SPEEDUP, MOST_OF_CUDNN = 1.5, 1.2


@dataclass
class Row:
    """One case, measured.

    Attributes:
        case: what ran.
        phase: ``"forward"`` or ``"both"``.
        mode: of the products.
        seconds: by contestant; of those that ran.
        bytes: peak memory by contestant, forward and backward.
        skipped: why a contestant did not run, by contestant.
    """

    case: Case
    phase: str
    mode: str
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def ratios(rows: Iterable[Row], of: Callable[[Row], float | None]) -> list[float]:
    """Collect the values of ``of``, without those that are None."""
    return [value for row in rows if (value := of(row)) is not None]


def speedup_over_triton(row: Row) -> float | None:
    """How many times faster than TorchRL's Triton backend."""
    if OURS not in row.seconds or THEIRS_TRITON not in row.seconds:
        return None
    return row.seconds[THEIRS_TRITON] / row.seconds[OURS]


def speedup_over_best(row: Row) -> float | None:
    """How many times faster than TorchRL's fastest backend."""
    theirs = [row.seconds[name] for name in THEIRS if name in row.seconds]
    return min(theirs) / row.seconds[OURS] if theirs and OURS in row.seconds else None


def share_of_cudnn(row: Row) -> float | None:
    """How many times slower than cuDNN on the same batch without its resets."""
    if not row.case.has_resets or OURS not in row.seconds or CUDNN not in row.seconds:
        return None
    return row.seconds[OURS] / row.seconds[CUDNN]


def goals(rows: list[Row]) -> list[tuple[str, str, bool | None]]:
    """Return each goal, its figure, and whether it is reached; None without measurements."""
    over, best = ratios(rows, speedup_over_triton), ratios(rows, speedup_over_best)
    cudnn = ratios(rows, share_of_cudnn)
    mean = geomean(over) if over else 0.0
    return [
        (
            f"at least {LEAST_SPEEDUP} times as fast as TorchRL's Triton, geometric mean",
            f"{mean:.2f} over {len(over)} cases",
            mean >= LEAST_SPEEDUP if over else None,
        ),
        (
            "never slower than TorchRL's best backend",
            f"slowest {min(best, default=0):.2f}; slower in {sum(r < 1 for r in best)} of "
            f"{len(best)}",
            min(best) >= 1 if best else None,
        ),
        (
            f"at most {MOST_OF_CUDNN} times cuDNN without resets, for batches with resets",
            f"worst {max(cudnn, default=0):.2f}; above in "
            f"{sum(r > MOST_OF_CUDNN for r in cudnn)} of {len(cudnn)}",
            max(cudnn) <= MOST_OF_CUDNN if cudnn else None,
        ),
    ]


def report(rows: list[Row], rates: Rates, machine: dict[str, str], dry: bool) -> str:
    """Write the report in Markdown."""
    lines = ["# Recurrent layers on a GPU", ""]
    if dry:
        lines += [
            "**A dry run on a CPU, kernels in Triton's interpreter. No figure here means anything "
            "of a GPU.**",
            "",
        ]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += [f"- copy: {rates.bytes / 1e12:.2f} TB/s", ""]
    lines += ["| goal | measured | reached |", "|---|---|---|"]
    words = {True: "yes", False: "no", None: "open"}
    shown = [] if dry else rows
    lines += [f"| {goal} | {found} | {words[ok]} |" for goal, found, ok in goals(shown)]
    lines += ["", "Milliseconds (peak MB); *bound*: share of it that `triton` reaches.", ""]
    lines += ["| cell | (B, T, I, H) | resets | phase | mode | bound | " + " | ".join(ALL) + " |"]
    lines += ["|" + "---|" * (6 + len(ALL))]
    lines += [_line(row, rates) for row in rows]
    reasons = {(name, why) for row in rows for name, why in row.skipped.items()}
    lines += ["", *(f"- {name} did not run: {why}" for name, why in sorted(reasons))]
    return "\n".join(lines).rstrip() + "\n"


def _line(row: Row, rates: Rates) -> str:
    bound = least_seconds(row.case, row.phase, row.mode, rates)
    ours = row.seconds.get(OURS)
    cells: list[Any] = [row.case.cell, row.case.shape, row.case.resets, row.phase, row.mode]
    cells += [f"{bound / ours:.0%}" if ours else "-"]
    for name in ALL:
        taken = row.seconds.get(name)
        memory = f" ({row.bytes[name] / 1e6:.0f})" if name in row.bytes else ""
        cells.append("-" if taken is None else f"{taken * 1e3:.3g}{memory}")
    return "| " + " | ".join(map(str, cells)) + " |"
