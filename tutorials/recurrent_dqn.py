"""A recurrent DQN that learns CartPole without its velocities: one file to run, copy and change.

    python recurrent_dqn.py                           # learns in three minutes on one CPU core
    python recurrent_dqn.py --cell feed_forward       # the feed-forward baseline does not learn
    python recurrent_dqn.py --env Acrobot-v1 --hide 4 5    # hides the velocities of another one
    python recurrent_dqn.py --resume runs/recurrent_dqn/checkpoint.pt --frames 200000

The environment is any of Gymnasium's with discrete actions. A run writes to its --output folder
learning_curve.csv and .png, with a row for each evaluation; checkpoint.pt, with everything that
--resume needs and the weights of the best evaluation; and, at the end, result.json, with the
returns of those weights in new episodes. Ctrl-C and SIGTERM stop a run after its current round.
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
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import RewardScaling, RewardSum, TransformedEnv
from torchrl.modules import MLP, ConvNet, EGreedyModule, QValueModule
from torchrl.objectives import DQNLoss, SoftUpdate, ValueEstimators
from torchrl.record.loggers import get_logger
from tqdm import tqdm

from rnnkeys import CellName, get_env_transforms_from_module, recurrent_module
from rnnkeys.environments import EnvError, evaluate_policy, make_gym_env
from rnnkeys.objectives import recurrent_loss

logging.getLogger("torchrl").setLevel(logging.WARNING)  # without a line for each buffer

# Arguments that --resume cannot change.
FIXED = ("output", "env", "observation", "hide", "cell", "hidden_size", "seed")
MODULES = ("loss", "optimizer", "explore")  # in a checkpoint, beside the arguments and
PROGRESS = ("frames", "episodes", "seconds", "rows", "best")
FILES = ("checkpoint.pt", "learning_curve.csv", "learning_curve.png", "result.json")
SELECTION_SEED = 100_000_000  # of the episodes that choose the best weights
TEST_SEED = 200_000_000  # of the episodes that neither training nor choice has used
TEST_EPISODES = 20


@dataclass
class Args:
    env: str = "CartPole-v1"  # Gymnasium's name of an environment with discrete actions
    observation: Literal["auto", "all", "pixels"] = "auto"  # auto: no velocities in CartPole-v1
    hide: tuple[int, ...] = ()  # entries of the observation that the policy cannot see
    max_episode_steps: int = 10_000  # later steps are cut off, if the environment allows them
    cell: CellName = "lstm"  # kind of recurrent layer
    hidden_size: int = 128  # size of the hidden state
    frames: int = 100_000  # environment steps in the whole run
    seed: int = 0  # of all random numbers
    device: str = "cpu"  # of the networks: cpu, cuda, cuda:1
    threads: int = 1  # CPU threads of torch; small networks are fastest with one
    num_envs: int = 16  # environments that are stepped together
    batch_frames: int = 128  # frames that are collected in a round
    updates: int = 4  # gradient steps in a round
    warmup: int = 2_000  # frames collected before the first gradient step, also after --resume
    capacity: int = 100_000  # frames in the replay buffer
    slices: int = 32  # sequences in a batch
    slice_len: int = 64  # steps in a sequence
    gamma: float = 0.99  # discount
    lmbda: float = 0.95  # lambda of the TD(lambda) returns
    reward_scale: float = 0.1  # factor of the rewards in the replay buffer
    learning_rate: float = 1e-3  # Adam's first; it falls linearly to 0 at the last frame
    max_grad_norm: float = 10.0  # longer gradients are scaled down to this norm
    tau: float = 0.01  # share of the online network in each update of the target network
    epsilon: float = 0.02  # last probability of a random action; the first is 1
    epsilon_frames: int = 15_000  # frames over which that probability falls
    eval_every: int = 5_000  # frames between two evaluations
    eval_episodes: int = 32  # episodes in an evaluation
    output: str = "runs/recurrent_dqn"  # folder of the run
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
        if type(value) is int and value < (name != "seed"):
            raise UsageError(f"--{name} is {value}: expected at least 1")
        if name in ("gamma", "lmbda", "tau", "epsilon") and not 0 <= value <= 1:
            raise UsageError(f"--{name} is {value}: expected a number from 0 to 1")
        if name in ("warmup", "capacity") and value < args.num_envs * args.slice_len:
            raise UsageError(f"--{name} is {value}: expected at least num_envs * slice_len")
    if args.batch_frames % args.num_envs:
        raise UsageError(f"--batch_frames is {args.batch_frames}: expected a multiple of num_envs")
    if args.frames <= args.warmup:
        raise UsageError(f"--frames is {args.frames}: expected more than warmup, {args.warmup}")


def make_env(args: Args, num_envs: int) -> TransformedEnv:
    """Make environments that this process steps together."""
    limit = f"gymnasium.wrappers:TimeLimit(max_episode_steps={args.max_episode_steps})"
    hide, scale = args.hide, (1.0,)
    if args.env == "CartPole-v1" and args.observation == "auto" and not hide:
        hide, scale = (1, 3), (1 / 2.4, 1 / 0.2095)  # positions / their limits
    return make_gym_env(
        args.env,
        num_envs,
        wrappers=[limit],
        pixels=args.observation == "pixels",
        hide=hide,
        scale=scale,
        discrete_actions=True,
        device=args.device,
    )


class Bytes(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image / 255


def make_policy(args: Args, env: TransformedEnv) -> TensorDictSequential:
    """Observation -> recurrent layer -> a value for each action -> the best action."""
    shape, action = env.observation_spec["observation"].shape[1:], env.action_spec_unbatched
    encoder = nn.Identity()
    if len(shape) == 3:
        conv = ConvNet(shape[0], num_cells=[32, 64, 64], kernel_sizes=[8, 4, 3], strides=[4, 2, 1])
        encoder = nn.Sequential(Bytes(), conv)
    size = encoder(torch.zeros(1, *shape)).shape[-1]
    layer = recurrent_module(args.cell, size, args.hidden_size, in_key="features", out_key="hidden")
    head = MLP(args.hidden_size, action.shape[-1], num_cells=[64], activation_class=nn.ReLU)
    modules = [
        TensorDictModule(encoder, ["observation"], ["features"]),
        layer,
        TensorDictModule(head, ["hidden"], ["action_value"]),
        QValueModule(spec=action),
    ]
    return TensorDictSequential(modules).to(args.device)


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
    ax.set(title=f"{args.env}, {args.cell}, seed {args.seed}", xlabel="frames", ylabel="return")
    ax.legend(fontsize="small")
    fig.savefig(folder / "learning_curve.png", dpi=120)


class Run:
    """The networks of a run, their optimizer, and its progress."""

    def __init__(self, args: Args, env: TransformedEnv, checkpoint: dict[str, Any]) -> None:
        torch.manual_seed(args.seed)
        action = env.action_spec_unbatched
        self.args, self.policy = args, make_policy(args, env)
        self.explore: Any = EGreedyModule(
            action, eps_end=args.epsilon, annealing_num_steps=args.epsilon_frames
        ).to(args.device)
        loss = DQNLoss(
            self.policy,
            action_space=action,
            delay_value=True,
            double_dqn=True,
            loss_function="smooth_l1",
        )
        # One-step targets carry the end of an episode back by one of up to 500 steps in a round.
        loss.make_value_estimator(ValueEstimators.TDLambda, gamma=args.gamma, lmbda=args.lmbda)
        self.loss = recurrent_loss(loss)  # correct next values where episodes and sequences end
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
    run = Run(args, env, checkpoint)
    env.append_transform(RewardSum())
    env.append_transform(RewardScaling(loc=0.0, scale=args.reward_scale))
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
    # The loss computes the states after each step itself, so that the buffer need not keep them.
    keys = {"is_init", *run.loss.in_keys} - set(run.policy[1].out_keys)
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
    except (UsageError, EnvError) as error:
        print(f"recurrent_dqn.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
