"""Time the linear cells beside ``nn.GRU``, ``nn.LSTM`` and rnnkeys' GRU, interleaved in one run.

    python -m benchmarks.linear_cells                    # writes benchmarks/results/linear_cells.md
    python -m benchmarks.linear_cells --repeats 3 --output /tmp/cells.md

A call is forward and backward through the module, with the state after every step written. One
thread's CPU time is measured, which counts no time that another process takes. The tables give
medians of ratios, which depend less on the machine than times do.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import nn
from torch.nn import functional as F

from rnnkeys import recurrent_module, set_recurrent_mode
from rnnkeys.backends import keep_freed_memory

from .memory import peak_bytes
from .tables import table
from .timing import geomean

Shape = tuple[int, int, int, int]
Call = Callable[[], object]
Seconds = dict[str, list[float]]

SHAPES: list[Shape] = [(16, 64, 64, 128), (64, 128, 64, 128), (32, 512, 64, 128)]
SHAPES += [(8, 1024, 64, 256), (2, 2048, 64, 128), (1, 4096, 64, 128)]
# The same number of steps of data in every batch.
GROWTH: list[Shape] = [(64, 64, 64, 128), (16, 256, 64, 128), (4, 1024, 64, 128)]
GROWTH += [(1, 4096, 64, 128)]
LINEAR = ("mingru", "minlstm", "lru", "s5", "ffm", "s6")
CELLS = (*LINEAR, "gru")
HALF = ("lru", "ffm")  # their state has two numbers for each of H
STEP_SIZES = (64, 128, 256)
LONG = 512
OUTPUT = Path(__file__).parent / "results" / "linear_cells.md"
_CALLS_OF_A_STEP = 200


def make_calls(shape: Shape) -> dict[str, Call]:
    """Make what is timed for one shape ``(B, T, I, H)``, by name."""
    batch, steps, inputs, hidden = shape
    x = torch.randn(batch, steps, inputs)
    calls: dict[str, Call] = {}
    for name in CELLS:
        calls[f"{name} 0.1"] = make_module_call(name, x, hidden, 0.1)
    for name in HALF:
        calls[f"{name} half"] = make_module_call(name, x, hidden // 2, 0.1)
    calls["mingru 0.0"] = make_module_call("mingru", x, hidden, 0.0)
    for name, layer in (("nn.GRU", nn.GRU), ("nn.LSTM", nn.LSTM)):
        calls[name] = _layer_call(layer(inputs, hidden, batch_first=True), x)
    weight = torch.randn(2 * hidden, inputs).div_(inputs**0.5).requires_grad_()
    calls["projections"] = lambda: F.linear(x, weight).sum().backward()
    return calls


def make_module_call(name: str, x: torch.Tensor, hidden: int, rate: float) -> Call:
    """Make a call that runs a module forward and backward over ``x [B, T, I]``, with resets."""
    module, data = _make_module(name, x, hidden)
    data["is_init"] = torch.rand(*x.shape[:2], 1) < rate

    def call() -> None:
        with set_recurrent_mode(True):
            module(data.copy())["y"].sum().backward()

    return call


def _make_module(name: str, x: torch.Tensor, hidden: int) -> tuple[Any, TensorDict]:
    module = recurrent_module(name, x.shape[-1], hidden, block="plain", in_key="x", out_key="y")
    shape = x.shape[:-1]
    states = {
        key: torch.zeros(*shape, 1, size)
        for key, size in zip(module.state_keys, module.state_sizes, strict=True)
    }
    flags = torch.zeros(*shape, 1, dtype=torch.bool)
    return module, TensorDict({"x": x, "is_init": flags, **states}, shape)


def _layer_call(layer: nn.RNNBase, x: torch.Tensor) -> Call:
    return lambda: layer(x)[0].sum().backward()


def make_step_calls(size: int) -> dict[str, Call]:
    """Make calls that run single steps of one environment, by name of the cell.

    Args:
        size: of inputs and of outputs.
    """
    return {name: _step_call(name, size) for name in CELLS}


def _step_call(name: str, size: int) -> Call:
    module, data = _make_module(name, torch.randn(1, size), size)

    def call() -> None:
        with torch.no_grad():
            for _ in range(_CALLS_OF_A_STEP):
                module(data)

    return call


def time_calls(calls: dict[str, Call], repeats: int) -> Seconds:
    """Run every call ``repeats`` times, in random order within each round."""
    seconds: Seconds = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name in random.sample(list(calls), len(calls)):
            began = time.process_time()
            calls[name]()
            if repeat:  # the first round warms up
                seconds[name].append(time.process_time() - began)
    return seconds


def ratio(seconds: Seconds, a: str, b: str) -> float:
    """Return the median over rounds of the time of ``a`` over that of ``b``."""
    pairs = zip(seconds[a], seconds[b], strict=True)
    return statistics.median(x / y for x, y in pairs)


def milliseconds(seconds: Seconds, name: str) -> float:
    """Return the median time."""
    return 1e3 * statistics.median(seconds[name])


def describe_sequences(measured: dict[Shape, Seconds]) -> Iterator[str]:
    """Yield the tables of times and of ratios."""
    names = [*(f"{name} 0.1" for name in CELLS), "mingru 0.0", "nn.GRU", "nn.LSTM", "projections"]
    yield "Milliseconds. A number after a cell is the chance of a reset at every step:"
    rows = [
        [describe(shape), *(f"{milliseconds(seconds, name):.1f}" for name in names)]
        for shape, seconds in measured.items()
    ]
    yield table(["(B, T), I, H", *names], rows)
    yield (
        "Times over those of minGRU. States have H numbers, of LRU and FFM 2 H, of S6 16 H; the "
        "last columns are LRU and FFM with H / 2, whose states have the size of minGRU's:"
    )
    names = [*(f"{name} 0.1" for name in LINEAR[1:]), *(f"{name} half" for name in HALF)]
    rows = [
        [describe(s), *(f"{ratio(x, name, 'mingru 0.1'):.2f}" for name in names)]
        for s, x in measured.items()
    ]
    yield table(["(B, T), I, H", *LINEAR[1:], *(f"{n}, H / 2" for n in HALF)], rows)


def describe(shape: Shape) -> str:
    """Return a shape as the first column shows it."""
    batch, steps, inputs, hidden = shape
    return f"({batch}, {steps}), {inputs}, {hidden}"


def describe_goals(
    measured: dict[Shape, Seconds], growth: dict[Shape, Seconds], steps: dict[int, Seconds]
) -> Iterator[str]:
    """Yield the table of goals."""
    long = [seconds for shape, seconds in measured.items() if shape[1] >= LONG]

    def mean(a: str, b: str) -> float:
        return geomean(ratio(s, a, b) for s in long)

    times = [milliseconds(seconds, "mingru 0.1") for seconds in growth.values()]
    calls = make_calls(SHAPES[2])
    memory = peak_bytes(calls["mingru 0.1"]) / peak_bytes(calls["nn.GRU"])
    goals = [
        ("times as fast as `nn.GRU`, no resets", 1 / mean("mingru 0.0", "nn.GRU"), "5 or more"),
        ("times as fast as `nn.LSTM`, no resets", 1 / mean("mingru 0.0", "nn.LSTM"), "2 or more"),
        ("times as fast as rnnkeys' GRU, resets", 1 / mean("mingru 0.1", "gru 0.1"), "2 or more"),
        ("time over its projections alone", mean("mingru 0.0", "projections"), "3 or less"),
        ("time with resets over none", mean("mingru 0.1", "mingru 0.0"), "1.05 or less"),
        (
            "slowest over fastest of T = 64 to 4096, B T constant",
            max(times) / min(times),
            "1.3 or less",
        ),
        *(
            (
                f"time of a step at B = 1 over GRUModule's, I = H = {size}",
                ratio(seconds, "mingru", "gru"),
                "1 or less",
            )
            for size, seconds in steps.items()
        ),
        (f"peak memory over `nn.GRU`'s, {describe(SHAPES[2])}", memory, "1 or less"),
    ]
    yield f"minGRU, geometric means over the shapes of {LONG} steps and more:"
    yield table(["", "measured", "goal"], [[n, f"{x:.2f}", goal] for n, x, goal in goals])
    yield "Time of a step at B = 1 without gradient, in microseconds:"
    scale = 1e3 / _CALLS_OF_A_STEP
    rows = [
        [str(size), *(f"{scale * milliseconds(seconds, name):.0f}" for name in CELLS)]
        for size, seconds in steps.items()
    ]
    yield table(["I = H", *CELLS], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all shapes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each (default: 7)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()  # without, the time of any call depends on what ran before
    measured: dict[Shape, Seconds] = {}
    for shape in SHAPES:
        measured[shape] = time_calls(make_calls(shape), options.repeats)
        print(describe(shape), flush=True)
    names = {"mingru 0.1"}
    few = [{k: v for k, v in make_calls(shape).items() if k in names} for shape in GROWTH]
    growth = {s: time_calls(c, options.repeats) for s, c in zip(GROWTH, few, strict=True)}
    steps = {size: time_calls(make_step_calls(size), 3 * options.repeats) for size in STEP_SIZES}
    parts = [
        "# Linear cells",
        f"`python -m benchmarks.linear_cells --repeats {options.repeats}`: torch "
        f"{torch.__version__}, {platform.machine()}, float32, CPU time of one thread, forward and "
        "backward through the module with the state after every step written, plain layers "
        '(`block="plain"`), in a process that keeps the memory that it frees. Medians of ratios of '
        "interleaved calls; smaller is faster.",
        *describe_goals(measured, growth, steps),
        *describe_sequences(measured),
    ]
    options.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
