"""Time the linear cells beside ``nn.GRU``, ``nn.LSTM`` and rnnkeys' GRU, interleaved in one run.

    python -m benchmarks.linear_cells                    # writes benchmarks/results/linear_cells.md
    python -m benchmarks.linear_cells --repeats 3 --output /tmp/cells.md

A call is forward and backward through the module, with the state after every step written. The
tables give medians of ratios, which depend less on the machine than times do.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import nn
from torch.nn import functional as F

from rnnkeys import recurrent_module, set_recurrent_mode

SHAPES = [(16, 64, 64, 128), (64, 128, 64, 128), (32, 512, 64, 128), (8, 1024, 64, 256)]
SHAPES += [(2, 2048, 64, 128), (1, 4096, 64, 128)]
CELLS = ("mingru", "minlstm", "lru", "s5", "ffm", "gru")
LONG = 512
OUTPUT = Path(__file__).parent / "results" / "linear_cells.md"
Shape = tuple[int, int, int, int]
Call = Callable[[], None]


def make_calls(shape: Shape) -> dict[str, Call]:
    """Make what is timed for one shape ``(B, T, I, H)``, by name."""
    batch, steps, inputs, hidden = shape
    x = torch.randn(batch, steps, inputs)
    calls: dict[str, Call] = {}
    for name in CELLS:
        for rate in (0.0, 0.1):
            calls[f"{name} {rate}"] = _module_call(name, x, hidden, rate)
    for name, layer in (("nn.GRU", nn.GRU), ("nn.LSTM", nn.LSTM)):
        calls[name] = _layer_call(layer(inputs, hidden, batch_first=True), x)
    weight = torch.randn(2 * hidden, inputs).div_(inputs**0.5).requires_grad_()
    calls["projections"] = lambda: F.linear(x, weight).sum().backward()
    return calls


def _module_call(name: str, x: torch.Tensor, hidden: int, rate: float) -> Call:
    module = recurrent_module(name, x.shape[-1], hidden, block="plain", in_key="x", out_key="y")
    shape = x.shape[:2]
    states = {
        key: torch.zeros(*shape, 1, size)
        for key, size in zip(module.state_keys, module.state_sizes, strict=True)
    }
    flags = torch.rand(*shape, 1) < rate
    data = TensorDict({"x": x, "is_init": flags, **states}, shape)

    def call() -> None:
        with set_recurrent_mode(True):
            module(data.copy())["y"].sum().backward()

    return call


def _layer_call(layer: nn.RNNBase, x: torch.Tensor) -> Call:
    return lambda: layer(x)[0].sum().backward()


def time_calls(calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    """Run every call ``repeats`` times, in random order within each round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name in random.sample(list(calls), len(calls)):
            began = time.perf_counter()
            calls[name]()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
    """Return the median over rounds of the time of ``a`` over that of ``b``."""
    pairs = zip(seconds[a], seconds[b], strict=True)
    return statistics.median(x / y for x, y in pairs)


def write_table(measured: dict[Shape, dict[str, list[float]]], path: Path, repeats: int) -> None:
    """Write the table of ratios, and the goals beside what was measured."""
    lines = [
        "# Linear cells",
        "",
        f"`python -m benchmarks.linear_cells --repeats {repeats}`: torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}, float32, forward and backward "
        "through the module, states at every step, resets with a chance of .1 per step unless "
        "said. Median ratios of times; smaller is faster.",
        "",
        "| (B, T), I, H | minGRU, ms | / nn.GRU | / nn.LSTM | / rnnkeys' GRU | / projections | "
        "resets / none | minLSTM / minGRU | LRU / minGRU | S5 / minGRU | FFM / minGRU |",
        "|---" * 11 + "|",
    ]
    for shape, seconds in measured.items():
        own = "mingru 0.1"
        numbers = [
            ratio(seconds, "mingru 0.0", "nn.GRU"),
            ratio(seconds, "mingru 0.0", "nn.LSTM"),
            ratio(seconds, own, "gru 0.1"),
            ratio(seconds, "mingru 0.0", "projections"),
            ratio(seconds, own, "mingru 0.0"),
            *(ratio(seconds, f"{name} 0.1", own) for name in ("minlstm", "lru", "s5", "ffm")),
        ]
        batch, steps, inputs, hidden = shape
        milliseconds = 1e3 * statistics.median(seconds[own])
        cells = [f"({batch}, {steps}), {inputs}, {hidden}", f"{milliseconds:.1f}"]
        lines.append("| " + " | ".join([*cells, *(f"{n:.2f}" for n in numbers)]) + " |")
    long = [seconds for shape, seconds in measured.items() if shape[1] >= LONG]
    lines += ["", *_goals(long), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def _goals(long: Sequence[dict[str, list[float]]]) -> list[str]:
    def mean(a: str, b: str) -> float:
        return math.exp(statistics.fmean(math.log(ratio(s, a, b)) for s in long))

    rows = [
        ("faster than `nn.GRU`, no resets", 1 / mean("mingru 0.0", "nn.GRU"), "5 or more"),
        ("faster than `nn.LSTM`, no resets", 1 / mean("mingru 0.0", "nn.LSTM"), "2 or more"),
        ("faster than rnnkeys' GRU, resets", 1 / mean("mingru 0.1", "gru 0.1"), "2 or more"),
        ("over its projections alone", mean("mingru 0.0", "projections"), "3 or less"),
        ("resets .1 over none", mean("mingru 0.1", "mingru 0.0"), "1.05 or less"),
    ]
    table = [f"| {name} | {value:.2f} | {goal} |" for name, value, goal in rows]
    return [
        f"Geometric means of minGRU over the shapes of {LONG} steps and more:",
        "",
        "| | measured | goal |",
        "|---|---|---|",
        *table,
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all shapes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each (default: 7)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the table")
    options = parser.parse_args(arguments)
    measured: dict[Shape, dict[str, list[float]]] = {}
    for shape in SHAPES:
        measured[shape] = time_calls(make_calls(shape), options.repeats)
        print(shape, {k: f"{1e3 * statistics.median(v):.1f}" for k, v in measured[shape].items()})
    write_table(measured, options.output, options.repeats)


if __name__ == "__main__":
    main()
