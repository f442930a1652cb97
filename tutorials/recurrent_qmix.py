"""QMIX with recurrent agents that learn to remember a password together, in one file.

    python recurrent_qmix.py                        # learns in less than a minute on one CPU core
    python recurrent_qmix.py --cell feed_forward    # the feed-forward baseline does not learn
    python recurrent_qmix.py --own                  # each agent has weights of its own
    python recurrent_qmix.py --resume runs/recurrent_qmix/checkpoint.pt --frames 80000

Each of three agents hears one word of a password, at the first step and never again. Some steps
later all agents have to say their word at once, and the reward is 1 if every word is right. Agents
that guess succeed in 1 of 8 episodes. docs/agents.md explains the keys.

A run writes to its --output folder learning_curve.csv and .png, with a row for each evaluation;
checkpoint.pt, with everything that --resume needs and the weights of the best evaluation; and, at
the end, result.json, with the returns of those weights in new episodes. Ctrl-C and SIGTERM stop a
run after its current round.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from statistics import fmean
from typing import Any, Literal

import torch
import tyro
from matplotlib.figure import Figure
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torchrl.collectors import Collector
from torchrl.data import (
    Categorical,
    Composite,
    LazyTensorStorage,
    SliceSampler,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import EnvBase, RewardSum, TransformedEnv
from torchrl.modules import EGreedyModule, MultiAgentMLP, QMixer, QValueModule
from torchrl.objectives import LossModule, QMixerLoss, SoftUpdate, ValueEstimators
from torchrl.record.loggers import get_logger
from tqdm import tqdm

from rnnkeys import CellName, get_env_transforms_from_module, recurrent_module
from rnnkeys.environments import evaluate_policy
from rnnkeys.objectives import recurrent_loss

logging.getLogger("torchrl").setLevel(logging.WARNING)  # without a line for each buffer

# Arguments that --resume cannot change.
FIXED = ("output", "agents", "words", "own", "cell", "hidden_size", "seed")
MODULES = ("loss", "optimizer", "explore")
PROGRESS = ("frames", "episodes", "seconds", "rows", "best")
FILES = ("checkpoint.pt", "learning_curve.csv", "learning_curve.png", "result.json")
SELECTION_SEED = 100_000_000  # of the episodes that choose the best weights
TEST_SEED = 200_000_000  # of the episodes that neither training nor choice has used
TEST_EPISODES = 20


@dataclass
class Args:
    agents: int = 3  # agents, each with a word to remember
    words: int = 2  # words that exist
    own: bool = False  # each agent has weights of its own; otherwise all share theirs
    cell: CellName = "gru"  # kind of recurrent layer
    hidden_size: int = 64  # size of the hidden state
    frames: int = 16_000  # environment steps in the whole run
    seed: int = 0  # of all random numbers
    device: str = "cpu"  # of environments and networks: cpu, cuda, cuda:1
    threads: int = 1  # CPU threads of torch; small networks are fastest with one
    num_envs: int = 32  # environments that are stepped together
    batch_frames: int = 256  # frames that are collected in a round
    updates: int = 4  # gradient steps in a round
    warmup: int = 2_000  # frames collected before the first gradient step, also after --resume
    capacity: int = 100_000  # frames in the replay buffer
    slices: int = 32  # sequences in a batch
    slice_len: int = 16  # steps in a sequence
    gamma: float = 0.99  # discount
    lmbda: float = 0.95  # lambda of the TD(lambda) returns
    learning_rate: float = 3e-3  # Adam's first; it falls linearly to 0 at the last frame
    max_grad_norm: float = 10.0  # longer gradients are scaled down to this norm
    tau: float = 0.02  # share of the online network in each update of the target network
    epsilon: float = 0.05  # last probability of a random action; the first is 1
    epsilon_frames: int = 8_000  # frames over which that probability falls
    eval_every: int = 1_000  # frames between two evaluations
    eval_episodes: int = 128  # episodes in an evaluation
    output: str = "runs/recurrent_qmix"  # folder of the run
    resume: str | None = None  # checkpoint.pt of the run to continue
    overwrite: bool = False  # delete the run in the output folder and start again
    logger: Literal["csv", "tensorboard", "wandb"] | None = None  # log through TorchRL, too


class UsageError(Exception):
    """A wrong argument, or a run that cannot continue."""


def read_args(argv: Sequence[str] | None) -> tuple[Args, dict[str, Any]]:
    """Return the arguments and, after --resume, the checkpoint with their defaults."""
    args, checkpoint = tyro.cli(Args, args=argv, description=__doc__), {}
    if args.resume is not None and not args.overwrite:
        try:
            checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
            old = Args(**{**checkpoint["args"], "output": str(Path(args.resume).parent)})
        except (OSError, EOFError, LookupError, TypeError, RuntimeError, UnpicklingError) as error:
            raise UsageError(f"--resume is {args.resume}, no checkpoint of this program") from error
        args = tyro.cli(Args, args=argv, default=old, description=__doc__)
        for name in FIXED:
            if getattr(args, name) != getattr(old, name):
                raise UsageError(f"--{name} must be {getattr(old, name)}, as in {args.resume}")
    elif not args.overwrite and any(Path(args.output, name).exists() for name in FILES):
        raise UsageError(
            f"{args.output} contains a run. Continue it with --resume "
            f"{args.output}/checkpoint.pt, delete it with --overwrite, or choose another --output."
        )
    check_args(args)
    return args, checkpoint


def check_args(args: Args) -> None:
    for name, value in vars(args).items():
        least = {"seed": 0, "words": 2}.get(name, 1)
        if type(value) is int and value < least:
            raise UsageError(f"--{name} is {value}: expected at least {least}")
        if name in ("gamma", "lmbda", "tau", "epsilon") and not 0 <= value <= 1:
            raise UsageError(f"--{name} is {value}: expected a number from 0 to 1")
        if name in ("warmup", "capacity") and value < args.num_envs * args.slice_len:
            raise UsageError(f"--{name} is {value}: expected at least num_envs * slice_len")
    if args.batch_frames % args.num_envs:
        raise UsageError(f"--batch_frames is {args.batch_frames}: expected a multiple of num_envs")
    if args.frames <= args.warmup:
        raise UsageError(f"--frames is {args.frames}: expected more than warmup, {args.warmup}")


class Password(EnvBase):
    """Doors that open if all agents say their word, many doors at once.

    Agents see float32 ``[num_envs, agents, words + 1]``: their word, as a one-hot vector at the
    first step and as zeros later, and 1 when they are asked. ``"state"``, float32
    ``[num_envs, agents * words + 1]``, always contains all words; only the mixer reads it.

    Args:
        num_envs: number of doors.
        agents: number of agents; each has to say a word.
        words: number of words; guesses open the door with probability ``words ** -agents``.
        device: of the data.
    """

    WAIT = (2, 5)  # steps between hearing a word and saying it: the least and the most

    def __init__(
        self, num_envs: int, agents: int = 3, words: int = 2, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))
        batch, group = self.batch_size, torch.Size([num_envs, agents])
        observation = Unbounded(torch.Size([*group, words + 1]), device=device)
        state = Unbounded(torch.Size([*batch, agents * words + 1]), device=device)
        observations = Composite(observation=observation, shape=group)
        actions = Composite(action=Categorical(words, group, device=device), shape=group)
        self.observation_spec = Composite(agents=observations, state=state, shape=batch)
        self.action_spec = Composite(agents=actions, shape=batch)
        self.reward_spec = Unbounded(torch.Size([*batch, 1]), device=device)
        self.words, self.draws = words, torch.Generator(device)
        self.password = torch.zeros(group, dtype=torch.long, device=device)
        self.wait = torch.zeros(*batch, 1, dtype=torch.long, device=device)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        which = None if tensordict is None else tensordict.get("_reset", None)
        starts = torch.ones_like(self.wait).bool() if which is None else which
        for entry, low, high in ((self.password, 0, self.words - 1), (self.wait, *self.WAIT)):
            draw = torch.randint(
                low, high + 1, entry.shape, generator=self.draws, device=self.device
            )
            entry.copy_(torch.where(starts, draw, entry))
        return self._observe(starts)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        asked = self.wait == 0
        right = (tensordict["agents", "action"] == self.password).all(-1, keepdim=True)
        self.wait -= 1
        out = self._observe(torch.zeros_like(asked))
        return out.update({"reward": (asked & right).float(), "done": asked, "terminated": asked})

    def _observe(self, starts: Tensor) -> TensorDict:
        word = one_hot(self.password, self.words).float()
        asked = (self.wait == 0).float()
        everybody = asked.unsqueeze(1).expand(*word.shape[:2], 1)
        heard = torch.cat([word * starts.unsqueeze(-1), everybody], -1)
        agents = TensorDict({"observation": heard}, word.shape[:2])
        state = torch.cat([word.flatten(1), asked], -1)
        return TensorDict({"agents": agents, "state": state}, self.batch_size, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        self.draws.manual_seed(seed or 0)


def make_env(args: Args, num_envs: int) -> TransformedEnv:
    return TransformedEnv(Password(num_envs, args.agents, args.words, args.device))


def make_layer(args: Args, group: str) -> TensorDictModuleBase:
    """Make a recurrent layer of all agents, or of one: agents that share it have own states."""
    return recurrent_module(
        args.cell,
        args.words + 1,
        args.hidden_size,
        in_key=(group, "observation"),
        out_key=(group, "hidden"),
        state_key=(group, "state"),
    )


def make_policy(args: Args) -> TensorDictSequential:
    """Each agent: observation -> recurrent layer -> a value for each word -> the best word.

    Entries of the agents, ``("agents", ...)``, have the shape ``[*batch, agents, ...]``.
    """
    layers = [make_layer(args, "agents")]
    if args.own:
        names = [f"agent_{number}" for number in range(args.agents)]
        split = TensorDictModule(
            lambda entry: entry.unbind(-2),
            [("agents", "observation")],
            [(name, "observation") for name in names],
        )
        stack = TensorDictModule(
            lambda *entries: torch.stack(entries, -2),
            [(name, "hidden") for name in names],
            [("agents", "hidden")],
        )
        layers = [split, *(make_layer(args, name) for name in names), stack]
    head = MultiAgentMLP(
        n_agent_inputs=args.hidden_size,
        n_agent_outputs=args.words,
        n_agents=args.agents,
        centralized=False,
        share_params=not args.own,
        num_cells=[32],
        activation_class=nn.ReLU,
    )
    names = ("action", "action_value", "chosen_action_value")
    best = QValueModule(
        action_space="categorical",
        action_value_key=("agents", "action_value"),
        out_keys=[("agents", name) for name in names],
    )
    head = TensorDictModule(head, [("agents", "hidden")], [("agents", "action_value")])
    return TensorDictSequential([*layers, head, best]).to(args.device)


def make_loss(args: Args, policy: TensorDictSequential) -> LossModule:
    """QMIX: a mixer combines the agents' values to the team's value, which the reward teaches.

    See "QMIX: Monotonic Value Function Factorisation for Deep Multi-Agent Reinforcement Learning",
    Rashid et al., 2018 (arXiv:1803.11485).
    """
    state_size = args.agents * args.words + 1
    mixer = TensorDictModule(
        QMixer((state_size,), mixing_embed_dim=32, n_agents=args.agents, device=args.device),
        in_keys=[("agents", "chosen_action_value"), "state"],
        out_keys=["chosen_action_value"],
    )
    loss = QMixerLoss(policy, mixer, action_space="categorical", delay_value=True)
    loss.make_value_estimator(ValueEstimators.TDLambda, gamma=args.gamma, lmbda=args.lmbda)
    return recurrent_loss(loss)  # correct next values where episodes and sequences end


def check_finite(data: TensorDictBase) -> None:
    for key in ("state", ("agents", "observation"), ("next", "state"), ("next", "reward")):
        if not data.get(key).isfinite().all():
            raise UsageError(f"the environment returned NaN or inf in the entry {key!r}")


def evaluate(args: Args, policy: TensorDictSequential, episodes: int, seed: int) -> Tensor:
    """Play without exploration, and return the return of each episode."""
    env = make_env(args, episodes).append_transform(get_env_transforms_from_module(policy))
    return evaluate_policy(env, policy, seed + args.seed)


def write_records(args: Args, rows: list[dict[str, float]], test_return: float = math.nan) -> None:
    """Write learning_curve.csv and draw learning_curve.png."""
    folder, columns = Path(args.output), {name: [row[name] for row in rows] for name in rows[0]}
    with (folder / "learning_curve.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(columns), *([*row.values()] for row in rows)])
    fig = Figure(figsize=(7, 4), layout="constrained")
    ax = fig.subplots()
    x, low, high = columns["frames"], columns["evaluation_min"], columns["evaluation_max"]
    ax.fill_between(x, low, high, alpha=0.15, lw=0)
    ax.plot(x, columns["evaluation"], "o-", ms=3, label="evaluation: mean and range")
    ax.plot(x, columns["training_return"], "o-", ms=3, label="training, with exploration")
    ax.axhline(test_return, color="tab:green", ls="--", label=f"test: {test_return:.1f}")
    ax.set(title=f"Password, {args.cell}, seed {args.seed}", xlabel="frames", ylabel="return")
    ax.legend(fontsize="small")
    fig.savefig(folder / "learning_curve.png", dpi=120)


class Run:
    """The networks of a run, their optimizer, and its progress."""

    def __init__(self, args: Args, checkpoint: dict[str, Any]) -> None:
        torch.manual_seed(args.seed)
        self.args, self.policy = args, make_policy(args)
        self.explore: Any = EGreedyModule(
            make_env(args, 1).full_action_spec_unbatched,
            eps_end=args.epsilon,
            annealing_num_steps=args.epsilon_frames,
            action_key=("agents", "action"),
        ).to(args.device)
        self.loss = make_loss(args, self.policy)
        self.target = SoftUpdate(self.loss, tau=args.tau)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), args.learning_rate, eps=1e-5)
        self.frames = 0
        self.episodes = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []  # one for each evaluation
        self.best: dict[str, Any] = {"return": -math.inf}
        self.returns: deque[float] = deque(maxlen=100)
        self.losses: deque[float] = deque(maxlen=100)
        for name in MODULES if checkpoint else ():
            getattr(self, name).load_state_dict(checkpoint[name])
        for name in PROGRESS if checkpoint else ():
            setattr(self, name, checkpoint[name])

    def save(self) -> None:
        """Replace the checkpoint at once, so that its file is complete at any time."""
        modules = {name: getattr(self, name).state_dict() for name in MODULES}
        progress = {name: getattr(self, name) for name in PROGRESS}
        part = Path(self.args.output) / "checkpoint.part"
        torch.save({"args": asdict(self.args), **modules, **progress}, part)
        part.replace(part.with_suffix(".pt"))

    def count(self, data: TensorDictBase) -> None:
        """Add up frames, episodes and returns."""
        done = data["next", "done"]
        self.frames += data.numel()
        self.episodes += int(done.sum())
        self.returns.extend(data["next", "episode_reward"][done].tolist())
        self.explore.step(data.numel())

    def learn(self, batch: TensorDictBase) -> None:
        """Take one gradient step on sequences ``[slices, slice_len]``."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * max(0, 1 - self.frames / self.args.frames)
        loss = self.loss(batch)["loss"]
        if not loss.isfinite():
            raise UsageError(f"the entry 'loss' is {loss.item()} after {self.frames} frames")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.loss.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.target.step()
        self.losses.append(loss.item())

    def summarize(self) -> dict[str, float]:
        """Return means over the last episodes and gradient steps."""
        return {
            "training_return": fmean(self.returns or [math.nan]),
            "loss": fmean(self.losses or [math.nan]),
            "epsilon": self.explore.eps.item(),
        }

    def evaluate(self) -> None:
        """Play without exploration, keep the weights if they are the best, and record it."""
        args = self.args
        returns = evaluate(args, self.policy, args.eval_episodes, SELECTION_SEED)
        if returns.mean() >= self.best["return"]:
            weights = {name: value.clone() for name, value in self.policy.state_dict().items()}
            self.best = {"return": returns.mean().item(), "frames": self.frames, "policy": weights}
        row = {
            "frames": self.frames,
            "seconds": round(self.seconds, 1),
            "episodes": self.episodes,
            **self.summarize(),
            "evaluation": returns.mean().item(),
            "evaluation_min": returns.min().item(),
            "evaluation_max": returns.max().item(),
        }
        self.rows.append(row)
        write_records(args, self.rows)
        self.save()


