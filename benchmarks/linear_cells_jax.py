"""Time LRU and minGRU beside JAX's on the same CPU: memax's LRU, and a minGRU by associative scan.

    python -m venv /tmp/jax && /tmp/jax/bin/pip install jax memax equinox
    python -m benchmarks.linear_cells_jax --python /tmp/jax/bin/python

It writes benchmarks/results/linear_cells_jax.md. The processes run in turns, one thread each. A
call is forward and backward with resets of .1, compiled in JAX, without compile time; the smallest
CPU time of all calls counts. memax has no minGRU, so that one is written here, without module or
checks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .child_process import run_module
from .tables import table

# Rows, steps, input and hidden size; memax's LRU has one size for both.
SHAPES = {"lru": [(32, 512, 128, 128), (2, 2048, 128, 128)]}
SHAPES["mingru"] = [(32, 512, 64, 128), (2, 2048, 64, 128)]
OUTPUT = Path(__file__).parent / "results" / "linear_cells_jax.md"
_CALLS = 5
_TURNS = 2


def fastest(call: Callable[[], object]) -> float:
    """Return the smallest CPU time of some calls, in milliseconds, after a first one."""
    call()
    times = []
    for _ in range(_CALLS):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return 1e3 * min(times)


def measure_jax() -> list[float]:
    """Measure in an environment that has JAX, equinox and memax."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    import jax

    losses = {"lru": _make_memax_lru, "mingru": _make_mingru}
    found = []
    for name, shapes in SHAPES.items():
        for batch, steps, inputs, hidden in shapes:
            key = jax.random.PRNGKey(0)
            x = jax.random.normal(key, (batch, steps, inputs))
            start = jax.random.uniform(key, (batch, steps)) < 0.1
            loss, parameters = losses[name](key, inputs, hidden)
            gradient = jax.jit(jax.grad(loss))
            found.append(
                fastest(
                    lambda g=gradient, p=parameters, x=x, s=start: jax.block_until_ready(g(p, x, s))
                )
            )
    return found


def _make_memax_lru(key, inputs, hidden):
    import equinox
    import jax
    from memax.equinox.semigroups.lru import LRU

    layer = LRU(hidden, inputs, key)
    initial = layer.initialize_carry()
    parameters, rest = equinox.partition(layer, equinox.is_inexact_array)

    def loss(parameters, x, start):
        layer = equinox.combine(parameters, rest)
        return jax.vmap(lambda x, s: layer(initial, (x, s))[1])(x, start).sum()

    return loss, parameters


def _make_mingru(key, inputs, hidden):
    import jax
    from jax import numpy as jnp

    def join(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def loss(weight, x, start):
        u, v = jnp.split(x @ weight, 2, -1)
        z = jax.nn.sigmoid(u)
        b = z * jnp.where(v >= 0, v + 0.5, jax.nn.sigmoid(v))
        a = jnp.where(start[..., None], 0, 1 - z)
        return jax.lax.associative_scan(join, (a, b), axis=1)[1].sum()

    return loss, jax.random.normal(key, (inputs, 2 * hidden)) / inputs**0.5


def measure_rnnkeys() -> list[float]:
    """Measure the modules of this package."""
    import torch

    from benchmarks.linear_cells import make_module_call

    torch.set_num_threads(1)
    return [
        fastest(make_module_call(name, torch.randn(batch, steps, inputs), hidden, 0.1))
        for name, shapes in SHAPES.items()
        for batch, steps, inputs, hidden in shapes
    ]


def ask(python: str, who: str) -> list[float]:
    """Measure in a process of its own."""
    module, variables = "benchmarks.linear_cells_jax", {"OMP_NUM_THREADS": "1"}
    return run_module(module, "--measure", who, variables=variables, python=python)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in turns and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--python", help="interpreter with jax, equinox and memax")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the table")
    parser.add_argument("--measure", choices=["jax", "rnnkeys"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure_jax() if options.measure == "jax" else measure_rnnkeys()))
        return
    if options.python is None:
        parser.error("--python is missing: name an interpreter that has jax, equinox and memax")
    ours, theirs = [], []
    for _ in range(_TURNS):
        ours.append(ask(sys.executable, "rnnkeys"))
        theirs.append(ask(options.python, "jax"))
    ours, theirs = ([min(times) for times in zip(*turns, strict=True)] for turns in (ours, theirs))
    whose = {"lru": "memax's LRU", "mingru": "minGRU by `jax.lax.associative_scan`"}
    cases = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]
    rows = [
        (
            whose[name],
            ", ".join(map(str, shape)),
            f"{own:.1f}",
            f"{other:.1f}",
            f"{other / own:.2f}",
        )
        for (name, shape), own, other in zip(cases, ours, theirs, strict=True)
    ]
    parts = [
        "# Linear cells beside JAX",
        "`python -m benchmarks.linear_cells_jax`: CPU time of one thread in milliseconds, forward "
        "and backward with resets of .1, compiled in JAX, without compile time; processes "
        "in turns.",
        table(("", "B, T, I, H", "rnnkeys", "JAX", "JAX / rnnkeys"), rows),
    ]
    options.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
