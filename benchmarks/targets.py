"""Compare targets: how wrong next values are with TorchRL's modules, and how right with rnnkeys'.

    python -m benchmarks.targets                             # three minutes on one core
    python -m benchmarks.targets --seeds 3 --only DQN
    make targets                                             # writes benchmarks/results/targets.md

Every loss runs on sampled slices of a real collector's data. Each next value that it bootstraps
from is compared with a step-by-step oracle, which is written from the equations and uses nothing of
either library; the oracle, the losses and the data are those of the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensordict
import torch
import torchrl
import torchrl.modules

import rnnkeys
from benchmarks.tables import table
from rnnkeys import set_recurrent_mode
from rnnkeys.objectives import recurrent_loss
from tests.support import target_cases as cases
from tests.support import target_oracle as oracle
from tests.support.target_watch import perturbed, run
from tests.support.tolerances import TOLERANCE

_RESULT = Path(__file__).parent / "results" / "targets.md"
_CELLS = ("gru", "lstm")


class Score(NamedTuple):
    """The results of one loss: sums and largest values over batches.

    Attributes:
        wrong: next values further from the oracle's than the dtype's tolerance, of the largest.
        values: next values compared.
        error: mean distance from the oracle's next values, in their standard deviations.
        leak: largest change of a target when another slice is changed, in the same unit.
    """

    wrong: int
    values: int
    error: float
    leak: float


def score(case: cases.Case, contestant: Contestant, cell: str) -> Score:
    """Run one loss on one batch, and again with one slice changed."""
    setup = case.make(contestant.library, cell)
    if not contestant.vmap:
        without_vmap(setup.loss)
    if contestant.wire:
        recurrent_loss(setup.loss)
    batch = cases.flat(case, setup.policy)
    if not contestant.wire:
        # TorchRL's estimators raise if values are stored at the root only, or in ``next`` only.
        batch = batch.exclude("state_value")
    truth = expected(case, setup, batch)
    seen = run_in_sequences(setup.loss, batch.clone())
    live = ~batch.get(("next", "terminated"))
    truth, value = truth[live], seen.next_value.reshape(truth.shape)[live]
    distance, spread = (value - truth).abs(), truth.std()
    wrong = distance > TOLERANCE[truth.dtype] * truth.abs().max()
    other, outside = perturbed(batch)
    again = run_in_sequences(setup.loss, other)
    change = (again.target - seen.target).reshape(len(batch), -1)[outside].abs().max()
    mean = float(distance.mean() / spread)
    return Score(int(wrong.sum()), wrong.numel(), mean, float(change / spread))


def expected(case: cases.Case, setup: cases.Setup, batch: Any) -> torch.Tensor:
    """Return the oracle's next values, from the random numbers that the loss will draw."""
    torch.manual_seed(1)
    return case.expect(setup, batch, oracle.starts_of(batch)).detach()


def run_in_sequences(loss: Any, batch: Any) -> Any:
    """Run a loss as users of TorchRL do: estimators inside ``set_recurrent_mode``."""
    with set_recurrent_mode(True):
        return run(loss, batch)


class Contestant(NamedTuple):
    """A column of the table."""

    title: str
    library: Any
    wire: bool
    dtype: torch.dtype
    vmap: bool = True


CONTESTANTS = (
    Contestant("TorchRL", torchrl.modules, False, torch.float32),
    Contestant("rnnkeys, float32", rnnkeys, True, torch.float32),
    Contestant("rnnkeys, float64", rnnkeys, True, torch.float64),
)


def cells(case: cases.Case, contestant: Contestant, seeds: int) -> list[str]:
    """Return the cells of one contestant in a loss's row."""
    try:
        return cells_of(score_all(case, contestant, seeds))
    except (RuntimeError, ValueError):
        if contestant.wire:
            raise
    try:
        found = cells_of(score_all(case, contestant._replace(vmap=False), seeds))
    except (RuntimeError, ValueError) as error:
        print(f"{case.name}: {error}", file=sys.stderr)
        return ["raises", "", ""]
    return [found[0] + " \\*", *found[1:]]


