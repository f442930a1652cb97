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

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import RewardScaling, RewardSum, TransformedEnv
from torchrl.objectives import HardUpdate, SoftUpdate
from tqdm import tqdm

from rnnkeys import CellName, collectors, drqn_policy, get_env_transforms_from_module, runs
from rnnkeys.environments import EnvError, evaluate_policy, make_gym_env
from rnnkeys.objectives import R2D2Loss
from rnnkeys.replay import PrioritizedSampler
from rnnkeys.transforms import RefreshStates, Windows, measure_staleness

logging.getLogger("torchrl").setLevel(logging.ERROR)  # it logs every buffer

# --resume keeps them:
FIXED = ("env", "hide", "scale", "cell", "cell_options", "hidden_size", "window_len", "seed")
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
    cell_options: dict[str, float | str] = field(default_factory=dict)  # such as: block plain
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
    greedy_returns: bool = False  # stop the sum of rewards before a random action
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
    first_visits: float = 0.0  # N0: N0 / (N0 + visits) of an observation is its least rate
    epsilon_frames: int = 15_000  # frames over which rates fall; exponential: to 37 %
    eval_every: int = 2_500  # frames between two evaluations
    eval_episodes: int = 20  # episodes in an evaluation
    output: str = "runs/r2d2"  # folder of the run
    resume: str | None = None  # checkpoint.pt of the run to continue
    overwrite: bool = False  # delete the run in the output folder and start again

    logger: Literal["csv", "tensorboard", "wandb"] | None = None  # log through TorchRL, too

    def __post_init__(self) -> None:
        if self.env == "CartPole-v1" and self.hide is None:
            # Positions / a tenth of their limits: velocities are small changes of them.
            self.hide, self.scale = (1, 3), (10 / 2.4, 10 / 0.2095)

    @property
    def envs_per_actor(self) -> int:
        return self.num_envs // self.num_actors


def read_args(argv: Sequence[str] | None) -> tuple[Args, dict[str, Any]]:
    """Return the arguments and, after --resume, the checkpoint with their defaults."""
    args, checkpoint = runs.read_args(Args, argv, fixed=FIXED, description=__doc__)
    limits: dict[str, tuple[float, float]] = {name: (0, 1) for name in SHARES}
    limits |= {"burn_in": (0, args.window_len - 1), "period": (1, args.window_len)}
    limits |= {"target_period": (0, math.inf), "first_visits": (0, math.inf)}
    runs.check_ranges(args, **limits)
    if args.actors == "local" and args.num_actors > 1:
        raise runs.RunError(f"--num-actors is {args.num_actors}: --actors local expects 1")
    if args.num_envs % args.num_actors:
        raise runs.RunError(f"--num-envs is {args.num_envs}: expected a multiple of --num-actors")
    if args.batch_frames % args.num_envs:
        raise runs.RunError("--batch-frames: expected a multiple of --num-envs")
    return args, checkpoint


def make_env(args: Args, num_envs: int, device: str) -> TransformedEnv:
    """Make environments that one process steps together; they raise at NaN and inf."""
    options: dict[str, Any] = {"hide": args.hide or (), "scale": args.scale}
    return make_gym_env(args.env, num_envs, device=device, discrete_actions=True, **options)


def make_policy(args: Args, env: TransformedEnv) -> TensorDictSequential:
    """Make the network: recurrent layer, a value for each action, the best action."""
    shape = env.observation_spec["observation"].shape[1:]
    options: Any = args.cell_options
    try:
        policy = drqn_policy(
            env.action_spec_unbatched,
            shape,
            cell=args.cell,
            hidden_size=args.hidden_size,
            encoder_sizes=() if len(shape) == 1 else (args.hidden_size,),  # of images
            action_mask_key="action_mask" if "action_mask" in env.observation_spec.keys() else None,
            **options,
        )
    except (TypeError, ValueError) as error:
        words = f"--cell is {args.cell}, --cell-options is {options}"
        raise runs.RunError(f"{words}: {error}") from error
    return policy.to(args.device)


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
    explore = collectors.EpsilonGreedy(
        head.spec["action"], own, "action", head.action_mask_key, args.first_visits
    )
    explore.floor = floor
    return TensorDictSequential([policy, explore])


