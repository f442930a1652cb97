"""Count the gradient steps after which a cell recalls a cue from far back.

    python -m benchmarks.recall                               # writes benchmarks/results/recall.md
    python -m benchmarks.recall --cells gru lru --seeds 0 --output recall.md

It is the memory of the passive T-maze alone, without exploration and rewards: a sequence is the
observations of the shortest path (:class:`benchmarks.tasks.PassiveTMaze`), and a classifier reads
the side of the cue from the output at the last step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from rnnkeys import recurrent_module

from .cells import HIDDEN, run
from .tables import table

CELLS = ("gru", "lstm", "mingru", "minlstm", "lru", "s5", "ffm")
OUTPUT = Path(__file__).parent / "results" / "recall.md"
MAGNIFY = 10.0  # factor on observations: a cue that stands out from the corridor
BATCH = 32
LEARNED = 0.05  # cross-entropy, the mean of 10 batches; guessing has 0.69
TEXT = """# Recall of a cue from {length} steps back

Made by `python -m benchmarks.recall`. A sequence is the observations of the shortest path in the
passive T-maze, a corridor of {length}: a cue at the first step, zeros, and the junction. A
classifier reads the side of the cue from one layer of {hidden} at the last step; cells are alone,
without the residual block, and start as they do by default. Adam, learning rate 3e-3, {batch}
sequences in a batch. The table counts gradient steps until the cross-entropy is below {learned},
over 10 batches; guessing has 0.69. This is supervised learning: an agent must also learn to walk
and to turn.

{table}

torch {torch}, one thread per run.
"""


def make_batch(size: int, length: int) -> tuple[Tensor, Tensor]:
    """Return observations of the shortest path, float32 ``[size, length + 1, 2]``, and sides.

    Args:
        size: number of sequences.
        length: length of the corridor.

    Examples:
        >>> observations, sides = make_batch(1, 2)
        >>> bool(observations[0, 0, 1] == MAGNIFY * (2 * sides[0] - 1))
        True
        >>> observations[0, 1:].tolist()
        [[0.0, 0.0], [10.0, 0.0]]
    """
    sides = torch.randint(2, (size,))
    observations = torch.zeros(size, length + 1, 2)
    observations[:, 0, 1] = MAGNIFY * (2 * sides - 1)
    observations[:, -1, 0] = MAGNIFY
    return observations, sides


def count_updates(cell: str, seed: int, length: int, limit: int) -> int | None:
    """Return the gradient steps until a cell recalls the cue, or None after ``limit`` steps."""
    torch.manual_seed(seed)
    module = recurrent_module(cell, 2, HIDDEN, block="plain", in_key="x", out_key="y")
    head = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2))
    weights = [*module.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(weights, lr=3e-3, eps=1e-5)
    losses: list[float] = []
    for update in range(1, limit + 1):
        observations, sides = make_batch(BATCH, length)
        loss = nn.functional.cross_entropy(head(run(module, observations)[:, -1]), sides)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
        losses = [*losses[-9:], loss.item()]
        if len(losses) == 10 and sum(losses) / 10 < LEARNED:
            return update
    return None


def main(argv: list[str] | None = None) -> None:
    """Run every cell with every seed, and write the table to ``--output``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(3))
    parser.add_argument("--length", type=int, default=250, help="of the corridor")
    parser.add_argument("--limit", type=int, default=400, help="gradient steps at most")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    for cell in args.cells:
        counts = [count_updates(cell, seed, args.length, args.limit) for seed in args.seeds]
        words = [f"more than {args.limit}" if count is None else str(count) for count in counts]
        print(cell, *words, sep=", ", flush=True)
        rows.append([f'`"{cell}"`', ", ".join(words)])
    header = ["cell", f"gradient steps, seeds {', '.join(map(str, args.seeds))}"]
    text = TEXT.format(
        length=args.length,
        hidden=HIDDEN,
        batch=BATCH,
        learned=LEARNED,
        table=table(header, rows),
        torch=torch.__version__,
    )
    args.output.write_text(text)


if __name__ == "__main__":
    main()