def train(args: Args, checkpoint: dict[str, Any]) -> None:
    """Collect and learn until the run is finished or stopped, and test the best weights."""
    torch.set_num_threads(args.threads)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # the second one ends the program at once
        signal.signal(number, lambda n, _: stop.set() or signal.signal(n, signal.SIG_DFL))

    env = make_env(args, args.num_envs)
    run = Run(args, checkpoint)
    env.append_transform(RewardSum())
    env.append_transform(get_env_transforms_from_module(run.policy))  # is_init, initial states
    env.set_seed(args.seed + run.frames)  # other episodes and draws after --resume
    torch.manual_seed(args.seed + run.frames)
    actor = TensorDictSequential([run.policy, run.explore])
    collector = Collector(env, actor, frames_per_batch=args.batch_frames, storing_device="cpu")
    replay = TensorDictReplayBuffer(
        storage=LazyTensorStorage(args.capacity, ndim=2),
        sampler=SliceSampler(slice_len=args.slice_len, traj_key="stream", cache_values=True),
        batch_size=args.slices * args.slice_len,
    )
    # The loss computes values, and the states after each step, itself.
    computed = {unravel_key(key) for key in run.policy.out_keys} - {("agents", "action")}
    read: list[Any] = ["is_init", *run.loss.in_keys]
    keys = {unravel_key(key) for key in read} - computed
    streams = torch.arange(args.num_envs).unsqueeze(-1)
    logger = get_logger(args.logger, args.output, "log")

    Path(args.output).mkdir(parents=True, exist_ok=True)
    for name in FILES[-1:] if checkpoint else FILES:  # a resumed run has no result yet
        Path(args.output, name).unlink(missing_ok=True)
    if run.frames >= args.frames:
        print("This run is finished: a larger --frames continues it, --overwrite starts it again.")
    first_frame, start = run.frames, time.perf_counter() - run.seconds
    with tqdm(total=args.frames, initial=run.frames, unit=" frames") as bar:
        while run.frames < args.frames and not stop.is_set():
            data: Any = collector.next()
            check_finite(data)
            run.count(data)
            replay.extend(data.select(*keys).set("stream", streams.expand(data.shape)))
            if run.frames - first_frame >= args.warmup:
                for _ in range(args.updates):
                    run.learn(replay.sample().reshape(-1, args.slice_len).to(args.device))
            run.seconds = time.perf_counter() - start
            if run.frames % args.eval_every < data.numel() or run.frames >= args.frames:
                run.evaluate()
                if logger is not None:
                    logger.log_metrics(run.rows[-1], step=run.frames)
            bar.set_postfix(run.summarize(), refresh=False)
            bar.update(min(run.frames, args.frames) - bar.n)
    collector.shutdown()
    run.save()
    if stop.is_set() or not run.rows:
        print(f"Stopped after {run.frames} frames. Continue: --resume {args.output}/checkpoint.pt")
        return
    run.policy.load_state_dict(run.best["policy"])
    returns = evaluate(args, run.policy, TEST_EPISODES, TEST_SEED)
    write_records(args, run.rows, returns.mean().item())
    result = {
        "test_return": returns.mean().item(),
        "test_returns": returns.tolist(),
        "best_evaluation": run.best["return"],
        "best_frames": run.best["frames"],
        "frames": run.frames,
        "seconds": round(run.seconds, 1),
        "args": asdict(args),
    }
    Path(args.output, "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"Best weights, of frame {run.best['frames']}: mean return {returns.mean():.1f} over "
        f"{TEST_EPISODES} new episodes. Picture: {args.output}/learning_curve.png"
    )


def main(argv: Sequence[str] | None = None) -> None:
    try:
        train(*read_args(argv))
    except UsageError as error:
        print(f"recurrent_qmix.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
