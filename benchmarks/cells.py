"""Compare the cells of ``recurrent_module``: size, cost, rounding, and what they learn at first.

    python -m benchmarks.cells --output benchmarks/results/cells.md

Each cell has 4 inputs and 64 outputs, in one layer, float32, one thread. Times are medians of calls
in turns. The last column is a small task: the velocity of a random walk from its positions, after
few gradient steps, as a share of the velocity's variance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rnnkeys import CellName, recurrent_module, set_recurrent_mode

from .machine import cpu_facts
from .tables import digits, table
from .timing import Budget, interleave

INPUTS, HIDDEN = 4, 64
LINEAR = ("mingru", "minlstm", "lru", "s5", "s6", "ffm")
HEADER = (
    *("cell", "block", "parameters", "state", "step, us", "sequences, ms"),
    *("float32 error", "velocity"),
)


def make(cell: str, block: str, inputs: int = INPUTS) -> Any:
    """Return a module that reads "x" and writes "y"."""
    torch.manual_seed(0)
    return recurrent_module(cell, inputs, HIDDEN, block=block, in_key="x", out_key="y")


def make_batch(x: Tensor, module: Any) -> TensorDict:
    """Return a batch of one episode in each row, or of single steps of a running episode."""
    is_init = torch.zeros(*x.shape[:-1], 1, dtype=torch.bool)
    batch = TensorDict({"x": x, "is_init": is_init}, x.shape[:-1])
    for key, size in zip(module.state_keys, module.state_sizes, strict=True):
        batch.set(key, x.new_zeros(*x.shape[:-1], 1, size))
    return batch


def run(module: Any, x: Tensor) -> Tensor:
    """Run whole sequences ``[B, T, I]``."""
    with set_recurrent_mode(True):
        return module(make_batch(x, module))["y"]


def time_calls(calls: list[Callable[[], Any]], rounds: int, sample: float) -> list[float]:
    """Return the median seconds of each call; all calls take turns in every round."""
    timings = interleave(dict(enumerate(calls)), Budget(0.0, rounds, rounds, sample))
    return [timings[place].median for place in range(len(calls))]


def step_call(module: Any) -> Callable[[], Any]:
    """Return a call that runs one step of one environment."""
    batch = make_batch(torch.randn(1, INPUTS), module)
    return torch.no_grad()(lambda: module(batch))


def train_call(module: Any, batch: int, steps: int) -> Callable[[], Any]:
    """Return a call that runs sequences forward and backward."""
    x = torch.randn(batch, steps, INPUTS)
    return lambda: run(module, x).sum().backward()


def rounding(module: Any, steps: int) -> float:
    """Return the largest difference of float32 from float64, over the largest output."""
    x = torch.randn(2, steps, INPUTS, dtype=torch.float64)
    with torch.no_grad():
        single = run(module, x.float()).double()
        exact = run(module.double(), x)
    module.float()
    return ((single - exact).abs().max() / exact.abs().max()).item()


def learn_velocity(cell: str, block: str, updates: int) -> float:
    """Return the error of the velocity that a trained layer and a head estimate."""
    module = make(cell, block, inputs=1)
    head = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=1e-3)
    errors = []
    for _ in range(updates):
        velocity = _walk(torch.randn(16, 64, 1), 0.9)
        position = _walk(0.1 * velocity, 0.98)
        error = (head(run(module, position)) - velocity)[:, 8:].square().mean() / velocity.var()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    return median(errors[-20:])


def _walk(steps: Tensor, decay: float) -> Tensor:
    total, values = torch.zeros_like(steps[:, 0]), []
    for step in steps.unbind(1):
        total = decay * total + step
        values.append(total)
    return torch.stack(values, 1)


def measure(args: argparse.Namespace) -> list[list[str]]:
    """Return a row of the table for each cell and block."""
    cases = [(cell, "plain") for cell in get_args(CellName)]
    cases += [(cell, "residual") for cell in LINEAR]
    modules = [make(*case) for case in cases]
    steps = time_calls([step_call(m) for m in modules], args.rounds, 2e-3)
    trains = time_calls([train_call(m, 8, args.steps) for m in modules], args.rounds, 0.0)
    rows = []
    for case, module, step, train in zip(cases, modules, steps, trains, strict=True):
        error = rounding(module, 8 * args.steps)
        velocity = learn_velocity(*case, args.updates)
        sizes = (sum(p.numel() for p in module.parameters()), sum(module.state_sizes))
        times = (digits(1e6 * step), digits(1e3 * train))
        rows.append([*case, *map(str, sizes), *times, f"{error:.0e}", f"{velocity:.3f}"])
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, and print the table or write it to ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=512, help="of a sequence")
    parser.add_argument("--updates", type=int, default=300, help="gradient steps of the task")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = measure(args)
    facts = ", ".join(f"{name} {value}" for name, value in cpu_facts(1).items() if name != "CPU")
    text = (
        f"# Cells\n\nMade by `python -m benchmarks.cells`. One layer, {INPUTS} inputs, {HIDDEN} "
        f"outputs, float32. *step*: one environment, no gradient; *sequences*: 8 of {args.steps} "
        f"steps, forward and backward; *float32 error*: against float64 after {8 * args.steps} "
        "steps, relative to the largest output; *velocity*: error of the velocity of a random "
        f"walk, estimated from its positions after {args.updates} gradient steps, as a share of "
        f"its variance.\n\n{table(HEADER, rows)}\n\n{facts}\n"
    )
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
