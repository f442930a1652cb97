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

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import RewardScaling, RewardSum, TransformedEnv
from torchrl.modules import MLP, EGreedyModule, QValueModule
from torchrl.objectives import DQNLoss, SoftUpdate, ValueEstimators
from tqdm import tqdm

from rnnkeys import CellName, get_env_transforms_from_module, recurrent_module, runs
from rnnkeys.environments import EnvError, evaluate_policy, make_gym_env
from rnnkeys.objectives import recurrent_loss
from rnnkeys.spaces import ImageEncoder

logging.getLogger("torchrl").setLevel(logging.WARNING)  # without a line for each buffer

FIXED = ("env", "observation", "hide", "cell", "hidden_size", "seed")  # --resume keeps them
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
    frames: int = 100_000  # environment steps in the whole run, more than warmup
    seed: int = 0  # of all random numbers
    device: str = "cpu"  # of the networks: cpu, cuda, cuda:1
    threads: int = 1  # CPU threads of torch; small networks are fastest with one
    num_envs: int = 16  # environments that are stepped together
    batch_frames: int = 128  # frames that are collected in a round
    updates: int = 4  # gradient steps in a round
    warmup: int = 2_000  # frames collected before the first gradient step, also after --resume
    capacity: int = 100_000  # frames in the replay buffer, at least num_envs * slice_len
    slices: int = 32  # sequences in a batch
    slice_len: int = 64  # steps in a sequence
    gamma: float = 0.99  # discount
    lmbda: float = 0.95  # lambda of the TD(lambda) returns; 0 bootstraps after one step
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


def read_args(argv: Sequence[str] | None) -> tuple[Args, dict[str, Any]]:
    """Return the arguments and, after --resume, the checkpoint with their defaults."""
    args, checkpoint = runs.read_args(Args, argv, fixed=FIXED, description=__doc__)
    shortest = args.num_envs * args.slice_len  # frames of one sequence of each environment
    limits = {name: (0, 1) for name in ("gamma", "lmbda", "tau", "epsilon")}
    limits |= {name: (shortest, math.inf) for name in ("warmup", "capacity")}
    limits["frames"] = (max(shortest, args.warmup) + 1, math.inf)
    runs.check_ranges(args, **limits)
    if args.batch_frames % args.num_envs:
        raise runs.RunError("--batch-frames: expected a multiple of --num-envs")
    return args, checkpoint


def make_env(args: Args, num_envs: int) -> TransformedEnv:
    """Make environments that this process steps together."""
    limit = f"gymnasium.wrappers:TimeLimit(max_episode_steps={args.max_episode_steps})"
    hide, scale = args.hide, (1.0,)
    if args.env == "CartPole-v1" and args.observation == "auto" and not hide:
        # Positions / a tenth of their limits: velocities are small changes of them, and must show.
        hide, scale = (1, 3), (10 / 2.4, 10 / 0.2095)
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


def find_mask_key(env: TransformedEnv) -> str | None:
    """Return the key of the mask of allowed actions, if the environment has one."""
    return "action_mask" if "action_mask" in env.observation_spec.keys() else None


def make_policy(args: Args, env: TransformedEnv) -> TensorDictSequential:
    """Observation -> recurrent layer -> a value for each action -> the best action."""
    shape, action = env.observation_spec["observation"].shape[1:], env.action_spec_unbatched
    encoder, size = nn.Identity(), shape[0]
    if len(shape) == 3:
        encoder, size = ImageEncoder(shape), ImageEncoder.num_features
    layer = recurrent_module(args.cell, size, args.hidden_size, in_key="features", out_key="hidden")
    head = MLP(args.hidden_size, action.shape[-1], num_cells=[64], activation_class=nn.ReLU)
    modules = [
        TensorDictModule(encoder, ["observation"], ["features"]),
        layer,
        TensorDictModule(head, ["hidden"], ["action_value"]),
        QValueModule(spec=action, action_mask_key=find_mask_key(env)),
    ]
    return TensorDictSequential(modules).to(args.device)


def evaluate(args: Args, policy: TensorDictSequential, episodes: int, seed: int) -> Tensor:
    """Play without exploration, and return the return of each episode."""
    env = make_env(args, episodes).append_transform(get_env_transforms_from_module(policy))
    return evaluate_policy(env, policy, seed + args.seed)


