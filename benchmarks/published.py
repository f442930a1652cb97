"""The experiments of `make results`: tasks whose results others have published.

One set of settings per algorithm and family of tasks serves every cell. Reported seeds start from
0; settings are chosen on seeds from 100 on.
"""

from __future__ import annotations

from .experiments import BEST, HIDDEN, LAST, ZOO, Experiment

# Linear cells stand alone, as gated ones do, without the residual block. The modes of the LRU start
# with decays of .99 and more, so that all of them last for hundreds of steps.
MAZE_CELLS = {
    "LRU": ("lru", "--cell-options", "block", "plain", "min_radius", "0.99"),
    "GRU": ("gru",),
    "minGRU": ("mingru", "--cell-options", "block", "plain"),
    "FFM": ("ffm", "--cell-options", "block", "plain"),
    "LSTM": ("lstm",),
    "feed-forward": ("feed_forward",),
}
THIRD_PARTY_GRU = {20: ".98", 50: ".88", 100: ".68", 250: ".53"}


def make_maze(length: int, frames: int = 500_000) -> Experiment:
    """Make the experiment of the T-maze with a corridor of ``length``.

    A window is an episode. Targets have one reward: with more, random steps after a right one would
    count against it. Observations of 10 in place of 1 let the cue and the junction stand out.
    """
    steps, num_envs = length + 1, 16
    batch = num_envs * max(1, 251 // steps) * steps
    rounds = -(-frames // batch)
    words = (
        *("--env", f"benchmarks.tasks:PassiveTMaze-v0(length={length}, show_penalty=True)"),
        *("--scale", "10", "--num-envs", f"{num_envs}", "--batch-frames", f"{batch}"),
        *("--window-len", f"{steps}", "--period", f"{steps}", "--burn-in", "0"),
        *("--n-steps", "1", "--rescale", "0", "--gamma", "0.999", "--reward-scale", "10"),
        *("--exploration", "linear", "--epsilon", f"{0.5 / length}", "--epsilon-frames", "60000"),
        *("--updates", "24", "--windows", "32", "--tau", "0.02", "--hidden-size", "64"),
        *("--warmup", "8000", "--frames", f"{rounds * batch}"),
        *("--eval-every", f"{rounds // 20 * batch}", "--cell"),
    )
    return Experiment(
        script="r2d2",
        title=f"R2D2 in the passive T-maze, corridor of {length}",
        text=(
            "A cue at the first step says which way to turn at the end of the corridor "
            "(benchmarks/tasks.py). An episode is a success if it ends at the goal; guessing "
            "succeeds in half of them. The agent sees the sign of its last reward, which is -1 "
            "after a wrong step; the agents of the paper see their last action. One set of "
            "settings, chosen on seeds 100 and 101 and a corridor of 250, serves every cell, but "
            "for the smallest decay of the LRU at the start, an argument that a GRU does not "
            f"have. {BEST}"
        ),
        variants={name: (*words, *cell) for name, cell in MAZE_CELLS.items()},
        seeds=range(3),
        success=0.5,
        scale=(0.5, 1.0),
        published={"GRU of a third party, 5 seeds, 1M steps": THIRD_PARTY_GRU[length]},
    )


PUBLISHED = {
    **{f"t_maze_{length}": make_maze(length) for length in THIRD_PARTY_GRU},
    "two_goals": Experiment(
        script="recurrent_ppo",
        title="PPO: walk to the end of a line that was shown as the good one",
        text=(
            "The ends are shown in the first three observations (benchmarks/tasks.py); an episode "
            "is a success if it ends at the good one. A policy without memory succeeds in more "
            "than half: its position after its first move says something of what it saw before. "
            f"{LAST}"
        ),
        variants={
            name: (
                *("--env", "benchmarks.tasks:TwoGoals-v0", "--num-envs", "16", "--steps", "32"),
                *("--seq-len", "32", "--minibatch-steps", "128", "--reward-scale", "1"),
                *("--frames", "30720", "--eval-every", "2048", "--cell", cell),
            )
            for name, cell in (("GRU", "gru"), ("LSTM", "lstm"), ("feed-forward", "feed_forward"))
        },
        seeds=range(10),
        few={"feed-forward": range(3)},
        success=0.0,
        scale=(0.5, 1.0),
        published={
            "MarcoMeter/recurrent-ppo-truncated-bptt, 10 seeds, 14,336 steps": ".931 +- .064",
            "MarcoMeter/recurrent-ppo-truncated-bptt, 10 seeds, 30,720 steps": "1.00",
        },
    ),
    "masked_cart_pole": Experiment(
        script="recurrent_ppo",
        title="PPO on CartPole-v0 with its velocities hidden",
        text=(
            "Episodes end after 200 steps. Rows *at N frames* are the mean return of the last 100 "
            f"episodes while training, with exploration, as the published numbers are. {LAST}"
        ),
        variants={
            "LSTM": ("--env", "benchmarks.tasks:CartPole200-v0", "--hide", "1", "3", "--frames")
            + ("409600", "--num-envs", "16", "--steps", "64", "--eval-every", "51200")
        },
        y="training_return",
        milestones=(102_400, 204_800, 409_600),
        seeds=range(10),
        published={
            "MarcoMeter/recurrent-ppo-truncated-bptt, 10 seeds, 102,400 steps": "115.6 +- 18.0",
            "MarcoMeter/recurrent-ppo-truncated-bptt, 10 seeds, 204,800 steps": "184.2 +- 4.7",
            "MarcoMeter/recurrent-ppo-truncated-bptt, 10 seeds, 409,600 steps": "192.8 +- 2.9",
        },
    ),
    "linear_cells_cart_pole": Experiment(
        script="recurrent_ppo",
        title="PPO with linear cells on CartPole with its velocities hidden",
        text=f"{HIDDEN} {LAST}",
        variants={"minGRU": ("--cell", "mingru"), "LRU": ("--cell", "lru")},
        published={
            f"{ZOO}, CartPoleNoVel, 100k steps": "500.0 +- 0.0",
        },
    ),
}
