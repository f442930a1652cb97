"""Recurrent SAC in one file: copy it, change it, train on any environment with continuous actions.

    python recurrent_sac.py                             # Pendulum without its velocity
    python recurrent_sac.py --cell feed_forward         # the feed-forward baseline
    python recurrent_sac.py --env BipedalWalker-v3 --frames 500000 --hide 2 4 5 7 9 10 12
    python recurrent_sac.py --resume runs/recurrent_sac/checkpoint.pt --frames 80000

It needs rnnkeys[tutorials]. Collector, replay buffer and loss are TorchRL's; recurrent layers and
``recurrent_loss``, which computes targets on the sequences as they were played, are rnnkeys'. A run
writes learning_curve.csv, learning_curve.png, checkpoint.pt, with the weights of the best
evaluation, and result.json, their returns in new episodes, to --output.
"""

from __future__ import annotations

import json
import math
import signal
import sys
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
from tensordict.nn import NormalParamExtractor, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import RewardScaling, RewardSum, TransformedEnv
from torchrl.modules import MLP, ProbabilisticActor
from torchrl.objectives import SACLoss, SoftUpdate, ValueEstimators
from torchrl.record.loggers import get_logger
from tqdm import tqdm

from rnnkeys import CellName, get_env_transforms_from_module, recurrent_module
from rnnkeys.environments import EnvError, evaluate_policy, make_gym_env
from rnnkeys.objectives import recurrent_loss
from rnnkeys.spaces import Choices, ImageEncoder, Layers, action_distribution


@dataclass
class Args:
    """Arguments of a run; each field is an option of the command line."""

    env: str = "Pendulum-v1"  # ID of Gymnasium, MODULE:ID, or 'ID(name=value)'
    wrappers: tuple[str, ...] = ()  # MODULE:CLASS, or 'MODULE:CLASS(name=value)'
    observation: Literal["auto", "all", "pixels"] = "auto"  # auto: without known velocities
    hide: tuple[int, ...] = ()  # entries of the observation that the policy cannot see
    magnify: float = 1.0  # factor on observations
    frame_stack: int = 1  # last observations that the policy sees at once
    reward_scale: float = 0.1  # factor on rewards: keeps values small

    cell: CellName = "gru"
    hidden_size: int = 64  # size of each recurrent layer
    net_arch: tuple[int, ...] = (64,)  # linear layers between recurrent layer and output

    frames: int = 24_000  # environment steps of the whole run
    num_envs: int = 8  # environments that are stepped together
    batch_frames: int = 32  # frames collected between two rounds of gradient steps
    updates: int = 5  # gradient steps in a round
    warmup: int = 1_600  # frames collected before the first round, also after --resume
    capacity: int = 100_000  # frames in the replay buffer
    slices: int = 32  # sequences in a gradient step
    slice_len: int = 32  # steps in a sequence
    burn_in: int = 4  # first steps of a sequence, which only prepare the recurrent states
    gamma: float = 0.97  # discount
    lmbda: float = 0.0  # lambda of TD(lambda); 0 bootstraps after one step
    learning_rate: float = 2e-3  # at the start; it falls to 0 at --frames
    tau: float = 0.02  # share by which target networks move in a gradient step
    alpha: float = 0.1  # weight of the entropy at the start; it is learned
    max_grad_norm: float = 10.0

    seed: int = 0
    device: str = "cpu"
    threads: int = 1  # CPU threads of torch: networks this small are fastest with one
    output: str = "runs/recurrent_sac"
    resume: str | None = None  # checkpoint.pt of a run to continue
    logger: Literal["csv", "tensorboard", "wandb"] | None = None  # one of TorchRL's, in addition
    eval_every: int = 2_000  # frames between two evaluations
    eval_episodes: int = 20


# Velocities in the observations of some environments, and the scales of the other entries.
VELOCITIES: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "Pendulum-v1": ((2,), (0.2, 0.2)),
    "MountainCarContinuous-v0": ((1,), (0.6,)),
}
NETWORK_ARGS = ("env", "observation", "cell", "hidden_size", "net_arch")
LIMITS = {"seed": (0, math.inf), "alpha": (1e-6, math.inf)}
LIMITS |= {"gamma": (0, 1), "lmbda": (0, 1), "tau": (0, 1)}
EVAL_SEED, TEST_SEED = 100_000_000, 200_000_000
FILES = ("checkpoint.pt", "learning_curve.csv", "learning_curve.png", "result.json")
MODULES = ("loss", "optimizer")
VALUES = ("frames", "episodes", "seconds", "rows", "best")


