"""Times recurrent layers on a GPU: ``make bench-gpu``.

Batches of 1 to 4096 rows, 16 to 2048 steps, 64 to 1024 units, several chances of a reset, forward
and forward with backward, with peak memory, against TorchRL's backends, cuDNN without resets and
the plain hand-written operator, as a share of what memory and matmul throughput allow.

    python -m benchmarks.bench_gpu                     # all; hours
    python -m benchmarks.bench_gpu --quick             # a tenth, spread over all sizes; minutes
    python -m benchmarks.bench_gpu --part 2/8          # one of eight parts
    python -m benchmarks.bench_gpu --dry-run           # tiny sizes on a CPU: does everything run?

Before it times, it checks that all contestants compute the same. The report and the figures go to
``--output`` after every case, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cases import Case
    from .gpu_report import Row

BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
STEPS = (16, 64, 256, 1024, 2048)
HIDDEN = (64, 128, 256, 512, 1024)
RESETS = (0.0, 0.005, 0.05)
MODES = ("ieee", "tf32", "tf32x3", "bfloat16")
INPUTS = 64
# Rows times steps times units beyond which a case is left out: activations of 8 GB.
_LARGEST = 2**29
_QUICK_STRIDE = 11


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="every eleventh case")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["ieee", "tf32"])
    parser.add_argument("--budget", type=float, default=0.2, help="seconds of samples")
    parser.add_argument("--output", type=Path, default=Path("bench-gpu"), help="folder")
    return parser.parse_args(arguments)


def grid(options: argparse.Namespace) -> list[tuple[Case, str]]:
    """Return the cases to run, each with the mode of its products."""
    cases = list(_all_cases(options))
    if options.quick:
        cases = cases[::_QUICK_STRIDE]
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


def measure(case: Case, mode: str, device: str, budget: float) -> list[Row]:
    """Time all contestants on a case, forward and both, one after the other."""
    import torch

    from .gpu_contestants import ALL, NEEDS_GPU, Contestant, peak_bytes, seconds, set_library
    from .gpu_report import Row

    set_library(mode)
    forward, both = Row(case, "forward", mode), Row(case, "both", mode)
    for name in ALL:
        if device == "cpu" and name in NEEDS_GPU:
            forward.skipped[name] = both.skipped[name] = "needs a GPU"
            continue
        try:
            contestant = Contestant(name, case, device, mode)
            forward.seconds[name] = seconds(contestant.forward, device, budget)
            if device == "cuda":
                both.bytes[name] = peak_bytes(contestant.both)
            both.seconds[name] = seconds(contestant.both, device, budget)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            # Out of memory, or no kernel for the size: the others go on.
            forward.skipped[name] = both.skipped[name] = str(error).splitlines()[0][:120]
            if device == "cuda":
                torch.cuda.empty_cache()
    return [forward, both]


def check(device: str, mode: str) -> None:
    """Stop unless all contestants compute the same outputs and gradients.

    All stored states are zero, so that those who cannot read one take part, and none is shown a
    reset that it would ignore.
    """
    from .cases import Case, Shape
    from .contestants import _compare
    from .gpu_contestants import ALL, CUDNN, NEEDS_GPU, Contestant, set_library

    set_library(mode)
    for cell, resets in itertools.product(("LSTM", "GRU"), (0.0, 0.3)):
        shape = Shape(2, 5, 3, 4) if device == "cpu" else Shape(40, 70, 24, 200)
        case = Case(cell, shape, resets)
        names = [n for n in ALL if not (device == "cpu" and n in NEEDS_GPU)]
        if resets:
            names.remove(CUDNN)
        results: dict[str, Any] = {n: Contestant(n, case, device, mode).both() for n in names}
        _compare(results, case, 1e-4 if mode in ("ieee", "tf32x3") else 5e-2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark."""
    options = parse(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from .gpu_bounds import H100, measure_rates
    from .gpu_contestants import seconds
    from .gpu_report import report

    device = "cpu" if options.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_gpu needs a CUDA device and there is none. --dry-run shows that it runs.")
    options.output.mkdir(parents=True, exist_ok=True)
    for mode in options.modes:
        check(device, mode)
    rates = H100
    if device == "cuda":
        rates = measure_rates(lambda call: seconds(call, device, options.budget))
    rows: list[Row] = []
    for case, mode in grid(options):
        rows += measure(case, mode, device, options.budget)
        text = report(rows, rates, _machine(device), options.dry_run)
        (options.output / "gpu.md").write_text(text)
        figures = [asdict(row) for row in rows]
        (options.output / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(f"{case.cell} {case.shape} {case.resets} {mode}: {rows[-1].seconds}", flush=True)
    return 0


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
