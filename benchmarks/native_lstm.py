"""What two parts of the LSTM's path on a CPU are worth: the time of a call without each.

    python -m benchmarks.native_lstm             # two minutes on one core

*shared rows*: short segments share rows of one length (``rnnkeys.backends.shared_rows``).
*workspace*: cell states are copied from oneDNN's workspace (``rnnkeys.backends.onednn``). Without
it they are computed from the outputs, and no rows are shared. The cases are those of ``make
bench``, forward and backward. CPU time of one thread counts, so that the machine need not be idle.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from unittest import mock

import torch

from rnnkeys.backends import onednn, shared_rows

from .cases import Case, full_grid, make_batch
from .contestants import PAD, Contestant
from .machine import cpu_facts
from .tables import case_columns, milliseconds, table
from .timing import Budget, Timing, geomean, interleave

PARTS = {"shared rows": (shared_rows, "can_run"), "workspace": (onednn, "is_place_known")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of all cases, and a line for each part."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="of samples (default: 0.5)")
    parser.add_argument("--cases", type=int, default=None, help="only so many (default: all)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = cpu_facts(threads=1)
    cases = [case for case in full_grid().cases if case.cell == "LSTM"][: options.cases]
    results = {case: measure(case, Budget(seconds=options.seconds, most=31)) for case in cases}
    print(render(results))
    print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))


def measure(case: Case, budget: Budget) -> dict[str, Timing]:
    """Time calls with everything (``""``) and without each part, in turns."""
    call = Contestant(PAD, case, make_batch(case)).both
    return interleave(
        {"": call, **{part: without(part, call) for part in PARTS}}, budget, time.process_time
    )


def without(part: str, call: Callable[[], object]) -> Callable[[], object]:
    """Return a call that runs without a part."""
    switch = mock.patch.object(*PARTS[part], new=lambda *_: False)

    def run() -> object:
        with switch:
            return call()

    return run


def render(results: dict[Case, dict[str, Timing]]) -> str:
    """Return the tables: times of a call, and times without each part over them."""
    ratios = {
        part: {case: times[part].median / times[""].median for case, times in results.items()}
        for part in PARTS
    }
    rows = [
        [*case_columns(case), milliseconds(times[""]), *(f"{ratios[p][case]:.2f}" for p in PARTS)]
        for case, times in results.items()
    ]
    lines = []
    for part, values in ratios.items():
        # Without resets there is nothing to share.
        some = [v for case, v in values.items() if case.has_resets or part == "workspace"]
        spread = f"{min(some):.2f} to {max(some):.2f}"
        lines.append([part, str(len(some)), f"{geomean(some):.2f}", spread])
    header = ["batch", "resets", "call, ms", *(f"without {part}" for part in PARTS)]
    summary = table(["without", "cases", "times as long, geometric mean", "range"], lines)
    return f"{summary}\n\n{table(header, rows)}"


if __name__ == "__main__":
    main()
