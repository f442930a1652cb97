"""Show that long use takes no more and more memory.

    python -m benchmarks.soak                                  # 10^6 single steps, 10^4 updates
    python -m benchmarks.soak --steps 20000 --updates 200

Single steps: modules step batches whose size changes, and every tenth step is one of a
:class:`rnnkeys.deploy.StatefulPolicy` that clients join and leave. Updates: forward, backward and
optimizer step on sequences whose shape, resets and stored states change. The second half of each
run repeats the draws of the first, which filled every cache: what grows there is never freed.
Results go to ``benchmarks/results/soak.md``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict

import rnnkeys
from rnnkeys import set_recurrent_mode
from rnnkeys.deploy import StatefulPolicy

from .machine import cpu_facts
from .tables import table

RESULTS = Path(__file__).resolve().parent / "results" / "soak.md"
MODULES: dict[str, Any] = {"LSTM": rnnkeys.LSTMModule, "GRU": rnnkeys.GRUModule}
SIZES = {"input_size": 8, "hidden_size": 32}
PARTS = 20
CLIENTS = 16


class Malloc(ctypes.Structure):
    """What glibc's ``mallinfo2`` returns."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def count_given_out() -> int:
    """Return the bytes that malloc has given out; 0 with another C library than glibc."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = Malloc
    found = mallinfo()
    return found.uordblks + found.hblkhd


class Sample(NamedTuple):
    """What the process holds after a part of the run.

    Attributes:
        done: steps or updates until then.
        resident: bytes of the process in physical memory, with what malloc keeps for later.
        given_out: bytes that malloc has given out, to torch, oneDNN and Python.
        blocks: pieces of memory that Python holds.
        tensors: tensors that are alive.
    """

    done: int
    resident: int
    given_out: int
    blocks: int
    tensors: int


def take_sample(done: int) -> Sample:
    """Collect garbage, and count what is left; resident memory is 0 where Linux's /proc is not."""
    gc.collect()
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    # By type alone: isinstance asks an object for its __class__, which some answer with a warning.
    tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    return Sample(done, pages * 4096, count_given_out(), sys.getallocatedblocks(), tensors)


