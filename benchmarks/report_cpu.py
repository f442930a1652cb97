"""Write the measurements of a run on a CPU as a page of tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from .cases import GATES
from .contestants import AUTO, CUT, GEMM, NATIVE, NO_RESETS, OURS, STORED, TORCHRL
from .goals import all_goals, memory_ratio, regret, speedup
from .memory import MemoryRecord
from .records import Results
from .sequences import BOTH, FORWARD, Record
from .steps import COLLECTOR, FLOOR, MODULE, POLICY, StepRecord
from .steps import OURS as RNNKEYS
from .steps import TORCHRL as TORCHRL_LIBRARY
from .tables import case_columns, digits, milliseconds, table

_COLUMNS = (NATIVE, *OURS, *TORCHRL, CUT, NO_RESETS, STORED)
_NOTHING = "not measured"


def write_report(results: Results, pictures: Iterable[str] = ()) -> str:
    """Return the page in Markdown.

    Args:
        results: of a run.
        pictures: file names of pictures beside the page.
    """
    parts = [
        "# Speed and memory on a CPU",
        "Written by `make bench`; what is measured, and how, is in "
        "the docstrings of `benchmarks/`. Times are medians; `±` is half the distance "
        "between the quartiles. Contestants in one line took turns.",
        table(("", ""), results.machine.items()),
        "## Goals",
        _noise(results),
        _goals(results),
        *(f"![{name}]({name})" for name in pictures),
        *_sequences(results.sequences, BOTH),
        *_sequences(results.sequences, FORWARD),
        *_growth(results.growth),
        *_steps(results.steps),
        *_memory("Peak memory, forward and backward", results.memory),
        *_memory("Peak memory of rows of growing length", results.memory_growth),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _goals(results: Results) -> str:
    words = {True: "yes", False: "no", None: "-"}
    rows = [
        (goal.against, goal.cell, goal.wanted, goal.reached or _NOTHING, words[goal.met])
        for goal in all_goals(results)
    ]
    return table(("against", "cell", "wanted", "reached", "met"), rows)


def _noise(results: Results) -> str:
    spreads = [
        timing.spread / 2
        for record in (*results.sequences, *results.growth)
        for name, timing in record.timings.items()
        if name != GEMM
    ]
    forward_backward = (
        "Forward and backward through the module, states written at every position, float32; "
        "geometric means over the tables below."
    )
    if not spreads:
        return forward_backward
    return f"{forward_backward} Half of all times have a spread of at most ±{median(spreads):.1%}."


def _sequences(records: Sequence[Record], phase: str) -> list[str]:
    parts: list[str] = []
    for cell in GATES:
        own = [r for r in records if r.phase == phase and r.case.cell == cell]
        if own:
            parts += [f"### {cell}, {phase}", _times(own, _verdicts)]
    if parts and phase == BOTH:
        parts.insert(0, _EXPLANATION)
    return parts


_EXPLANATION = """## Batches of sequences

Milliseconds per call, by `(B, T, I, H)` and by the chance of an episode start at every step, or
real episode lengths. `nn` is `nn.LSTM` or `nn.GRU` on the same batch *without* resets, the limit
for whoever uses its kernel; `nn in a loop` is a loop of `nn` calls cut at resets. The last columns:
how many times faster `auto` is than the better of TorchRL's backends; `auto` over `nn`; `auto` over
the better of `pad` and `scan`, where `auto`'s time is the lower of its own and that of the backend
it runs, which are one code; `auto`'s and `nn`'s share of the machine's matmul bound."""

_Verdicts = Sequence[tuple[str, str]]


def _verdicts(record: Record) -> _Verdicts:
    seconds = record.seconds
    # A forward pass alone is a third of the matmuls.
    bound = record.bound() / (1 if record.phase == BOTH else 3)
    return (
        ("TorchRL/auto", f"{speedup(record):.1f}"),
        ("auto/nn", f"{seconds(AUTO) / seconds(NATIVE):.2f}"),
        ("auto/best", f"{regret(record):.2f}"),
        ("auto of bound", f"{bound / seconds(AUTO):.0%}"),
        ("nn of bound", f"{bound / seconds(NATIVE):.0%}"),
    )


