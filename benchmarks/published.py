"""The experiments of `make results`: tasks whose results others have published.

One set of settings per algorithm and family of tasks serves every cell. Reported seeds start from
0; settings are chosen on seeds from 100 on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .experiments import BEST, CELLS, LAST, SWING, Experiment
from .popgym_tasks import PPO as POPGYM_PPO
from .zoo_ppo_lstm import command_line

# The agent sees the sign of its last reward (the agents of the paper see their last action), and
# the junction and the cue stand out from the corridor. Settings were chosen on seeds 100 and 101, a
# corridor of 50 (PPO) and of 250 (R2D2).
MAZE_TEXT = (
    "A cue at the first step says which way to turn at the end of the corridor "
    "(benchmarks/tasks.py). An episode is a success if it ends at the goal; guessing succeeds in "
    "half of them. The agent sees the sign of its last reward, too, which is -1 after a wrong "
    "step; the agents of the paper see their last action. One set of settings, chosen on seeds "
    "that are not reported, serves every cell"
)
MARCOMETER = "MarcoMeter/recurrent-ppo-truncated-bptt, 10 seeds"
MARCOMETER_MINIGRID = (
    *("--num-envs", "16", "--steps", "256", "--seq-len", "32", "--minibatch-steps", "512"),
    *("--epochs", "4", "--hidden-size", "256", "--critic", "shared", "--net-arch", "512", "512"),
    *("--activation", "relu", "--ortho-init", "--learning-rate", "2e-4", "--lr-schedule"),
    *("constant", "--clip-schedule", "constant", "--clip-value", "0.2", "--entropy", "0.01"),
    *("--critic-coeff", "0.25", "--reward-scale", "1"),
)
PLAIN = ("--cell-options", "block", "plain")
MAZE_CELLS = {
    "FFM": ("ffm", *PLAIN),
    "LRU": ("lru", *PLAIN, "min_radius", "0.99"),
    "GRU": ("gru",),
    "minGRU": ("mingru", *PLAIN),
    "LSTM": ("lstm",),
    "feed-forward": ("feed_forward",),
}
NOT_RUN: dict[str, Sequence[int]] = {"LRU": (), "minGRU": (), "LSTM": ()}
VELOCITY = ("--hide", "0", "1", "--frames", "31000")
VELOCITY_AND_STEP = ("--wrappers", "benchmarks.tasks:ShowLastStep", *VELOCITY)
THIRD_PARTY_GRU = {20: ".98", 50: ".88", 100: ".68", 250: ".53", 500: ".51"}


def describe_maze(length: int) -> str:
    return f"benchmarks.tasks:PassiveTMaze-v0(length={length}, show_penalty=True)"


def make_maze(length: int, frames: int, few: Mapping[str, Sequence[int]]) -> Experiment:
    """Make the experiment of the T-maze with a corridor of ``length`` and R2D2.

    A window is an episode. Sums of rewards stop before random actions, which would otherwise count
    against the right steps before them. The junction is seen once in an episode at most; it is
    explored by the number of visits.

    Args:
        length: length of the corridor.
        frames: environment steps of a run.
        few: seeds of the cells that do not run with 0 to 2; without seeds, a cell is left out.
    """
    steps, rounds = length + 1, max(1, 250 // length)
    batch = 16 * rounds * steps
    words = (
        *("--env", describe_maze(length), "--scale", "10", "--num-envs", "16"),
        *("--batch-frames", f"{batch}", "--warmup", "8000", "--window-len", f"{steps}"),
        *("--period", f"{steps}", "--burn-in", "0", "--n-steps", "50", "--greedy-returns"),
        *("--rescale", "0", "--gamma", "0.999", "--reward-scale", "10", "--tau", "0.02"),
        *("--exploration", "linear", "--epsilon", f"{0.5 / length}"),
        *("--epsilon-frames", "40000", "--first-visits", "20"),
        *("--updates", "24", "--windows", "32", "--hidden-size", "64", "--learning-rate", "0.002"),
        *("--frames", f"{frames}", "--eval-every", f"{frames // 20}", "--cell"),
    )
    return Experiment(
        script="r2d2",
        title=f"R2D2 in the passive T-maze, corridor of {length}",
        text=(
            f"{MAZE_TEXT}, but for the smallest decay of the LRU at the start, an argument that "
            "others do not have. Linear cells are alone, without the residual block. The fresh "
            "episodes of the seeds overlap, and three in four of them show one side: an agent that "
            f"always turns the same way succeeds in .75 or .25 of them. {BEST}"
        ),
        variants={
            name: (*words, *cell) for name, cell in MAZE_CELLS.items() if few.get(name, (0, 1, 2))
        },
        seeds=range(3),
        few=few,
        success=0.5,
        scale=(0.5, 1.0),
        published={"GRU of a third party, 5 seeds, 1M steps": THIRD_PARTY_GRU[length]},
    )


MAZE_WITH_PPO = Experiment(
    script="recurrent_ppo",
    title="PPO in the passive T-maze, corridor of 50",
    text=f"{MAZE_TEXT}. {LAST}",
    variants={
        name: (
            *("--env", describe_maze(50), "--magnify", "10", "--num-envs", "32"),
            *("--reward-scale", "1", "--gamma", "0.999", "--entropy", "0.01", "--epochs", "6"),
            *("--learning-rate", "0.003", "--frames", "1000000", "--steps", "204"),
            *("--seq-len", "51", "--minibatch-steps", "1632", "--eval-every", "50000"),
            *("--cell", CELLS[name]),
        )
        for name in ("LRU", "GRU", "feed-forward")
    },
    seeds=range(3),
    few={"feed-forward": [0]},
    success=0.5,
    scale=(0.5, 1.0),
    published={"GRU of a third party, 5 seeds, 1M steps": THIRD_PARTY_GRU[50]},
)


PUBLISHED = {
    **{f"t_maze_{length}": make_maze(length, 400_000, {}) for length in (20, 50, 100, 250)},
    # Twice the frames: as many gradient steps as with half the length.
    "t_maze_500": make_maze(500, 800_000, {"GRU": [0], "feed-forward": [0], **NOT_RUN}),
    "t_maze_50_ppo": MAZE_WITH_PPO,
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
                *("--frames", "30720", "--eval-every", "2048", "--cell", CELLS[name]),
            )
            for name in ("GRU", "LSTM", "feed-forward")
        },
        seeds=range(10),
        few={"feed-forward": range(3)},
        success=0.0,
        scale=(0.5, 1.0),
        published={
            f"{MARCOMETER}, 14,336 steps": ".931 +- .064",
            f"{MARCOMETER}, 30,720 steps": "1.00",
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
            name: (
                *("--env", "benchmarks.tasks:CartPole200-v0", "--hide", "1", "3", *POPGYM_PPO),
                *("--frames", "409600", "--eval-every", "51200", "--cell", CELLS[name]),
            )
            for name in ("LSTM", "feed-forward")
        },
        few={"feed-forward": range(3)},
        y="training_return",
        milestones=(102_400, 204_800, 409_600),
        seeds=range(10),
        published={
            f"{MARCOMETER}, 102,400 steps": "115.6 +- 18.0",
            f"{MARCOMETER}, 204,800 steps": "184.2 +- 4.7",
            f"{MARCOMETER}, 409,600 steps": "192.8 +- 2.9",
        },
    ),
    "pendulum_velocity": Experiment(
        script="recurrent_sac",
        title="SAC on Pendulum with its angle hidden",
        text=(
            "The angle is hidden. The agent sees the velocity, and its last action and reward, as "
            "that of the published numbers does (configs/pomdp/pendulum/v/rnn.yml of "
            "twni2016/pomdp-baselines). That one learns from sequences of whole episodes, with a "
            "gradient step for each step of the environment; this one from 32 steps, with one for "
            "six. Settings are those of `recurrent_sac`, whose agent sees the angle alone; seed "
            "100 was looked at for 12,000 frames. Rows *at N frames* are the regular evaluations, "
            f"of 20 episodes. {BEST}"
        ),
        variants={
            "recurrent": VELOCITY_AND_STEP,
            "feed-forward": (*VELOCITY_AND_STEP, "--cell", "feed_forward", "--burn-in", "0"),
            "recurrent, velocity alone": VELOCITY,
        },
        seeds=range(3),
        few={"feed-forward": [0]},
        milestones=(30_000, 31_000),
        scale=SWING,
        published={
            "pomdp-baselines, TD3 with an LSTM, 30,000 steps": "-197",
            "pomdp-baselines, TD3 with an LSTM, 31,000 steps": "-183.5",
        },
    ),
}

# Experiments that need rnnkeys[results]; `--suite extras` runs them.
PUBLISHED_EXTRAS = {
    "minigrid_memory": Experiment(
        script="recurrent_ppo",
        title="PPO on MiniGrid-MemoryS9, a view of 3 x 3 squares",
        text=(
            "It needs rnnkeys[results]. An object stands in the room where the corridor starts; at "
            "the end of the corridor the agent walks to the one of two that equals it, and an "
            "episode returns 1 less .9 of the share of 405 steps that it took. Guessing returns "
            "less than .5. In five of six episodes the agent stands where it does not see the "
            "object and has to turn around first. View (3 x 3 squares), actions (the three moves) "
            "and layouts (those of 99 seeds) are those of the published numbers; the agent reads "
            "the kinds of objects in view (benchmarks/tasks.py), and theirs pixels. Settings are "
            "theirs (configs/minigrid.yaml), such as one LSTM of 256 for both the actor and the "
            "critic and two linear layers of 512 after it, with ten times the entropy bonus and "
            "sequences of 32 steps, which was chosen on seed 100. Theirs have 8, and their states "
            "are not reset at the starts of episodes (reset_hidden_state: False), which their "
            "README counts as an advantage in this task; here they are. With 8 steps and their "
            "entropy bonus, seeds 0 and 1 had .58 and .66 after 921,600 frames, where they were "
            "stopped: agents went to one end at once, without a look at the object. The 99 layouts "
            "make the task easier: with a new layout in each episode, seed 100 stayed at .5 for "
            "700,000 frames. "
            "Rows *at N frames* are the mean return of the last 100 episodes while training. "
            f"{LAST}"
        ),
        variants={
            name: (
                *("--env", "minigrid:MiniGrid-MemoryS9-v0(agent_view_size=3)"),
                *("--wrappers", "benchmarks.tasks:DrawSeed(count=99)"),
                *("benchmarks.tasks:ShowObjectTypes", *MARCOMETER_MINIGRID),
                *("--frames", "1540096", "--eval-every", "102400", "--cell", CELLS[name]),
            )
            for name in ("LSTM", "feed-forward")
        },
        y="training_return",
        milestones=(512_000, 1_024_000, 1_540_000),
        seeds=(0, 1, 2),
        few={"feed-forward": [0]},
        published={
            f"{MARCOMETER}, .51M steps": ".821 +- .094",
            f"{MARCOMETER}, 1.02M steps": ".861 +- .184",
            f"{MARCOMETER}, 1.54M steps": ".926 +- .051",
        },
    ),
    "lunar_lander": Experiment(
        script="recurrent_ppo",
        title="PPO on LunarLander with its velocities hidden",
        text=(
            "It needs rnnkeys[results]. Settings are those of rl-baselines3-zoo for "
            "LunarLanderNoVel (benchmarks/zoo_ppo_lstm.py) with 500,000 frames in place of "
            f"1,000,000; the zoo publishes no score. 200 counts as solved. {LAST}"
        ),
        variants={
            name: (
                *command_line("LunarLanderNoVel"),
                *("--frames", "500000", "--eval-every", "50000", "--eval-episodes", "8"),
                *("--cell", CELLS[name]),
            )
            for name in ("LSTM", "feed-forward")
        },
        seeds=(0, 1),
        few={"feed-forward": [0]},
    ),
}