class Learner:
    """The networks, and a gradient step on them."""

    def __init__(self, args: Args, env: TransformedEnv) -> None:
        torch.manual_seed(args.seed)
        action = env.action_spec_unbatched
        self.args, self.policy = args, make_policy(args, env)
        self.explore: Any = EGreedyModule(
            action,
            eps_end=args.epsilon,
            annealing_num_steps=args.epsilon_frames,
            action_mask_key=find_mask_key(env),
        ).to(args.device)
        loss = DQNLoss(
            self.policy,
            action_space=action,
            delay_value=True,
            double_dqn=True,
            loss_function="smooth_l1",
        )
        # One-step targets carry the end of an episode back by one of up to 500 steps in a round.
        several = args.gamma * args.lmbda > 0  # steps in a target
        kind = ValueEstimators.TDLambda if several else ValueEstimators.TD0
        options = {"lmbda": args.lmbda} if several else {}
        loss.make_value_estimator(kind, gamma=args.gamma, **options)
        self.loss = recurrent_loss(loss)  # correct next values where episodes and sequences end
        self.target = SoftUpdate(self.loss, tau=args.tau)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), args.learning_rate, eps=1e-5)

    def learn(self, batch: TensorDictBase, progress: float) -> float:
        """Take one gradient step on sequences ``[slices, slice_len]``, and return the loss."""
        self.optimizer.param_groups[0]["lr"] = self.args.learning_rate * max(0, 1 - progress)
        loss = self.loss(batch)["loss"]
        if not loss.isfinite():
            raise runs.RunError(f"the entry 'loss' is {loss.item()} after {progress:.0%} of frames")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.loss.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.target.step()
        return loss.item()


def train(args: Args, checkpoint: dict[str, Any]) -> None:
    """Collect and learn until the run is finished or stopped, and test the best weights."""
    torch.set_num_threads(args.threads)
    env = make_env(args, args.num_envs)
    learner = Learner(args, env)
    policy, explore = learner.policy, learner.explore
    modules = {"loss": learner.loss, "optimizer": learner.optimizer, "explore": explore}
    run = runs.Run(args, checkpoint, f"{args.env}, {args.cell}, seed {args.seed}", **modules)
    env.append_transform(RewardSum())
    env.append_transform(RewardScaling(loc=0.0, scale=args.reward_scale))
    env.append_transform(get_env_transforms_from_module(policy))  # is_init, initial states
    env.set_seed(args.seed + run.frames)  # other episodes and draws after --resume
    torch.manual_seed(args.seed + run.frames)
    actor = TensorDictSequential([policy, explore])
    collector = Collector(env, actor, frames_per_batch=args.batch_frames, storing_device="cpu")
    replay = TensorDictReplayBuffer(
        storage=LazyTensorStorage(args.capacity, ndim=2),
        sampler=SliceSampler(slice_len=args.slice_len, traj_key="stream", cache_values=True),
        batch_size=args.slices * args.slice_len,
    )
    # The loss computes the states after each step itself, so that the buffer need not keep them.
    keys = {"is_init", *learner.loss.in_keys} - set(policy[1].out_keys)
    streams = torch.arange(args.num_envs).unsqueeze(-1)

    if run.frames >= args.frames:
        print("This run is finished: a larger --frames continues it, --overwrite starts it again.")
    warm = run.frames + args.warmup
    bar = tqdm(total=args.frames, initial=run.frames, unit=" frames")
    with bar, runs.catch_signals() as stop:
        while run.frames < args.frames and not stop.is_set():
            data: Any = collector.next()
            run.count(data)
            explore.step(data.numel())
            replay.extend(data.select(*keys).set("stream", streams.expand(data.shape)))
            for _ in range(args.updates if run.frames >= warm else 0):
                batch = replay.sample().reshape(-1, args.slice_len).to(args.device)
                run.losses.append(learner.learn(batch, run.frames / args.frames))
            if run.frames % args.eval_every < data.numel() or run.frames >= args.frames:
                returns = evaluate(args, policy, args.eval_episodes, SELECTION_SEED)
                run.record(returns, policy, epsilon=explore.eps.item())
                run.save()
            bar.set_postfix({**run.summarize(), "epsilon": explore.eps.item()}, refresh=False)
            bar.update(min(run.frames, args.frames) - bar.n)
    collector.shutdown()
    run.save()
    if stop.is_set() or not run.rows:
        print(f"Stopped after {run.frames} frames. Continue: --resume {args.output}/checkpoint.pt")
        return
    policy.load_state_dict(run.best["policy"])
    print(run.finish(evaluate(args, policy, TEST_EPISODES, TEST_SEED)))


def main(argv: Sequence[str] | None = None) -> None:
    try:
        train(*read_args(argv))
    except (runs.RunError, EnvError) as error:
        print(f"recurrent_dqn.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
