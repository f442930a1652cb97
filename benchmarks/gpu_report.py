"""The report of a run on a GPU: ratios, shares of the bound, and whether goals are reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .cases import Case
from .gpu_bounds import Rates, least_seconds
from .gpu_contestants import ALL, NATIVE, TORCHRL, TORCHRL_TRITON, TRITON
from .tables import table
from .timing import geomean

LEAST_SPEEDUP, MOST_OF_CUDNN = 1.5, 1.2
_HEADER = ("cell", "(B, T, I, H)", "resets", "phase", "mode", "bound", *ALL)
_DRY = (
    "**A dry run on a CPU, kernels in Triton's interpreter. No figure here means anything of a "
    "GPU.**"
)


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
    if TRITON not in row.seconds or TORCHRL_TRITON not in row.seconds:
        return None
    return row.seconds[TORCHRL_TRITON] / row.seconds[TRITON]


def speedup_over_best(row: Row) -> float | None:
    """How many times faster than TorchRL's fastest backend."""
    theirs = [row.seconds[name] for name in TORCHRL if name in row.seconds]
    return min(theirs) / row.seconds[TRITON] if theirs and TRITON in row.seconds else None


def share_of_cudnn(row: Row) -> float | None:
    """How many times slower than cuDNN on the same batch without its resets."""
    if not row.case.has_resets or TRITON not in row.seconds or NATIVE not in row.seconds:
        return None
    return row.seconds[TRITON] / row.seconds[NATIVE]


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
    words = {True: "yes", False: "no", None: "open"}
    reached = [(goal, found, words[ok]) for goal, found, ok in goals([] if dry else rows)]
    reasons = {(name, why) for row in rows for name, why in row.skipped.items()}
    parts = [
        "# Recurrent layers on a GPU",
        _DRY if dry else "",
        table(("", ""), [*machine.items(), ("copy", f"{rates.bytes / 1e12:.2f} TB/s")]),
        table(("goal", "measured", "reached"), reached),
        "Milliseconds (peak MB); *bound*: share of it that `triton` reaches; `nn` is cuDNN on the "
        "same batch without its resets.",
        table(_HEADER, [_columns(row, rates) for row in rows]),
        "\n".join(f"- {name} did not run: {why}" for name, why in sorted(reasons)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _columns(row: Row, rates: Rates) -> list[str]:
    bound = least_seconds(row.case, row.phase, row.mode, rates)
    ours = row.seconds.get(TRITON)
    cells: list[Any] = [row.case.cell, row.case.shape, row.case.resets, row.phase, row.mode]
    cells += [f"{bound / ours:.0%}" if ours else "-"]
    for name in ALL:
        taken = row.seconds.get(name)
        memory = f" ({row.bytes[name] / 1e6:.0f})" if name in row.bytes else ""
        cells.append("-" if taken is None else f"{taken * 1e3:.3g}{memory}")
    return list(map(str, cells))