def _times(records: Sequence[Record], verdicts: Callable[[Record], _Verdicts]) -> str:
    columns = [name for name in _COLUMNS if any(name in r.timings for r in records)]
    rows = [
        (
            *case_columns(record.case),
            *(milliseconds(record.timings.get(name)) for name in columns),
            *(text for _, text in verdicts(record)),
        )
        for record in records
    ]
    titles = [title for title, _ in verdicts(records[0])]
    return table(("batch", "resets", *columns, *titles), rows)


def _growth(records: Sequence[Record]) -> list[str]:
    parts = []
    for cell in GATES:
        own = [record for record in records if record.case.cell == cell]
        if own:
            shortest = own[0].seconds(AUTO)
            parts += [
                f"## {cell}, rows of growing length, one amount of data",
                _times(own, lambda r, s=shortest: (("auto, of the first", _ratio(r, s)),)),
            ]
    return parts


def _ratio(record: Record, reference: float) -> str:
    return f"{record.seconds(AUTO) / reference:.2f}"


_STEP_TITLES = {
    MODULE: (
        "Single steps: the module alone, one core",
        "Microseconds per call, no gradients. The floor is `nn.LSTMCell` or `nn.GRUCell`, which "
        "reads and writes no entries.",
    ),
    POLICY: (
        "Single steps: a whole policy, one core",
        "Microseconds per call of a `TensorDictSequential`: encoder, recurrent layers, head, "
        "choice of an action. The floor has no recurrent layers.",
    ),
    COLLECTOR: (
        "Collection: `Collector` on CartPole, one core",
        "Microseconds per step of all environments, and frames per second. The floor has no "
        "recurrent layers.",
    ),
}


def _steps(records: Sequence[StepRecord]) -> list[str]:
    parts = []
    for kind, (title, explanation) in _STEP_TITLES.items():
        rows = [_step_row(record) for record in records if record.kind == kind]
        if rows:
            header = ["cell", "environments", RNNKEYS, TORCHRL_LIBRARY, FLOOR, "TorchRL/rnnkeys"]
            if kind == COLLECTOR:
                header += [f"{RNNKEYS} frames/s", f"{TORCHRL_LIBRARY} frames/s"]
            parts += [f"## {title}", explanation, table(header, rows)]
    return parts


def _step_row(record: StepRecord) -> list[str]:
    names = (RNNKEYS, TORCHRL_LIBRARY, FLOOR)
    row = [record.cell, str(record.batch)]
    row += [
        f"{1e6 * record.seconds(name):.0f} ±{record.timings[name].spread / 2:.0%}" for name in names
    ]
    row.append(f"{record.seconds(TORCHRL_LIBRARY) / record.seconds(RNNKEYS):.2f}")
    if record.kind == COLLECTOR:
        row += [f"{record.batch / record.seconds(name):,.0f}" for name in names[:2]]
    return row


def _memory(title: str, records: Sequence[MemoryRecord]) -> list[str]:
    if not records:
        return []
    columns = [name for name in _COLUMNS if name in records[0].peaks]
    rows = [
        (
            record.case.cell,
            *case_columns(record.case),
            *(_mebibytes(record.peaks[name]) for name in columns),
            _mebibytes(record.case.state_bytes),
            f"{memory_ratio(record):.2f}",
        )
        for record in records
    ]
    header = ("cell", "batch", "resets", *columns, "state entries", "auto/(nn + entries)")
    explanation = (
        "MiB that torch's CPU allocator holds at most, beyond data and parameters that were there "
        "before; gradients and outputs count."
    )
    return [f"## {title}", explanation, table(header, rows)]


def _mebibytes(size: int) -> str:
    return digits(size / 2**20)