class UsageError(Exception):
    """A bad argument, or a run that cannot continue; the message is one line."""


def read_args(argv: Sequence[str] | None) -> tuple[Args, dict[str, Any] | None]:
    """Read the command line; with --resume, its defaults are the arguments of the checkpoint."""
    args, checkpoint = tyro.cli(Args, args=argv, description=__doc__), None
    if args.resume is not None:
        try:
            checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
            saved = Args(**checkpoint["args"])
        except (OSError, EOFError, LookupError, RuntimeError, TypeError, UnpicklingError) as error:
            raise UsageError(f"--resume {args.resume}: not a checkpoint of this file") from error
        args = tyro.cli(Args, args=argv, default=saved)
        for name in NETWORK_ARGS:
            old, new = getattr(saved, name), getattr(args, name)
            if old != new:
                raise UsageError(f"--{name} is {new!r}, but the checkpoint was made with {old!r}")
    check_args(args)
    return args, checkpoint


def check_args(args: Args) -> None:
    """Raise UsageError at a value that is out of range."""
    shortest = args.num_envs * args.slice_len
    limits = {**LIMITS, "burn_in": (0, args.slice_len - 1), "capacity": (shortest, math.inf)}
    limits["warmup"] = (shortest, args.frames - 1)
    for name, value in asdict(args).items():
        low, high = limits.get(name, (int(isinstance(value, int)), math.inf))
        if type(value) in (int, float) and not low <= value <= high:
            raise UsageError(f"--{name} is {value}: expected {low} to {high}")
    if args.batch_frames % args.num_envs:
        raise UsageError(f"--batch_frames is {args.batch_frames}: expected a multiple of num_envs")


def make_env(args: Args, num_envs: int) -> TransformedEnv:
    """Make environments that are stepped together, without the velocities that are known."""
    hide, scales = args.hide, (1.0,)
    if args.observation == "auto" and not hide:
        hide, scales = VELOCITIES.get(args.env, (hide, scales))
    return make_gym_env(
        args.env,
        num_envs,
        wrappers=args.wrappers,
        pixels=args.observation == "pixels",
        hide=hide,
        scale=[args.magnify / scale for scale in scales],
        frame_stack=args.frame_stack,
        device=args.device,
    )


def make_body(args: Args, env: TransformedEnv, name: str) -> tuple[list[Any], str, int]:
    """Make an encoder, if needed, and a recurrent layer that writes the entry ``name``.

    Returns:
        The modules, and the key and the size of what the recurrent layer reads.
    """
    shape = env.observation_spec["observation"].shape[1:]
    key, size, encoder = "observation", shape[0], []
    if len(shape) == 3:
        key, size = f"{name}_input", ImageEncoder.num_features
        encoder = [Layers(ImageEncoder(shape), ["observation"], [key])]
    recurrent = recurrent_module(
        args.cell,
        size,
        args.hidden_size,
        in_key=key,
        out_key=name,
        state_key=f"{name}_state",
    )
    return [*encoder, recurrent], key, size


def make_actor(args: Args, env: TransformedEnv) -> Any:
    """Observation -> recurrent layer; both -> a Gaussian, squashed into the action's bounds."""
    kind, options, outputs = action_distribution(env.action_spec)
    if kind is Choices:
        raise UsageError(
            f"{args.env} has discrete actions: use recurrent_ppo.py or recurrent_dqn.py"
        )
    body, key, size = make_body(args, env, "actor")
    head = MLP(
        args.hidden_size + size, 2 * outputs, num_cells=args.net_arch, activation_class=nn.ReLU
    )
    body += [
        Layers(head, ["actor", key], ["parameters"]),
        Layers(NormalParamExtractor(), ["parameters"], ["loc", "scale"]),
    ]
    return ProbabilisticActor(
        TensorDictSequential(*body),
        in_keys=["loc", "scale"],
        distribution_class=kind,
        distribution_kwargs=options,
        return_log_prob=True,
    ).to(args.device)


