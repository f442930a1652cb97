"""Draw the measurements of a run on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import GATES
from .contestants import AUTO, CUT, NATIVE, SCAN, TORCHRL_PAD, TORCHRL_SCAN
from .goals import torchrl_best
from .records import Results
from .sequences import BOTH, Record
from .tables import case_columns

# Name to (label, colour, line style); one contestant looks the same in every picture.
_STYLES: dict[str, tuple[str, str, str]] = {
    AUTO: ("rnnkeys auto", "#0b6e4f", "-"),
    SCAN: ("rnnkeys scan", "#6bbf59", "-"),
    NATIVE: ("nn.LSTM / nn.GRU, no resets", "#222222", ":"),
    CUT: ("loop of nn calls", "#8d6cab", "-"),
    TORCHRL_PAD: ("TorchRL pad", "#d1495b", "-"),
    TORCHRL_SCAN: ("TorchRL scan", "#edae49", "-"),
}


def draw_all(results: Results, folder: Path) -> list[str]:
    """Draw every picture that there are records for; return the names of the files."""
    drawn = []
    for name, draw in (
        ("cpu_resets.png", _draw_resets),
        ("cpu_growth.png", _draw_growth),
        ("cpu_bound.png", _draw_bound),
        ("cpu_memory.png", _draw_memory),
    ):
        figure = draw(results)
        if figure is not None:
            figure.savefig(folder / name, dpi=120)
            drawn.append(name)
    return drawn


def _figure(rows: int, columns: int, height: float = 4.0, **options: Any) -> tuple[Any, Any]:
    # A figure of its own, not pyplot's: no window system, no state to clean up.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _plot(axes: Any, xs: Sequence[float], records: Sequence[Record], scale: float) -> None:
    for name, (label, colour, line) in _STYLES.items():
        points = [
            (x, [scale * t for t in record.timings[name][:3]])
            for x, record in zip(xs, records, strict=True)
            if name in record.timings
        ]
        if not points:
            continue
        at = [x for x, _ in points]
        median, low, high = zip(*(times for _, times in points), strict=True)
        axes.plot(at, median, line, color=colour, label=label, marker="o", markersize=3.5)
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.4)))


def _draw_resets(results: Results) -> Any:
    """Time over the chance of a reset, a column per shape that was run with most chances."""
    curves: dict[tuple[str, Any], list[Record]] = {}
    for record in results.sequences:
        if record.phase == BOTH and not isinstance(record.case.resets, str):
            curves.setdefault((record.case.cell, record.case.shape), []).append(record)
    if not curves:
        return None
    most = max(len(records) for records in curves.values())
    shapes = list(dict.fromkeys(shape for (_, shape), rs in curves.items() if len(rs) == most))
    figure, grid = _figure(len(GATES), len(shapes), height=3.4, sharex=True)
    for row, cell in zip(grid, GATES, strict=True):
        for axes, shape in zip(row, shapes, strict=True):
            records = sorted(curves.get((cell, shape), []), key=lambda r: r.case.resets)
            # Even distances: 0 has no place on a logarithmic axis.
            _plot(axes, range(len(records)), records, 1e3)
            axes.set_xticks(range(len(records)), [case_columns(r.case)[1] for r in records])
            axes.set(yscale="log", title=f"{cell}  (B, T, I, H) = {shape}")
            _plain_numbers(axes.yaxis)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("forward + backward, ms")
    for axes in grid[-1]:
        axes.set_xlabel("chance of an episode start per step")
    _legend(figure, grid[0][0])
    return figure


def _draw_growth(results: Results) -> Any:
    """Time per step of data over the length of rows, for one amount of data."""
    if not results.growth:
        return None
    figure, grid = _figure(1, len(GATES), sharey=True)
    for axes, cell in zip(grid[0], GATES, strict=True):
        records = [record for record in results.growth if record.case.cell == cell]
        shape = records[0].case.shape
        total = shape.B * shape.T
        lengths = [record.case.shape.T for record in records]
        _plot(axes, lengths, records, 1e6 / total)
        axes.set_xscale("log")
        axes.set_xticks(lengths, map(str, lengths))
        axes.minorticks_off()
        axes.set(
            yscale="log",
            title=f"{cell}, B*T = {total}, H = {shape.H}, one reset in 20 steps",
            xlabel="T",
        )
        _plain_numbers(axes.yaxis)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("forward + backward, us per step of data")
    _legend(figure, grid[0][0])
    return figure


def _draw_bound(results: Results) -> Any:
    """Share of the matmul bound by case: rnnkeys, torch's layers without resets, TorchRL."""
    by_cell = {
        cell: [r for r in results.sequences if r.phase == BOTH and r.case.cell == cell]
        for cell in GATES
    }
    most = max(len(records) for records in by_cell.values())
    if not most:
        return None
    figure, grid = _figure(1, len(GATES), height=1.5 + 0.19 * most)
    for axes, (cell, records) in zip(grid[0], by_cell.items(), strict=True):
        at = range(len(records))
        for label, colour, marker, seconds in (
            ("rnnkeys auto", "#0b6e4f", "o", lambda r: r.seconds(AUTO)),
            ("nn.LSTM / nn.GRU, no resets", "#222222", "|", lambda r: r.seconds(NATIVE)),
            ("the better of TorchRL's", "#d1495b", "x", torchrl_best),
        ):
            shares = [100 * record.bound() / seconds(record) for record in records]
            axes.scatter(shares, at, color=colour, marker=marker, label=label, zorder=3)
        axes.set_yticks(at, ["  ".join(case_columns(r.case)) for r in records], fontsize=7)
        axes.set(title=cell, xlabel="% of the machine's matmul bound", xlim=(0, None))
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
    _legend(figure, grid[0][0])
    return figure


def _draw_memory(results: Results) -> Any:
    """Peak memory over the length of rows, for one number of rows."""
    if not results.memory_growth:
        return None
    figure, grid = _figure(1, len(GATES), sharey=True)
    for axes, cell in zip(grid[0], GATES, strict=True):
        records = [record for record in results.memory_growth if record.case.cell == cell]
        shape = records[0].case.shape
        lengths = [record.case.shape.T for record in records]
        for name, (label, colour, line) in _STYLES.items():
            if name in records[0].peaks:
                peaks = [record.peaks[name] / 2**20 for record in records]
                axes.plot(lengths, peaks, line, color=colour, label=label, marker="o")
        axes.set(
            title=f"{cell}, B = {shape.B}, H = {shape.H}, one reset in 20 steps",
            xlabel="T",
            xlim=(0, None),
            ylim=(0, None),
        )
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("peak of forward + backward, MiB")
    _legend(figure, grid[0][0])
    return figure
