"""Times recurrent layers on a GPU: ``make bench-gpu``.

Batches of 1 to 4096 rows, 16 to 2048 steps, 64 to 1024 units, several chances of a reset, forward
and forward with backward, with peak memory, against TorchRL's backends, cuDNN without resets and
the plain hand-written operator, as a share of what memory and matmul throughput allow.

    python -m benchmarks.bench_gpu                     # all; hours
    python -m benchmarks.bench_gpu --quick             # some of all sizes; ten minutes
    python -m benchmarks.bench_gpu --part 2/8          # one of eight parts
    python -m benchmarks.bench_gpu --dry-run           # tiny sizes on a CPU: does everything run?

Before it times, it checks that all contestants compute the same. Who takes longer than
``--call-seconds`` for a call skips larger cases. The report and the figures go to
``--output`` after every case, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cases import Case
    from .gpu_bounds import Rates
    from .gpu_report import Row
    from .time_limits import TimeLimits

BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
STEPS = (16, 64, 256, 1024, 2048)
HIDDEN = (64, 128, 256, 512, 1024)
RESETS = (0.0, 0.005, 0.05)
MODES = ("ieee", "tf32", "tf32x3", "bfloat16")
INPUTS = 64
# Rows times steps times units beyond which a case is left out: activations of 8 GB.
_LARGEST = 2**29
_QUICK_STRIDE = 31
# Of a quick run; the case that is running then ends, too.
_QUICK_MINUTES = 7.0
_QUICK_CALL_SECONDS = 2.0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="every 31st case, 7 minutes")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["ieee", "tf32"])
    parser.add_argument("--budget", type=float, default=0.2, help="seconds of samples")
    parser.add_argument("--call-seconds", type=float, help="limit of a call (20; quick: 2)")
    parser.add_argument("--minutes", type=float, help="stop after these (never; quick: 7)")
    parser.add_argument("--output", type=Path, default=Path("bench-gpu"), help="folder")
    options = parser.parse_args(arguments)
    if options.call_seconds is None:
        options.call_seconds = _QUICK_CALL_SECONDS if options.quick else 20.0
    if options.minutes is None and options.quick:
        options.minutes = _QUICK_MINUTES
    return options


def grid(options: argparse.Namespace) -> list[tuple[Case, str]]:
    """Return the cases to run, each with the mode of its products."""
    cases = list(_all_cases(options))
    if options.quick:
        cases = cases[::_QUICK_STRIDE]
        # Time may be over before all have run: the finished ones should be of all sizes.
        random.Random(0).shuffle(cases)
    part, parts = map(int, options.part.split("/"))
    if not 1 <= part <= parts:
        sys.exit(f"--part {options.part}: expected I/N with 1 <= I <= N, such as 2/8.")
    return cases[part - 1 :: parts]


def _all_cases(options: argparse.Namespace) -> Iterator[tuple[Case, str]]:
    from .cases import Case, Shape

    sizes = (BATCHES, STEPS, HIDDEN, RESETS)
    if options.dry_run:
        sizes = ((2,), (5,), (4,), (0.0, 0.3))
    for mode, cell in itertools.product(options.modes, ("LSTM", "GRU")):
        for B, T, H, resets in itertools.product(*sizes):
            if B * T * H <= _LARGEST:
                yield Case(cell, Shape(B, T, INPUTS if not options.dry_run else 3, H), resets), mode


def measure(
    case: Case, mode: str, device: str, budget: float, limits: TimeLimits, out: Mapping[str, str]
) -> list[Row]:
    """Time all contestants on a case, forward and both, in turns.

    Args:
        case: to run.
        mode: of the products.
        device: ``"cuda"`` or ``"cpu"``.
        budget: seconds of samples of each.
        limits: of calls and of the run.
        out: who takes no part, and why.
    """
    from .cases import make_batch
    from .gpu_contestants import ALL, make_contestant, peak_bytes, seconds, set_library
    from .gpu_report import Row

    set_library(mode)
    batch = make_batch(case, device)
    rows = []
    for phase in ("forward", "both"):
        row, calls = Row(case, phase, mode), {}
        for name in ALL:
            if why := out.get(name) or limits.find_reason_to_skip(name, case):
                row.skipped[name] = why
                continue
            try:
                call = getattr(make_contestant(name, case, batch, mode), phase)
                call()
                if device == "cuda" and phase == "both":
                    row.bytes[name] = peak_bytes(call)
                calls[name] = call
            except Exception as error:
                # Out of memory, or no kernel for the size: the others continue. Triton's errors
                # have no base but this one.
                row.skipped[name] = _first_line(error)
            if name in row.skipped:
                _clear(device)
        row.seconds = seconds(calls, device, budget)
        for name, taken in row.seconds.items():
            limits.record(name, case, taken)
        rows.append(row)
    del batch, calls
    _clear(device)
    return rows


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _clear(device: str) -> None:
    """Free unused memory; raise if the GPU has failed, after which nothing runs on it."""
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def check(device: str, mode: str) -> dict[str, str]:
    """Compare what contestants compute with what the plain hand-written operator does.

    Episodes that start within a row start from zeros, so that those who read no stored state there
    take part. None is shown a reset that it would ignore.

    Returns:
        Who of the others takes no part, for it fails or computes something else, and why.

    Raises:
        AssertionError: if one of our own computes something else.
    """
    from .cases import Case, Shape, make_batch
    from .contestants import NATIVE, SCAN, compare
    from .gpu_contestants import ALL, NEEDS_GPU, TORCHRL, make_contestant, set_library

    set_library(mode)
    out: dict[str, str] = {name: "needs a GPU" for name in NEEDS_GPU if device == "cpu"}
    for cell, resets in itertools.product(("LSTM", "GRU"), (0.0, 0.3)):
        shape = Shape(2, 5, 3, 4) if device == "cpu" else Shape(40, 70, 24, 200)
        case = Case(cell, shape, resets)
        batch = make_batch(case, device)
        expected = make_contestant(SCAN, case, batch, mode).both()
        for name in ALL:
            if name in out or (resets and name == NATIVE):
                continue
            try:
                results: dict[str, Any] = {SCAN: expected}
                results[name] = make_contestant(name, case, batch, mode).both()
                compare(results, case, 1e-4 if mode in ("ieee", "tf32x3") else 5e-2)
            except Exception as error:
                if name not in (*TORCHRL, NATIVE):
                    raise
                out[name] = _first_line(error)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark."""
    options = parse(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from .gpu_bounds import H100, measure_rates
    from .gpu_contestants import seconds
    from .time_limits import TimeLimits

    device = "cpu" if options.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_gpu needs a CUDA device and there is none. --dry-run shows that it runs.")
    options.output.mkdir(parents=True, exist_ok=True)
    limits = TimeLimits(options.call_seconds, options.minutes)
    out = {mode: check(device, mode) for mode in options.modes}
    rates = H100
    if device == "cuda":
        rates = measure_rates(lambda call: seconds({"": call}, device, options.budget)[""])
    rows: list[Row] = []
    cases = grid(options)
    for done, (case, mode) in enumerate(cases, 1):
        if limits.is_over:
            break
        rows += measure(case, mode, device, options.budget, limits, out[mode])
        _write(options, rows, rates, device, f"{done} of {len(cases)}")
        print(f"{case.cell} {case.shape} {case.resets} {mode}: {rows[-1].seconds}", flush=True)
    return 0


def _write(
    options: argparse.Namespace, rows: list[Row], rates: Rates, device: str, cases: str
) -> None:
    from .gpu_report import report

    text = report(rows, rates, {**_machine(device), "cases": cases}, options.dry_run)
    (options.output / "gpu.md").write_text(text)
    figures = [asdict(row) for row in rows]
    (options.output / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n")


def _machine(device: str) -> dict[str, str]:
    import torch
    import torchrl
    import triton

    name = torch.cuda.get_device_name() if device == "cuda" else "none: a CPU"
    return {
        "GPU": name,
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "Triton": triton.__version__,
        "TorchRL": torchrl.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
