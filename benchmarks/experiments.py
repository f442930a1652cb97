"""The experiments of `make learn`: tutorials with several variants and seeds.

Those of `make results` are in ``benchmarks/published.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Experiment:
    """A tutorial and the variants of it that a table and a picture compare.

    Args:
        script: name of the tutorial, without ``.py``.
        title: title of table and picture.
        text: text above the table.
        variants: name of each variant, with its arguments.
        x: column of learning_curve.csv for the horizontal axis of the picture.
        y: column for the vertical axis.
        also: columns for more panels, with a logarithmic axis; the summary shows their mean over
            the second half of a run.
        seeds: seeds of each variant.
        few: seeds of single variants whose runs take too long for all seeds.
        published: results of others on the same task: a name with its source, and the result.
        references: what to compare values with, such as random actions, and their values.
        milestones: frames at which the summary shows ``y`` of the learning curve, above the returns
            of the fresh episodes.
        success: the return above which an episode is a success. The summary then shows the share of
            successes, and not the mean return.
        solved: the mean of ``y`` over the learning curve above which a variant counts as solved.
            The summary then shows that mean, and how many variants are solved.
        without: what benchmarks/without.py takes from single variants.
        scale: the values that count as 0 and as 1 where tasks are taken together: those of random
            or motionless behaviour, and the best, or a good one where the best is not known.
    """

    script: str
    title: str
    text: str
    variants: Mapping[str, Sequence[str]]
    x: str = "frames"
    y: str = "evaluation"
    also: Sequence[str] = ()
    seeds: Sequence[int] = range(5)
    few: Mapping[str, Sequence[int]] = field(default_factory=dict)
    published: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, float] = field(default_factory=dict)
    milestones: Sequence[int] = ()
    success: float | None = None
    solved: float | None = None
    without: Mapping[str, str] = field(default_factory=dict)
    scale: tuple[float, float] | None = None

    def seeds_of(self, variant: str) -> Sequence[int]:
        """Return the seeds of a variant.

        Examples:
            >>> one = Experiment("r2d2", "", "", {"GRU": (), "LSTM": ()}, few={"LSTM": [0]})
            >>> one.seeds_of("GRU"), one.seeds_of("LSTM")
            (range(0, 5), [0])
        """
        return self.few.get(variant, self.seeds)

    def program(self, variant: str) -> list[str]:
        """Return the words that run a variant, after ``python`` and without its seed.

        Examples:
            >>> one = Experiment("r2d2", "", "", {"GRU": ("--cell", "gru")})
            >>> one.program("GRU")
            ['tutorials/r2d2.py', '--cell', 'gru']
        """
        if variant in self.without:
            words = ["-m", "benchmarks.without", self.without[variant], self.script]
        else:
            words = [f"tutorials/{self.script}.py"]
        return [*words, *self.variants[variant]]


# The cells that are compared, and the option of the tutorials for each.
CELLS = {
    "feed-forward": "feed_forward",
    "LSTM": "lstm",
    "GRU": "gru",
    "minGRU": "mingru",
    "LRU": "lru",
    "FFM": "ffm",
}
FEED_FORWARD = ("--cell", CELLS["feed-forward"])
POSITIONS = ("--observation", "auto")
SHORT = ("--episodes", "2000")  # for variants that do not learn; the others need fewer
BRIEF = ("--frames", "40000", "--burn-in", "0")
# Rewards of 1/48, which no action but the latest has an influence on; episodes of 51 steps.
CARDS = (
    *("--env", "popgym:popgym-RepeatPreviousEasy-v0", "--window-len", "24", "--period", "12"),
    *("--windows", "64", "--reward-scale", "10", "--gamma", "0.5"),
)
PENDULUM = (
    *("--env", "Pendulum-v1", "--magnify", "5", "--gamma", "0.9", "--reward-scale", "0.02"),
    *("--num-envs", "10", "--steps", "200", "--seq-len", "25", "--minibatch-steps", "250"),
    *("--learning-rate", "3e-3", "--noise-correlation", "0.7"),
)
HILL = (
    *("--env", "MountainCarContinuous-v0", "--magnify", "5", "--lmbda", "0.98"),
    *("--num-envs", "16", "--steps", "128", "--minibatch-steps", "512"),
    *("--reward-scale", "0.05", "--entropy", "0.01", "--noise-correlation", "0.9"),
    *("--eval-every", "20000", "--eval-episodes", "8"),
)
CHEETAH = (
    *("--env", "HalfCheetah-v5", "--hide", *map(str, range(8, 17))),
    *("--normalize-observation", "--normalize-reward", "--reward-scale", "1", "--num-envs", "8"),
    *("--steps", "256", "--seq-len", "32", "--learning-rate", "1e-3", "--clip-schedule"),
    *("constant", "--no-squash", "--log-std-init", "-0.5", "--frames", "200000"),
    *("--eval-every", "20000", "--eval-episodes", "8"),
)
LAST = "Weights are those of the last step."
BEST = (
    "Weights are those that did best in the regular evaluations (*best evaluation*), tested on "
    "fresh episodes."
)
CART_POLE = (22.0, 500.0)  # returns of random actions, and of whole episodes
SWING = (-1230.0, -150.0)  # returns of random actions, and of good ones, in Pendulum
ZOO = "rl-baselines3-zoo (benchmark.md), RecurrentPPO, 5 seeds"
HIDDEN = "Velocities are hidden. An episode of CartPole returns 500 at most."

EXPERIMENTS = {
    "recurrent_dqn": Experiment(
        script="recurrent_dqn",
        title="DQN on CartPole with its velocities hidden",
        text=(
            f"{HIDDEN} Positions are shown in tenths of their limits, which was chosen on seeds "
            f"100 and 101: shown in whole limits, most runs stopped at 150 steps for long. {BEST}"
        ),
        variants={"LSTM": (), "feed-forward": FEED_FORWARD, "GRU": ("--cell", "gru")},
        few={"GRU": [0]},
        scale=CART_POLE,
    ),
    "recurrent_reinforce": Experiment(
        script="recurrent_reinforce",
        title="REINFORCE with a GRU of two layers",
        text=(
            "CartPole-v1, with *all* of its observation or its *positions* only. The update runs "
            "whole episodes (*right*) or single steps from a zero state (*broken*); *feed-forward* "
            "is the same network without recurrence. A run stops when its last 100 episodes reach "
            "475, or after 4,000 (2,000 where nothing is learned)."
        ),
        variants={
            "all, right": (),
            "all, broken": ("--broken", *SHORT),
            "positions, right": POSITIONS,
            "positions, broken": (*POSITIONS, "--broken", *SHORT),
            "positions, feed-forward": (*POSITIONS, *FEED_FORWARD, *SHORT),
        },
        few={"all, broken": range(3), "positions, broken": [0], "positions, feed-forward": [0]},
        x="episode",
        y="mean_of_last_100",
    ),
    "recurrent_ppo": Experiment(
        script="recurrent_ppo",
        title="PPO on CartPole with its velocities hidden",
        text=f"{HIDDEN} Settings are the tutorial's, for every cell. {LAST}",
        variants={
            "LSTM": (),
            **{name: ("--cell", CELLS[name]) for name in ("GRU", "minGRU", "LRU")},
            "feed-forward": FEED_FORWARD,
        },
        published={f"{ZOO}, CartPoleNoVel, 100k steps": "500.0 +- 0.0"},
        scale=CART_POLE,
    ),
    "r2d2": Experiment(
        script="r2d2",
        title="R2D2 on CartPole with its velocities hidden",
        text=(
            f"{HIDDEN} Positions are shown in tenths of their limits, as to the DQN; seed 100 was "
            f"looked at. {BEST}"
        ),
        variants={
            "LSTM": (),
            "feed-forward": (*FEED_FORWARD, "--frames", "40000"),
        },
        few={"feed-forward": range(2)},
        scale=CART_POLE,
    ),
    "r2d2_states": Experiment(
        script="r2d2",
        title="R2D2: the initial states of windows",
        text=(
            "Windows of 40 steps start from the stored state, from the state that the last refresh "
            "has recomputed, or from zeros. Staleness is the effect of that state on the values, "
            "in windows that start inside an episode: at the first learned step, and at the last "
            "one (see docs/r2d2.md). Stored and refreshed states are less stale than zeros, and no "
            "difference between returns is larger than those between seeds: CartPole's pole is "
            f"found again within some steps of any state. {HIDDEN} {BEST}"
        ),
        variants={
            "zero": (*BRIEF, "--state", "zero"),
            "stored": BRIEF,
            "refreshed": (*BRIEF, "--state", "refreshed"),
        },
        also=("staleness_first", "staleness_last"),
    ),
    "r2d2_memory": Experiment(
        script="r2d2",
        title="R2D2 on POPGym's RepeatPreviousEasy",
        text=(
            "A card is shown at each step, and the suit of the one four steps ago is asked for. "
            f"Returns are from -1 to 1; guessing gives -0.5 on average. {BEST}"
        ),
        variants={
            "LSTM": (*CARDS, "--frames", "50000"),
            "feed-forward": (*CARDS, *FEED_FORWARD, "--frames", "15000"),
        },
        seeds=range(3),
        few={"feed-forward": range(2)},
        scale=(-0.5, 1.0),
    ),
    "recurrent_ppo_pendulum": Experiment(
        script="recurrent_ppo",
        title="PPO on Pendulum with its velocity hidden",
        text=(
            "An episode of 200 steps returns 0 at most. "
            f"{LAST} Noise in actions lasts, or is drawn again at every step."
        ),
        variants={
            "recurrent": PENDULUM,
            "feed-forward": (*PENDULUM, "--cell", "feed_forward"),
            "fresh noise": (*PENDULUM, "--noise-correlation", "0", "--eval-every", "20000"),
        },
        few={"feed-forward": [0], "fresh noise": [0, 1]},
        published={f"{ZOO}, PendulumNoVel, 100k steps": "-217.9 +- 140.1"},
        scale=SWING,
    ),
    "recurrent_ppo_mountain_car": Experiment(
        script="recurrent_ppo",
        title="PPO on MountainCarContinuous with its velocity hidden",
        text=(
            "An episode returns 100 for the hilltop less what its thrust costs; standing still "
            f"returns 0. {LAST} Noise in actions lasts, or is drawn again at every step."
        ),
        variants={
            "recurrent": HILL,
            "feed-forward": (*HILL, "--cell", "feed_forward"),
            "fresh noise": (*HILL, "--noise-correlation", "0"),
        },
        few={"fresh noise": [0]},
        published={f"{ZOO}, MountainCarContinuousNoVel, 300k steps": "91.5 +- 1.8"},
        scale=(0.0, 100.0),
    ),
    "recurrent_ppo_cheetah": Experiment(
        script="recurrent_ppo",
        title="PPO on HalfCheetah with its velocities hidden",
        text=(
            "The robot of gymnasium[mujoco] shows its positions only. An episode of 1,000 steps "
            f"returns its way forward less the cost of its actions. {LAST}"
        ),
        variants={"recurrent": CHEETAH, "feed-forward": (*CHEETAH, "--cell", "feed_forward")},
        seeds=range(2),
    ),
    "recurrent_sac": Experiment(
        script="recurrent_sac",
        title="SAC on Pendulum with its velocity hidden",
        text=BEST,
        variants={
            "recurrent": (),
            "feed-forward": ("--cell", "feed_forward", "--burn-in", "0"),
        },
        few={"feed-forward": [0]},
        scale=SWING,
    ),
    "recurrent_qmix": Experiment(
        script="recurrent_qmix",
        title="QMIX: three agents that have to remember a word each",
        text=(
            "The return is 1 if each agent says the word, one of two, that it was told 2 to 5 "
            f"steps before, and 0 otherwise. Guessing returns 0.125 on average. {BEST} In version "
            "0.1.0 every seed learned with own weights, too: evaluations stay at .2 to .5 for "
            "long, and when they rise differs from run to run."
        ),
        variants={
            "shared weights": (),
            "own weights": ("--own",),
            "feed-forward": FEED_FORWARD,
        },
        scale=(0.125, 1.0),
    ),
}

# Experiments that need more than `make` installs; `--suite extras` runs them.
EXTRAS: dict[str, Experiment] = {
    "recurrent_mappo": Experiment(
        script="recurrent_mappo",
        title="MAPPO and IPPO: three agents that have to remember a goal each",
        text=(
            "It needs rnnkeys[marl]. The return is by how much the mean distance of the agents to "
            "their goals shrinks in an episode; it is about 1.04 in the beginning. An agent that "
            "does not remember its goal does best in the middle, which returns 0.28 on average. "
            f"{BEST}"
        ),
        variants={
            "MAPPO": (),
            "IPPO": ("--algorithm", "ippo"),
            "MAPPO own weights": ("--own",),
            "MAPPO feed-forward": FEED_FORWARD,
            "IPPO feed-forward": ("--algorithm", "ippo", *FEED_FORWARD),
        },
        seeds=(0, 1),
    ),
}