def make_actors(args: Args, learner: Learner, first_frame: int) -> collectors.Actors:
    """Make the actors: this process, or others on one machine or on Ray."""
    make_env = partial(make_training_env, args, learner.policy)
    make_policy = partial(make_explorer, args, learner.policy, learner.epsilon_floor)
    options: dict[str, Any] = {
        "frames_per_batch": args.batch_frames,
        "seed": args.seed + first_frame,  # a resumed run plays other episodes
        "first_trajectory": learner.trajectories,
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
    windows = replay.storage[:][order].exclude("index").to_dict()  # positions in this storage
    return {"windows": windows, "priorities": replay.sampler.get_priorities(order)}


class Learner:
    """The networks, the replay buffer, and a gradient step on its windows."""

    def __init__(self, args: Args, checkpoint: dict[str, Any]) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        env = make_env(args, 1, args.device)
        self.policy = make_policy(args, env)
        self.loss = R2D2Loss(
            self.policy,
            burn_in=args.burn_in,
            learn_starts=True,  # the burn-in of an episode's first steps needs no other steps
            n_steps=args.n_steps,
            greedy_returns=args.greedy_returns,
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
        with runs.explain_resume_errors():
            self.replay = make_replay(args, checkpoint["replay"] if checkpoint else {})
            self.trajectories = checkpoint["trajectories"] if checkpoint else 0
        self.lag = 0  # policy updates since the latest batch was requested

    def make_run(self, checkpoint: dict[str, Any]) -> runs.Run:
        args = self.args
        modules = {"loss": self.loss, "optimizer": self.optimizer}
        return runs.Run(args, checkpoint, f"{args.env}, {args.cell}, seed {args.seed}", **modules)

    def save(self, run: runs.Run) -> None:
        run.save(replay=save_replay(self.replay), trajectories=self.trajectories)

    def anneal(self, frames: int) -> None:
        """Set the rate of random actions and the learning rate."""
        args, progress = self.args, frames / self.args.epsilon_frames
        last = 0.0 if args.exploration == "ladder" else args.epsilon
        left = math.exp(-progress) if args.exploration == "exponential" else max(0, 1 - progress)
        self.epsilon_floor.fill_(last + (args.epsilon_start - last) * left)
        if args.decay == "linear":
            for group in self.optimizer.param_groups:
                group["lr"] = args.learning_rate * max(0, 1 - frames / args.frames)

    def store(self, data: TensorDictBase, actors: collectors.Actors) -> None:
        """Cut a batch ``[num_envs, T]`` of one actor into windows to remember."""
        self.trajectories = actors.num_trajectories
        self.lag = actors.policy_version - int(data["collector", "policy_version"][0, 0])
        self.replay.extend(data.select(*self.loss.in_keys, ("collector", "traj_ids")))

    def learn(self) -> float:
        """Take one gradient step, and return the loss, which writes priorities of the windows."""
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
        return loss.item()

    def measure(self) -> dict[str, float]:
        """Return how stale the states are that windows start from, at two steps of them."""
        args = self.args
        is_zero = args.state == "zero"
        stale = measure_staleness(self.policy, self.replay, args.burn_in, zero_states=is_zero)
        return {f"staleness_{step}": value for step, value in stale.items()}


def train(args: Args, learner: Learner, run: runs.Run) -> None:
    """Collect, store and learn until all frames are collected, or until Ctrl-C or SIGTERM."""
    learner.anneal(run.frames)
    bar = tqdm(total=args.frames, initial=run.frames, unit=" frames")
    with runs.catch_signals() as stop, bar, make_actors(args, learner, run.frames) as actors:
        while run.frames < args.frames and not stop.is_set():
            data = actors.next()
            run.count(data)
            learner.store(data, actors)
            learner.anneal(run.frames)
            if run.frames >= args.warmup and len(learner.replay):
                if args.state == "refreshed" and run.frames % args.refresh_every < data.numel():
                    RefreshStates(learner.policy).refresh_buffer(learner.replay)
                for _ in range(args.updates):
                    run.losses.append(learner.learn())
                explorer = make_explorer(args, learner.policy, learner.epsilon_floor, 0)
                actors.update_policy(explorer)
            shown = {"epsilon": learner.epsilon_floor.item(), "lag": learner.lag}
            if run.frames % args.eval_every < data.numel() or run.frames >= args.frames:
                seed = SELECTION_SEED + args.seed
                returns = evaluate(args, learner.policy, args.eval_episodes, seed)
                run.record(returns, learner.policy, **shown, **learner.measure())
                learner.save(run)
            bar.set_postfix({**run.summarize(), **shown}, refresh=False)
            bar.update(data.numel())


def main(argv: Sequence[str] | None = None) -> None:
    try:
        args, checkpoint = read_args(argv)
        torch.set_num_threads(args.threads)
        learner = Learner(args, checkpoint)
        run = learner.make_run(checkpoint)
        try:
            train(args, learner, run)
        finally:
            learner.save(run)
    except (runs.RunError, EnvError, collectors.ActorError, collectors.ActorsLostError) as error:
        line = str(error).strip().splitlines()[-1]  # the last one of a traceback
        print(f"r2d2.py: error: {line}", file=sys.stderr)
        sys.exit(2)
    if run.frames < args.frames or not run.rows:
        print(f"Stopped after {run.frames} frames. Continue: --resume {args.output}/checkpoint.pt")
        return
    learner.policy.load_state_dict(run.best["policy"])
    print(run.finish(evaluate(args, learner.policy, TEST_EPISODES, TEST_SEED + args.seed)))


if __name__ == "__main__":
    main()
