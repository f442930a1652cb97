"""R2D2: recurrent replay with stored states, burn-in, prioritized windows and actors; one file.

    python r2d2.py                                     # CartPole without its velocities
    python r2d2.py --cell feed_forward                 # the feed-forward baseline does not learn
    python r2d2.py --actors process --num-actors 4     # processes that collect; or --actors ray
    python r2d2.py --env Acrobot-v1 --hide 4 5         # another environment, its velocities hidden
    python r2d2.py --resume runs/r2d2/checkpoint.pt --frames 200000

See "Recurrent Experience Replay in Distributed Reinforcement Learning", Kapturowski et al., 2019
(https://openreview.net/forum?id=r1lyTjAqYX). The environment is any of Gymnasium's with discrete
actions. A run writes to its --output folder learning_curve.csv and .png, with a row for each
evaluation; checkpoint.pt, with everything that --resume needs, the replay buffer included, and the
best weights; and, at the end, result.json, with the returns of those weights in new episodes.
Ctrl-C and SIGTERM stop a run after its current round.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import matplotlib
import torch
import tyro
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import RewardScaling, RewardSum, TransformedEnv
from torchrl.objectives import HardUpdate, SoftUpdate
from tqdm import tqdm

from rnnkeys import CellName, collectors, drqn_policy, get_env_transforms_from_module
from rnnkeys.environments import EnvError, evaluate_policy, make_gym_env
from rnnkeys.objectives import R2D2Loss
from rnnkeys.replay import PrioritizedSampler
from rnnkeys.transforms import RefreshStates, Windows, measure_staleness

matplotlib.use("Agg")  # pictures go to files: no display is needed
from matplotlib import pyplot as plt  # noqa: E402 (the backend is chosen before pyplot loads)

# CartPole's velocities; its positions are divided by the values that end an episode.
CARTPOLE = {"hide": (1, 3), "scale": (1 / 2.4, 1 / 0.2095)}
FIXED = ("output", "env", "hide", "scale", "cell", "hidden_size", "window_len", "seed")
MODULES = ("loss", "optimizer")  # in a checkpoint, beside the arguments, the replay and
PROGRESS = ("frames", "episodes", "trajectories", "seconds", "rows", "best")
FILES = ("checkpoint.pt", "learning_curve.csv", "learning_curve.png", "result.json")
SELECTION_SEED = 100_000_000  # of the episodes that choose the best weights
TEST_SEED = 200_000_000  # of the episodes that neither training nor choice has used
TEST_EPISODES = 20
SHARES = ("alpha", "beta", "eta", "gamma", "tau", "epsilon", "epsilon_start")


@dataclass
class Args:
    env: str = "CartPole-v1"  # Gymnasium's name of an environment with discrete actions
    hide: tuple[int, ...] | None = None  # hidden entries; None: CartPole-v1's velocities
    scale: tuple[float, ...] = (1.0,)  # factor of the other entries; one number, or one each
    cell: CellName = "lstm"  # kind of recurrent layer
    hidden_size: int = 128  # size of the hidden state
    frames: int = 80_000  # environment steps in the whole run
    seed: int = 0  # of all random numbers
    device: str = "cpu"  # of the networks and the replay buffer: cpu, cuda, cuda:1
    threads: int = 1  # CPU threads of torch; small networks are fastest with one
    actors: Literal["local", "process", "ray"] = "local"  # this process collects, or others do
    num_actors: int = 1  # processes, or actors on Ray
    ray_address: str | None = None  # of a running Ray cluster, such as 10.0.0.1:6379
    num_envs: int = 16  # environments of all actors together
    batch_frames: int = 128  # frames that are collected in a round
    updates: int = 4  # gradient steps in a round
    warmup: int = 2_000  # frames collected before the first gradient step
    window_len: int = 40  # steps in a window
    period: int = 20  # steps between the starts of two windows of an episode
    burn_in: int = 4  # first steps of a window, which only bring its state up to date
    state: Literal["zero", "stored", "refreshed"] = "stored"  # that windows start from
    refresh_every: int = 2_500  # frames between two times that all states are recomputed
    windows: int = 48  # windows in a batch
    capacity: int = 5_000  # windows in the replay buffer
    alpha: float = 0.6  # exponent of the priorities; 0 draws all windows alike
    beta: float = 0.4  # exponent of the importance weights; 1 corrects the draw fully
    eta: float = 0.9  # share of the largest error in the priority of a window
    gamma: float = 0.99  # discount
    n_steps: int = 5  # rewards in a target, before the target network's value
    rescale: float = 1e-3  # epsilon of the value rescaling; 0 does without
    reward_scale: float = 0.1  # factor of the rewards in the replay buffer
    learning_rate: float = 1e-3  # Adam's, in the beginning
    decay: Literal["linear", "constant"] = "linear"  # of the learning rate, to 0 at the last frame
    max_grad_norm: float = 10.0  # longer gradients are scaled down to this norm
    tau: float = 0.01  # share of the online network in each update of the target network
    target_period: int = 0  # gradient steps between two copies to the target network; 0: use tau
    exploration: Literal["ladder", "linear", "exponential"] = "ladder"  # rates of random actions
    epsilon: float = 0.4  # ladder: first of the environments' rates; others: last rate
    epsilon_start: float = 1.0  # rate of all environments in the beginning
    epsilon_frames: int = 15_000  # frames over which rates fall; exponential: to 37 %
    eval_every: int = 2_500  # frames between two evaluations
    eval_episodes: int = 20  # episodes in an evaluation
    output: str = "runs/r2d2"  # folder of the run
    resume: str | None = None  # checkpoint.pt of the run to continue
    overwrite: bool = False  # delete the run in the output folder and start again

    @property
    def envs_per_actor(self) -> int:
        return self.num_envs // self.num_actors


def read_args(argv: Sequence[str] | None) -> tuple[Args, dict[str, Any]]:
    """Return the arguments and, after --resume, the checkpoint with their defaults."""

    def parse(default: Args) -> Args:
        args = tyro.cli(Args, args=argv, default=default, description=__doc__)
        is_cartpole = args.env == "CartPole-v1" and args.hide is None
        return replace(args, **CARTPOLE) if is_cartpole else args

    args, checkpoint = parse(Args()), {}
    if args.resume is not None and not args.overwrite:
        try:
            checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
            old = Args(**{**checkpoint["args"], "output": str(Path(args.resume).parent)})
        except (OSError, EOFError, LookupError, TypeError, RuntimeError, pickle.PickleError):
            sys.exit(f"error: --resume is {args.resume}, not a checkpoint of this program")
        args = parse(old)
        for name in FIXED:
            if getattr(args, name) != getattr(old, name):
                sys.exit(f"error: --{name} must be {getattr(old, name)}, as in {args.resume}")
    elif not args.overwrite and any(Path(args.output, name).exists() for name in FILES):
        sys.exit(
            f"error: {args.output} contains a run. Continue it with --resume "
            f"{args.output}/checkpoint.pt, delete it with --overwrite, or choose another --output."
        )
    check_args(args)
    return args, checkpoint


def check_args(args: Args) -> None:
    for name, value in vars(args).items():
        least = 0 if name in ("seed", "burn_in", "target_period") else 1
        if type(value) is int and value < least:
            sys.exit(f"error: --{name} is {value}: expected at least {least}")
        if name in SHARES and not 0 <= value <= 1:
            sys.exit(f"error: --{name} is {value}: expected a number from 0 to 1")
    for name, expected, holds in (
        ("burn_in", "less than window_len", args.burn_in < args.window_len),
        ("period", "at most window_len", args.period <= args.window_len),
        (
            "num_actors",
            "1 if this process collects",
            args.actors != "local" or args.num_actors == 1,
        ),
        ("num_envs", "a multiple of num_actors", args.num_envs % args.num_actors == 0),
        ("batch_frames", "a multiple of num_envs", args.batch_frames % args.num_envs == 0),
    ):
        if not holds:
            sys.exit(f"error: --{name} is {getattr(args, name)}: expected {expected}")


def make_env(args: Args, num_envs: int, device: str) -> TransformedEnv:
    """Make environments that one process steps together; they raise at NaN and inf."""
    options: dict[str, Any] = {"hide": args.hide or (), "scale": args.scale}
    return make_gym_env(args.env, num_envs, device=device, discrete_actions=True, **options)


def make_training_env(args: Args, policy: TensorDictSequential) -> TransformedEnv:
    """Make the environments of an actor."""
    env = make_env(args, args.envs_per_actor, args.device if args.actors == "local" else "cpu")
    env.append_transform(RewardSum())
    env.append_transform(RewardScaling(loc=0.0, scale=args.reward_scale))
    return env.append_transform(get_env_transforms_from_module(policy))  # is_init, initial states


def make_explorer(args: Args, policy: Any, floor: Tensor, actor: int) -> TensorDictSequential:
    """Return the policy followed by random actions; ``floor`` is the least rate of them."""
    rates = torch.zeros(args.num_envs)
    if args.exploration == "ladder":
        rates = collectors.epsilon_ladder(args.num_envs, args.epsilon)
    own = rates[actor * args.envs_per_actor :][: args.envs_per_actor]
    head = policy[-1]
    explore = collectors.EpsilonGreedy(head.spec["action"], own, "action", head.action_mask_key)
    explore.floor = floor
    return TensorDictSequential([policy, explore])


def make_actors(args: Args, run: Run) -> collectors.Actors:
    make_env = partial(make_training_env, args, run.policy)
    make_policy = partial(make_explorer, args, run.policy, run.epsilon_floor)
    options: dict[str, Any] = {
        "frames_per_batch": args.batch_frames,
        "seed": args.seed + run.frames,  # a resumed run plays other episodes
        "first_trajectory": run.trajectories,
    }
    if args.actors == "local":
        return collectors.LocalActors(make_env, make_policy, **options)
    options["num_actors"] = args.num_actors
    if args.actors == "process":
        return collectors.ProcessActors(make_env, make_policy, **options)
    return collectors.RayActors(make_env, make_policy, address=args.ray_address, **options)


def evaluate(args: Args, policy: TensorDictSequential, episodes: int, seed: int) -> Tensor:
    """Play without exploration, and return the returns, float32 ``[episodes]``."""
    env = make_env(args, episodes, args.device)
    env.append_transform(get_env_transforms_from_module(policy))
    return evaluate_policy(env, policy, seed)


def write_records(args: Args, rows: list[dict[str, float]], test_return: float = math.nan) -> None:
    """Write learning_curve.csv and draw learning_curve.png."""
    folder, columns = Path(args.output), {name: [row[name] for row in rows] for name in rows[0]}
    with (folder / "learning_curve.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(columns), *([*row.values()] for row in rows)])
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    x = columns["frames"]
    ax.fill_between(x, columns["evaluation_min"], columns["evaluation_max"], alpha=0.15, lw=0)
    ax.plot(x, columns["evaluation"], "o-", ms=3, label="evaluation: mean and range")
    ax.plot(x, columns["training_return"], "o-", ms=3, label="training, with exploration")
    ax.axhline(test_return, color="tab:green", ls="--", label=f"test: {test_return:.1f}")
    ax.set(title=f"{args.env}, {args.cell}, seed {args.seed}", xlabel="frames", ylabel="return")
    ax.legend(fontsize="small")
    fig.savefig(folder / "learning_curve.png", dpi=120)
    plt.close(fig)


def make_replay(args: Args, saved: dict[str, Any]) -> TensorDictReplayBuffer:
    """Make a prioritized replay buffer of windows, each with the state that it starts from."""
    replay = TensorDictReplayBuffer(
        storage=LazyTensorStorage(args.capacity, device=args.device),
        # The priorities are few, and stay on the CPU wherever the windows are.
        sampler=PrioritizedSampler(args.capacity, args.alpha, args.beta, device="cpu"),
        priority_key="td_error",
        batch_size=args.windows,
        generator=torch.Generator().manual_seed(args.seed),
    )
    if saved:  # windows of a checkpoint are not cut again: the transform comes after them
        windows, priorities = TensorDict(saved["windows"]).auto_batch_size_(1), saved["priorities"]
        replay.extend(windows[-args.capacity :])
        replay.update_priority(torch.arange(len(replay)), priorities[-args.capacity :])
    replay.append_transform(Windows(args.window_len, "overlap", args.period))
    return replay


def save_replay(replay: Any) -> dict[str, Any]:
    """Return the windows, the oldest first, and their priorities; nothing of an empty buffer."""
    if not len(replay):
        return {}
    oldest = replay.write_count if len(replay) == replay.storage.max_size else 0
    order = torch.arange(len(replay)).roll(-oldest)
    windows = replay.storage[:][order].to_dict()
    return {"windows": windows, "priorities": replay.sampler.get_priorities(order)}


class Run:
    """The networks of a run, their optimizer, the replay, and its progress."""

    def __init__(self, args: Args, checkpoint: dict[str, Any]) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        env = make_env(args, 1, args.device)
        shape = env.observation_spec["observation"].shape[1:]
        self.policy = drqn_policy(
            env.action_spec_unbatched,
            shape,
            cell=args.cell,
            hidden_size=args.hidden_size,
            encoder_sizes=() if len(shape) == 1 else (args.hidden_size,),  # of images
            action_mask_key="action_mask" if "action_mask" in env.observation_spec.keys() else None,
        ).to(args.device)
        self.loss = R2D2Loss(
            self.policy,
            burn_in=args.burn_in,
            learn_starts=True,  # the burn-in of an episode's first steps needs no other steps
            n_steps=args.n_steps,
            gamma=args.gamma,
            eps=args.rescale or None,
            eta=args.eta,
            loss_function="smooth_l1",
        )
        self.target = SoftUpdate(self.loss, tau=args.tau)
        if args.target_period:
            interval = args.target_period - 1  # the steps without an update, in TorchRL
            self.target = HardUpdate(self.loss, value_network_update_interval=interval)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), args.learning_rate, eps=1e-5)
        self.epsilon_floor = torch.tensor(args.epsilon_start, device=args.device)
        self.replay = make_replay(args, checkpoint.get("replay", {}))
        self.frames = 0
        self.episodes = 0
        self.trajectories = 0
        self.seconds = 0.0
        self.lag = 0  # policy updates since the latest batch was requested
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
        progress["replay"] = save_replay(self.replay)
        part = Path(self.args.output) / "checkpoint.part"
        torch.save({"args": asdict(self.args), **modules, **progress}, part)
        part.replace(part.with_suffix(".pt"))

    def anneal(self) -> None:
        """Set the rate of random actions and the learning rate."""
        args, progress = self.args, self.frames / self.args.epsilon_frames
        last = 0.0 if args.exploration == "ladder" else args.epsilon
        left = math.exp(-progress) if args.exploration == "exponential" else max(0, 1 - progress)
        self.epsilon_floor.fill_(last + (args.epsilon_start - last) * left)
        if args.decay == "linear":
            for group in self.optimizer.param_groups:
                group["lr"] = args.learning_rate * max(0, 1 - self.frames / args.frames)

    def store(self, data: TensorDictBase, actors: collectors.Actors) -> None:
        """Count a batch ``[num_envs, T]`` of one actor, and cut it into windows to remember."""
        done = data["next", "done"]
        self.frames += data.numel()
        self.episodes += int(done.sum())
        self.trajectories = actors.num_trajectories
        self.returns.extend(data["next", "episode_reward"][done].tolist())
        self.lag = actors.policy_version - int(data["collector", "policy_version"][0, 0])
        self.replay.extend(data.select(*self.loss.in_keys, ("collector", "traj_ids")))

    def learn(self) -> None:
        """Take one gradient step; the loss writes the priorities of the windows."""
        windows = self.replay.sample()  # [windows, window_len]
        if self.args.state == "zero":
            states = [key for key in self.policy.in_keys if "recurrent_state" in key]
            windows.update({key: torch.zeros_like(windows[key]) for key in states})
        loss = self.loss(windows)["loss"]  # it raises an error that names an entry with NaN
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.loss.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.target.step()
        self.replay.update_tensordict_priority(windows)
        self.losses.append(loss.item())

    def summarize(self) -> dict[str, float]:
        """Return means over the last episodes and gradient steps."""
        return {
            "training_return": fmean(self.returns or [math.nan]),
            "loss": fmean(self.losses or [math.nan]),
            "epsilon": self.epsilon_floor.item(),
            "lag": self.lag,
        }

    def evaluate(self) -> None:
        """Play without exploration, keep the weights if they are the best, and record it."""
        args = self.args
        returns = evaluate(args, self.policy, args.eval_episodes, SELECTION_SEED + args.seed)
        is_zero = args.state == "zero"
        staleness = measure_staleness(self.policy, self.replay, args.burn_in, zero_states=is_zero)
        if returns.mean() >= self.best["return"]:
            weights = {name: value.clone() for name, value in self.policy.state_dict().items()}
            self.best = {"return": returns.mean().item(), "frames": self.frames, "policy": weights}
        row = {
            "frames": self.frames,
            "seconds": round(self.seconds, 1),
            "episodes": self.episodes,
            **self.summarize(),
            **{f"staleness_{step}": value for step, value in staleness.items()},
            "evaluation": returns.mean().item(),
            "evaluation_min": returns.min().item(),
            "evaluation_max": returns.max().item(),
        }
        self.rows.append(row)
        write_records(args, self.rows)
        self.save()


def train(args: Args, run: Run) -> None:
    """Collect, store and learn until all frames are collected, or until Ctrl-C or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # the second one ends the program at once
        signal.signal(number, lambda n, _: stop.set() or signal.signal(n, signal.SIG_DFL))
    start = time.perf_counter() - run.seconds
    run.anneal()
    with tqdm(total=args.frames, initial=run.frames) as bar, make_actors(args, run) as actors:
        while run.frames < args.frames and not stop.is_set():
            data = actors.next()
            run.store(data, actors)
            run.anneal()
            if run.frames >= args.warmup and len(run.replay):
                if args.state == "refreshed" and run.frames % args.refresh_every < data.numel():
                    RefreshStates(run.policy).refresh_buffer(run.replay)
                for _ in range(args.updates):
                    run.learn()
                actors.update_policy(make_explorer(args, run.policy, run.epsilon_floor, 0))
            run.seconds = time.perf_counter() - start
            if run.frames % args.eval_every < data.numel() or run.frames >= args.frames:
                run.evaluate()
            bar.set_postfix(run.summarize(), refresh=False)
            bar.update(data.numel())


def main(argv: Sequence[str] | None = None) -> None:
    args, checkpoint = read_args(argv)
    logging.getLogger("torchrl").setLevel(logging.ERROR)  # it logs every buffer
    torch.set_num_threads(args.threads)
    try:
        run = Run(args, checkpoint)
        Path(args.output).mkdir(parents=True, exist_ok=True)
        for name in FILES[-1:] if checkpoint else FILES:  # a resumed run has no result yet
            Path(args.output, name).unlink(missing_ok=True)
        try:
            train(args, run)
        finally:
            run.save()
    except (EnvError, collectors.ActorError, collectors.ActorsLostError) as error:
        sys.exit(f"error: {str(error).strip().splitlines()[-1]}")  # the last line of a traceback
    if run.frames < args.frames or not run.rows:
        print(f"Stopped after {run.frames} frames. Continue: --resume {args.output}/checkpoint.pt")
        return
    run.policy.load_state_dict(run.best["policy"])
    returns = evaluate(args, run.policy, TEST_EPISODES, TEST_SEED + args.seed)
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


if __name__ == "__main__":
    main()
