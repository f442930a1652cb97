"""The experiment of `make results` on bsuite's ``memory_len``, by bsuite's scoring rule.

Sources: I. Osband et al., "Behaviour Suite for Reinforcement Learning", 2020 (arXiv:1908.03568);
``bsuite/experiments/memory_len`` of https://github.com/google-deepmind/bsuite: the lengths in
``sweep.py``, the rule in ``analysis.py``.
"""

from __future__ import annotations

from .experiments import LAST, Experiment

EPISODES = 10_000
LENGTHS = (*range(1, 11), 12, 14, 17, 20, 25, *range(30, 101, 10))
# bsuite counts mistakes over all episodes, by those of guessing, one in two: a length is solved
# with less than .75 of them, where five in eight answers are right and the mean return is .25.
SOLVED = 0.25
ENVS = 32


def make_options(length: int, cell: str) -> tuple[str, ...]:
    """Return the options of the PPO tutorial: sequences are one or more whole episodes."""
    steps = (length + 1) * max(1, 32 // (length + 1))
    frames = EPISODES * (length + 1)
    return (
        *("--env", f"benchmarks.tasks:MemoryChain-v0(length={length})", "--num-envs", f"{ENVS}"),
        *("--steps", f"{steps}", "--seq-len", f"{steps}", "--minibatch-steps", f"{8 * steps}"),
        *("--epochs", "5", "--learning-rate", "0.003", "--reward-scale", "1"),
        *("--frames", f"{frames}", "--eval-every", f"{max(ENVS * steps, frames // 50)}"),
        *("--eval-episodes", "8", "--cell", cell),
    )


CELLS = {"GRU": ("gru", LENGTHS[::3]), "feed-forward": ("feed_forward", LENGTHS[:12:3])}
BSUITE = {
    "bsuite_memory_len": Experiment(
        script="recurrent_ppo",
        title="PPO on bsuite's memory_len",
        text=(
            "A sign is shown in the first two observations, and asked for N steps later, in an "
            f"episode that returns 1 or -1. A run has {EPISODES:,} episodes; a length is solved if "
            "less than .75 of the mistakes of guessing were made in all of them, exploration "
            f"included: a mean return of {SOLVED} or more. The environment is written anew and "
            "equals bsuite's 0.3.6 (benchmarks/tasks.py). Every third length counts, with one "
            "seed, and for the feed-forward network the first four. Rows *while training* are the "
            "mean of the last 100 episodes before each of the regular evaluations, of which there "
            f"are 50, or as many as rollouts if those are fewer. Settings are the first that were "
            f"tried, on seed 100 of N = 10. {LAST}"
        ),
        variants={
            f"{name}, N = {length}": make_options(length, cell)
            for name, (cell, lengths) in CELLS.items()
            for length in lengths
        },
        y="training_return",
        seeds=(0,),
        solved=SOLVED,
    )
}
