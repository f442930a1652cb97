"""The experiments of `make results`: tasks whose results others have published.

One set of settings per algorithm and family of tasks serves every cell. Reported seeds start from
0; settings are chosen on seeds from 100 on.
"""

from __future__ import annotations

from .experiments import HIDDEN, LAST, ZOO, Experiment
from .popgym_tasks import PPO as POPGYM_PPO

# The agent sees the sign of its last reward (the agents of the paper see their last action), and
# the junction and the cue stand out from the corridor, so that an agent that walks still tries to
# turn. One episode per sequence. Chosen on seed 100 and a corridor of 50, where an agent with an
# LRU learned to walk in 110k frames and to turn in 200k, but not yet to which side.
CORRIDOR = ("--magnify", "10", "--num-envs", "32", "--reward-scale", "1", "--gamma", "0.999")
CORRIDOR += ("--entropy", "0.01", "--epochs", "6", "--learning-rate", "0.003")
MAZE_CELLS = {
    "feed-forward": "feed_forward",
    "LSTM": "lstm",
    "GRU": "gru",
    "minGRU": "mingru",
    "LRU": "lru",
    "FFM": "ffm",
}
THIRD_PARTY_GRU = {20: ".98", 50: ".88", 100: ".68", 250: ".53", 500: ".51"}


def make_maze(length: int, frames: int) -> Experiment:
    """Make the experiment of the T-maze with a corridor of ``length``."""
    steps = length + 1
    rollout = max(1, 252 // steps) * steps
    env = f"benchmarks.tasks:PassiveTMaze-v0(length={length}, show_penalty=True)"
    task = ("--env", env, *CORRIDOR)
    sizes = ("--frames", str(frames), "--steps", str(rollout), "--seq-len", str(steps))
    batch = ("--minibatch-steps", str(8 * rollout), "--eval-every", str(max(frames // 20, 1)))
    return Experiment(
        script="recurrent_ppo",
        title=f"PPO in the passive T-maze, corridor of {length}",
        text=(
            "A cue at the first step says which way to turn at the end of the corridor "
            "(benchmarks/tasks.py). An episode is a success if it ends at the goal; guessing "
            "succeeds in half of them. The agent sees the sign of its last reward, too, which is "
            "-1 after a wrong step; the agents of the paper see their last action. One set of "
            f"settings, chosen on seed 100, serves every cell. {LAST}"
        ),
        variants={
            name: (*task, *sizes, *batch, "--cell", cell) for name, cell in MAZE_CELLS.items()
        },
        seeds=range(3),
        success=0.5,
        scale=(0.5, 1.0),
        published={
            "GRU with R2D2-like agents of a third party, 5 seeds, 1M steps": THIRD_PARTY_GRU[length]
        },
    )


PUBLISHED = {
    **{f"t_maze_{length}": make_maze(length, 1_000_000) for length in (20, 50, 100, 250)},
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
            "episodes while training, with exploration, as the published numbers are. Settings are "
            "those of POPGym's games (benchmarks/popgym_tasks.py), with the default scale of "
            "rewards; seed 100 had 174 at 81,920 frames, where it was stopped. They take a third "
            "of the default settings' CPU time; seed 0 of those was stopped at 51,200 frames, "
            f"where it had 163. {LAST}"
        ),
        variants={
            "LSTM": (
                *("--env", "benchmarks.tasks:CartPole200-v0", "--hide", "1", "3", *POPGYM_PPO),
                *("--frames", "409600", "--eval-every", "51200"),
            )
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