def without_vmap(loss: Any) -> None:
    """Let a loss or estimator run its networks one by one, as ``deactivate_vmap=True`` does."""
    loss.deactivate_vmap = True
    if hasattr(loss, "_make_vmap"):
        loss._make_vmap()


def score_all(case: cases.Case, contestant: Contestant, seeds: int) -> Score:
    """Score a loss over cells and seeds: errors averaged, the largest leak."""
    scores = []
    for cell in _CELLS:
        for seed in range(seeds):
            with _dtype(contestant.dtype):
                torch.manual_seed(seed)
                scores.append(score(case, contestant, cell))
    return Score(
        sum(one.wrong for one in scores),
        sum(one.values for one in scores),
        sum(one.error for one in scores) / len(scores),
        max(one.leak for one in scores),
    )


@contextlib.contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def rows(chosen: Iterable[cases.Case], seeds: int) -> Iterator[list[str]]:
    """Yield a row of the table for each loss, and show how far we are."""
    for case in chosen:
        row = [case.name]
        for contestant in CONTESTANTS:
            row += cells(case, contestant, seeds)
        print(" | ".join(row), file=sys.stderr, flush=True)
        yield row


def cells_of(result: Score) -> list[str]:
    """Return the three cells of a contestant: share of wrong values, mean error, leak."""
    share = f"{result.wrong / result.values:.0%}" if result.wrong else f"0 of {result.values}"
    leak = f"{result.leak:.2g}" if result.leak else "0"
    return [share, f"{result.error:.1%}" if result.error > 1e-4 else f"{result.error:.0e}", leak]


def report(lines: Sequence[Sequence[str]], seeds: int) -> str:
    """Return the whole page."""
    header = ["loss"]
    for contestant in CONTESTANTS:
        header += [f"{contestant.title}: wrong", "mean error", "leak"]
    return f"""# Targets of recurrent losses

Made by `make targets` (`python -m benchmarks.targets --seeds {seeds}`), with torch
{torch.__version__.partition("+")[0]}, torchrl {torchrl.__version__} and tensordict
{tensordict.__version__}. Nothing in it depends on the speed of a machine.

Every loss is run on batches of slices of up to 6 steps, drawn by TorchRL's `SliceSampler` from what
TorchRL's `Collector` gathered in an environment with episodes of 1 to 12 steps that terminate or
are truncated: {seeds} for a GRU and {seeds} for an LSTM. Online and target weights differ from
each other and from those that collected. TorchRL's modules run in TorchRL's losses as they are
(estimators inside `set_recurrent_mode(True)`), rnnkeys' in the same losses after
`recurrent_loss(loss)`.

- *wrong*: share of the bootstrapped next values (those of terminated steps, which nothing reads,
  left out) that are further from step-by-step unrolling than 1e-5 of the largest value in float32,
  1e-12 in float64;
- *mean error*: mean distance from step-by-step unrolling, in standard deviations of the values;
- *leak*: largest change of any other slice's target when one slice of the batch is changed, in the
  same unit.

{table(header, lines)}

\\* TorchRL's modules raise inside of the `vmap` that this loss or estimator runs its networks in;
it was made with `deactivate_vmap=True` here. rnnkeys' modules run in it. Where it says *raises*,
TorchRL's primer cannot make the states of agents, so that there is no data to compare on (QMIX).

`GAE shifted` is the option `shifted=True`, which runs the root and `next` in one call. TorchRL's
estimators flag segment starts in `next` by themselves, and read the stored states, so all they need
is recurrent mode. `CQLLoss`, `DiscreteCQLLoss` and `VTrace` are not here: no flags and states make
them right, so `recurrent_loss` raises an error for them.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Score every loss and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=1, help="batches per cell (default: 1)")
    parser.add_argument("--only", default="", metavar="TEXT", help="losses with TEXT in their name")
    parser.add_argument("--output", type=Path, default=_RESULT, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1. Got {options.seeds}.")
    chosen = [case for case in cases.CASES if options.only in case.name]
    if not chosen:
        parser.error(f"no loss has {options.only!r} in its name")
    warnings.simplefilter("ignore")
    logging.getLogger("torchrl").setLevel(logging.ERROR)
    lines = list(rows(chosen, options.seeds))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(report(lines, options.seeds), encoding="utf-8")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