def growth(values: Sequence[int]) -> int:
    """Return how much a count grew in the second half of a run.

    Examples:
        >>> growth([1, 4, 4, 5])
        1
    """
    return values[-1] - values[len(values) // 2 - 1]


def make_module(name: str, **options: Any) -> Any:
    return MODULES[name](**SIZES, in_key="x", out_key="y", **options)


def draw_flags(draw: random.Random, batch: int, steps: int) -> torch.Tensor:
    """Draw ``is_init`` flags ``[B, T, 1]``: never, rarely, often, or by one period in all rows."""
    flags = torch.zeros(batch, steps, 1, dtype=torch.bool)
    kind = draw.choice(["never", "random", "periodic"])
    if kind == "random":
        flags = torch.rand(batch, steps, 1) < draw.choice([0.01, 0.1, 0.5])
    elif kind == "periodic":
        flags[:, :: draw.randint(1, steps)] = True
    return flags


def updates(draw: random.Random) -> Iterator[None]:
    """Train modules on ever changing batches; one update for each value."""
    modules = [make_module(name, num_layers=layers) for name in MODULES for layers in (1, 2)]
    optimizers = [torch.optim.Adam(module.parameters()) for module in modules]
    while True:
        place = draw.randrange(len(modules))
        batch, steps = draw.randint(1, 16), draw.randint(1, 48)
        entries = {
            "x": torch.randn(batch, steps, SIZES["input_size"]),
            "is_init": draw_flags(draw, batch, steps),
        }
        for key in modules[place].state_keys:
            layers = modules[place].layers.num_layers
            entries[key] = torch.randn(batch, steps, layers, SIZES["hidden_size"])
            if draw.random() < 0.5:
                entries[key].zero_()
        with set_recurrent_mode(True):
            out = modules[place](TensorDict(entries, [batch, steps]))
        optimizers[place].zero_grad()
        out["y"].square().mean().backward()
        optimizers[place].step()
        yield


def single_steps(draw: random.Random) -> Iterator[None]:
    """Step modules and a policy with clients that join and leave; one step for each value."""
    modules = [make_module(name) for name in MODULES]
    player = StatefulPolicy(modules[0], 4, observation_key="x", action_key="y")
    numbers, clients = count(), list[str]()
    data = [TensorDict({}, []) for _ in modules]
    for step in count():
        place = step % len(modules)
        if step % 10 == 0:
            _serve(player, draw, clients, numbers)
        else:
            x = torch.randn(draw.randint(1, 8), SIZES["input_size"])
            flags = torch.rand(len(x), 1) < 0.05
            if data[place].batch_size != x.shape[:1]:
                data[place] = TensorDict({}, x.shape[:1])
                flags[:] = True
            data[place]["x"], data[place]["is_init"] = x, flags
            with torch.no_grad():
                out = modules[place](data[place])
            data[place] = out["next"].clone()
        yield


def _serve(
    player: StatefulPolicy, draw: random.Random, clients: list[str], numbers: Iterator[int]
) -> None:
    """Let a client join under a name that was never used, call, and let others leave or restart."""
    clients.append(f"client {next(numbers)}")
    *others, new = clients
    called = [new, *draw.sample(others, draw.randint(0, len(others)))]
    player(torch.randn(len(called), SIZES["input_size"]), ids=called)
    if draw.random() < 0.2:
        player.reset(draw.sample(clients, 1))
    while len(clients) > draw.randint(0, CLIENTS):
        player.remove([clients.pop(draw.randrange(len(clients)))])


def watch(make: Callable[[random.Random], Iterator[None]], number: int) -> list[Sample]:
    """Run a number of steps or updates in two equal halves, and count memory after each part."""
    samples = []
    for first in (0, PARTS // 2):
        torch.manual_seed(0)
        run = make(random.Random(0))
        for part in range(first, first + PARTS // 2):
            done, upto = part * number // PARTS, (part + 1) * number // PARTS
            for _ in islice(run, upto - done):
                pass
            samples.append(take_sample(upto))
            print(make.__name__, *samples[-1], flush=True)
    return samples


def report(what: str, samples: Sequence[Sample], minutes: float) -> str:
    """Return a table of the samples, with their growth in the second half in its last row."""
    rows = [
        [
            f"{sample.done:,}",
            f"{sample.resident / 2**20:.1f}",
            f"{sample.given_out / 2**20:.1f}",
            f"{sample.blocks:,}",
            f"{sample.tensors:,}",
        ]
        for sample in samples
    ]
    resident, given_out, blocks, tensors = (
        growth(column) for column in list(zip(*samples, strict=True))[1:]
    )
    grown = [f"{resident / 2**20:+.1f}", f"{given_out / 2**20:+.1f}"]
    grown += [f"{blocks:+,}", f"{tensors:+}"]
    rows.append(["growth in the second half", *grown])
    head = (what, "resident (MiB)", "given out by malloc (MiB)", "pieces of Python", "tensors")
    return f"{samples[-1].done:,} {what} in {minutes:.0f} minutes:\n\n{table(head, rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Watch memory over long use.", allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=10**6)
    parser.add_argument("--updates", type=int, default=10**4)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    text = [
        "# Long use",
        "Written by `python -m benchmarks.soak`. Memory after a garbage collection, while shapes "
        "and resets change with every call. The second half repeats the draws of the first.",
        table(("", ""), list(cpu_facts(1).items())),
    ]
    for make, number in ((updates, options.updates), (single_steps, options.steps)):
        began = time.monotonic()
        samples = watch(make, number)
        what = make.__name__.replace("_", " ")
        text.append(report(what, samples, (time.monotonic() - began) / 60))
    options.output.write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