def make_critic(args: Args, env: TransformedEnv) -> TensorDictSequential:
    """Observation -> recurrent layer; both and an action -> value.

    The action enters after the recurrent layer: the loss asks for the value of one other action
    after the steps that were played, not for that of a sequence of other actions.
    """
    body, key, size = make_body(args, env, "critic")
    inputs = args.hidden_size + size + env.action_spec.shape[-1]
    head = MLP(inputs, 1, num_cells=args.net_arch, activation_class=nn.ReLU)
    value: Any = Layers(head, ["critic", key, "action"], ["state_action_value"])
    return TensorDictSequential(*body, value).to(args.device)


class Trainer:
    """A run: collect into a replay buffer, learn from sequences, evaluate in regular intervals."""

    def __init__(self, args: Args, checkpoint: dict[str, Any] | None = None) -> None:
        torch.manual_seed(args.seed)
        self.args, self.folder = args, Path(args.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [self.folder / name for name in (FILES[-1:] if checkpoint else FILES)]:
            if path.exists():  # of an earlier run
                path.replace(self.folder / f"previous_{path.name}")
        self.evaluation_env = env = make_env(args, args.eval_episodes)
        self.actor, critic = make_actor(args, env), make_critic(args, env)
        env.append_transform(get_env_transforms_from_module(self.actor))
        self.loss: Any = SACLoss(
            self.actor,
            critic,
            num_qvalue_nets=2,
            alpha_init=args.alpha,
            action_spec=env.action_spec_unbatched,
            loss_function="l2",
        )
        self.loss.loss_mask_key = "learned"  # False in the burn-in
        if args.lmbda:
            options = {"gamma": args.gamma, "lmbda": args.lmbda}
            self.loss.make_value_estimator(ValueEstimators.TDLambda, **options)
        else:
            self.loss.make_value_estimator(ValueEstimators.TD0, gamma=args.gamma)
        recurrent_loss(self.loss)
        self.target = SoftUpdate(self.loss, tau=args.tau)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), eps=1e-5, fused=True)
        # Without the critics' states, they start a sequence from zeros; the actor from its own.
        states = {key[-1] for key in critic.out_keys if isinstance(key, tuple)}
        self.keys = [key for key in ("is_init", *self.loss.in_keys) if key not in states]
        self.frames = self.episodes = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []  # of the learning curve
        self.best: dict[str, Any] = {"return": -math.inf}
        self.returns: deque[float] = deque(maxlen=100)  # of the last episodes
        self.losses: deque[float] = deque(maxlen=100)
        self.logger = get_logger(args.logger, str(self.folder), "logger")
        if checkpoint is not None:
            for name in MODULES:
                getattr(self, name).load_state_dict(checkpoint[name])
            for name in VALUES:
                setattr(self, name, checkpoint[name])

    def run(self, stops: list[int]) -> None:
        """Collect and learn until ``--frames`` are collected, or until ``stops`` has a signal."""
        args, first = self.args, self.frames
        env = make_env(args, args.num_envs)
        env.append_transform(RewardSum())
        env.append_transform(RewardScaling(loc=0.0, scale=args.reward_scale))
        env.append_transform(get_env_transforms_from_module(self.actor))
        env.set_seed(args.seed + self.frames)  # a resumed run plays other episodes
        collector = Collector(env, self.actor, frames_per_batch=args.batch_frames)
        # Sequences start anywhere in what an environment played, and cross the ends of episodes.
        replay = TensorDictReplayBuffer(
            storage=LazyTensorStorage(args.capacity, ndim=2),
            sampler=SliceSampler(slice_len=args.slice_len, traj_key="stream", cache_values=True),
            batch_size=args.slices * args.slice_len,
        )
        streams = torch.arange(args.num_envs).unsqueeze(-1)
        interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file stays short
        bar = tqdm(total=args.frames, initial=self.frames, unit=" frames", mininterval=interval)
        while self.frames < args.frames and not stops:
            start = time.perf_counter()
            data: Any = collector.next()
            replay.extend(data.select(*self.keys).set("stream", streams.expand(data.shape)))
            done = data["next", "done"]
            self.returns.extend(data["next", "episode_reward"][done].tolist())
            self.episodes += int(done.sum())
            self.frames += data.numel()
            if self.frames - first >= args.warmup:
                for _ in range(args.updates):
                    self.learn(replay.sample().reshape(-1, args.slice_len).to(args.device))
            self.seconds += time.perf_counter() - start
            if self.frames % args.eval_every < args.batch_frames or self.frames >= args.frames:
                self.evaluate()
            bar.set_postfix_str(f"return {fmean(self.returns or [math.nan]):.4g}", refresh=False)
            bar.update(data.numel())
        bar.close()
        collector.shutdown()
        self.save()

    def learn(self, batch: TensorDictBase) -> None:
        """Take one gradient step on sequences ``[slices, slice_len]``."""
        steps = torch.arange(batch.shape[-1], device=batch.device)
        batch["learned"] = (steps >= self.args.burn_in).expand(batch.shape)
        terms = self.loss(batch)
        # Each term reaches its own weights only: one backward pass serves all three.
        loss = terms["loss_actor"] + terms["loss_qvalue"] + terms["loss_alpha"]
        if not loss.isfinite():
            bad = [key for key, value in terms.items() if not value.isfinite().all()]
            raise UsageError(f"not finite at frame {self.frames}: {', '.join(bad)}")
        rate = self.args.learning_rate * max(0.0, 1 - self.frames / self.args.frames)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.loss.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.target.step()
        self.losses.append(terms["loss_qvalue"].item())

    def evaluate(self) -> None:
        """Play without exploration, keep the weights if they are the best, and record it."""
        returns = evaluate_policy(self.evaluation_env, self.actor, EVAL_SEED + self.args.seed)
        if returns.mean() >= self.best["return"]:
            weights = {key: value.clone() for key, value in self.actor.state_dict().items()}
            self.best = {"return": returns.mean().item(), "frames": self.frames, "actor": weights}
        row = {
            "frames": self.frames,
            "seconds": self.seconds,
            "episodes": self.episodes,
            "training_return": fmean(self.returns or [math.nan]),
            "loss": fmean(self.losses or [math.nan]),
            "alpha": self.loss.log_alpha.exp().item(),
            "evaluation": returns.mean().item(),
            "evaluation_min": returns.min().item(),
            "evaluation_max": returns.max().item(),
        }
        self.rows.append(row)
        lines = [",".join(f"{value:.9g}" for value in row.values()) for row in self.rows]
        (self.folder / "learning_curve.csv").write_text("\n".join([",".join(row), *lines, ""]))
        if self.logger is not None:
            for name, value in row.items():
                self.logger.log_scalar(name, value, step=self.frames)
        self.save()

    def save(self) -> None:
        """Write a checkpoint; a run that is killed meanwhile keeps the one before."""
        state = {name: getattr(self, name).state_dict() for name in MODULES}
        state |= {name: getattr(self, name) for name in VALUES}
        torch.save({"args": asdict(self.args), **state}, self.folder / "checkpoint.part")
        (self.folder / "checkpoint.part").replace(self.folder / "checkpoint.pt")

    def finish(self) -> None:
        """Test the weights of the best evaluation on new episodes, and write the result."""
        self.actor.load_state_dict(self.best["actor"])
        returns = evaluate_policy(self.evaluation_env, self.actor, TEST_SEED + self.args.seed)
        result = {
            "test_return": returns.mean().item(),
            "test_returns": returns.tolist(),
            "best_evaluation": self.best["return"],
            "best_frames": self.best["frames"],
            "frames": self.frames,
            "seconds": round(self.seconds, 1),
            "args": asdict(self.args),
        }
        (self.folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"The best weights return {returns.mean():.1f} on average in new episodes.")

    def draw(self) -> None:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        names = ("frames", "evaluation", "evaluation_min", "evaluation_max", "training_return")
        frames, middle, low, high, training = ([row[n] for row in self.rows] for n in names)
        axes.fill_between(frames, low, high, alpha=0.15, lw=0)
        axes.plot(frames, middle, marker="o", ms=3, label="evaluation: mean and range")
        axes.plot(frames, training, marker="o", ms=3, label="while training, with exploration")
        axes.set(title=f"{self.args.env}, {self.args.cell}", xlabel="frames", ylabel="return")
        axes.legend(fontsize="small")
        figure.savefig(self.folder / "learning_curve.png", dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    stops: list[int] = []

    def stop(number: int, _: Any) -> None:
        stops.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the run at once

    try:
        args, checkpoint = read_args(argv)
        torch.set_num_threads(args.threads)
        trainer = Trainer(args, checkpoint)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        trainer.run(stops)
        trainer.draw()
        if stops:
            print(f"Stopped. To continue: --resume {trainer.folder / 'checkpoint.pt'}")
        else:
            trainer.finish()
    except (UsageError, EnvError) as error:
        print(f"recurrent_sac.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
