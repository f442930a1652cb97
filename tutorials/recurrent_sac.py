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

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import CompositeDistribution, NormalParamExtractor, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import RewardScaling, RewardSum, TransformedEnv
from torchrl.modules import MLP, ProbabilisticActor
from torchrl.objectives import SACLoss, SoftUpdate, ValueEstimators
from tqdm import tqdm

from rnnkeys import CellName, get_env_transforms_from_module, recurrent_module, runs
from rnnkeys.environments import EnvError, evaluate_policy, make_gym_env
from rnnkeys.objectives import recurrent_loss
from rnnkeys.spaces import Choices, ImageEncoder, Layers, action_distribution

logging.getLogger("torchrl").setLevel(logging.WARNING)  # without a line for each buffer


@dataclass
class Args:
    """Arguments of a run; each field is an option of the command line."""

    env: str = "Pendulum-v1"  # ID of Gymnasium, MODULE:ID, MODULE:CLASS, 'ID(name=value)'
    wrappers: tuple[str, ...] = ()  # MODULE:CLASS, or 'MODULE:CLASS(name=value)'
    observation: Literal["auto", "all", "pixels"] = "auto"  # auto: without known velocities
    hide: tuple[int, ...] = ()  # entries of the observation that the policy cannot see
    magnify: float = 1.0  # factor on observations
    frame_stack: int = 1  # last observations that the policy sees at once
    reward_scale: float = 0.1  # factor on rewards: keeps values small

    cell: CellName = "gru"
    hidden_size: int = 64  # size of each recurrent layer
    net_arch: tuple[int, ...] = (64,)  # linear layers between recurrent layer and output

    frames: int = 24_000  # environment steps of the whole run, more than warmup
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
    resume: str | None = None  # checkpoint.pt of the run to continue
    overwrite: bool = False  # delete the run in the output folder and start again
    logger: Literal["csv", "tensorboard", "wandb"] | None = None  # one of TorchRL's, in addition
    eval_every: int = 2_000  # frames between two evaluations
    eval_episodes: int = 20


# Velocities in the observations of some environments, and the scales of the other entries.
VELOCITIES: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "Pendulum-v1": ((2,), (0.2, 0.2)),
    "MountainCarContinuous-v0": ((1,), (0.6,)),
}
FIXED = ("env", "observation", "hide", "cell", "hidden_size", "net_arch")  # --resume keeps them
EVAL_SEED = 100_000_000  # of the episodes that choose the best weights
TEST_SEED = 200_000_000  # of the episodes that neither training nor choice has used


def read_args(argv: Sequence[str] | None) -> tuple[Args, dict[str, Any]]:
    """Return the arguments and, after --resume, the checkpoint with their defaults."""
    args, checkpoint = runs.read_args(Args, argv, fixed=FIXED, description=__doc__)
    shortest = args.num_envs * args.slice_len  # frames of one sequence of each environment
    limits = {name: (0, 1) for name in ("gamma", "lmbda", "tau")}
    limits |= {name: (shortest, math.inf) for name in ("warmup", "capacity")}
    limits["frames"] = (max(shortest, args.warmup) + 1, math.inf)
    limits |= {"burn_in": (0, args.slice_len - 1), "alpha": (1e-6, math.inf)}
    runs.check_ranges(args, **limits)
    if args.batch_frames % args.num_envs:
        raise runs.RunError("--batch-frames: expected a multiple of --num-envs")
    return args, checkpoint


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
    if kind in (Choices, CompositeDistribution):
        raise runs.RunError(f"{args.env} has discrete actions, or several: use recurrent_ppo.py")
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


class Learner:
    """The networks, and a gradient step on them."""

    def __init__(self, args: Args, env: TransformedEnv) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.actor, critic = make_actor(args, env), make_critic(args, env)
        self.loss: Any = SACLoss(
            self.actor,
            critic,
            num_qvalue_nets=2,
            alpha_init=args.alpha,
            action_spec=env.action_spec_unbatched,
            loss_function="l2",
        )
        self.loss.loss_mask_key = "learned"  # False in the burn-in
        several = args.gamma * args.lmbda > 0  # steps in a target
        kind = ValueEstimators.TDLambda if several else ValueEstimators.TD0
        options = {"lmbda": args.lmbda} if several else {}
        self.loss.make_value_estimator(kind, gamma=args.gamma, **options)
        recurrent_loss(self.loss)
        self.target = SoftUpdate(self.loss, tau=args.tau)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), eps=1e-5, fused=True)
        # Without the critics' states, they start a sequence from zeros; the actor from its own.
        states = {key[-1] for key in critic.out_keys if isinstance(key, tuple)}
        self.keys = [key for key in ("is_init", *self.loss.in_keys) if key not in states]

    def learn(self, batch: TensorDictBase, progress: float) -> float:
        """Take one gradient step on sequences ``[slices, slice_len]``; return the critics' loss."""
        steps = torch.arange(batch.shape[-1], device=batch.device)
        batch["learned"] = (steps >= self.args.burn_in).expand(batch.shape)
        terms = self.loss(batch)
        # Each term reaches its own weights only: one backward pass serves all three.
        loss = terms["loss_actor"] + terms["loss_qvalue"] + terms["loss_alpha"]
        if not loss.isfinite():
            bad = [key for key, value in terms.items() if not value.isfinite().all()]
            raise runs.RunError(f"not finite after {progress:.0%} of frames: {', '.join(bad)}")
        self.optimizer.param_groups[0]["lr"] = self.args.learning_rate * max(0.0, 1 - progress)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.loss.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.target.step()
        return terms["loss_qvalue"].item()


def train(args: Args, checkpoint: dict[str, Any]) -> None:
    """Collect and learn until the run is finished or stopped, and test the best weights."""
    torch.set_num_threads(args.threads)
    evaluation_env = make_env(args, args.eval_episodes)
    learner = Learner(args, evaluation_env)
    actor = learner.actor
    evaluation_env.append_transform(get_env_transforms_from_module(actor))
    modules = {"loss": learner.loss, "optimizer": learner.optimizer}
    run = runs.Run(args, checkpoint, f"{args.env}, {args.cell}, seed {args.seed}", **modules)
    env = make_env(args, args.num_envs)
    env.append_transform(RewardSum())
    env.append_transform(RewardScaling(loc=0.0, scale=args.reward_scale))
    env.append_transform(get_env_transforms_from_module(actor))
    env.set_seed(args.seed + run.frames)  # a resumed run plays other episodes
    collector = Collector(env, actor, frames_per_batch=args.batch_frames)
    # Sequences start anywhere in what an environment played, and cross the ends of episodes.
    replay = TensorDictReplayBuffer(
        storage=LazyTensorStorage(args.capacity, ndim=2),
        sampler=SliceSampler(slice_len=args.slice_len, traj_key="stream", cache_values=True),
        batch_size=args.slices * args.slice_len,
    )
    streams = torch.arange(args.num_envs).unsqueeze(-1)

    def evaluate(seed: int) -> Tensor:
        return evaluate_policy(evaluation_env, actor, seed + args.seed)

    warm = run.frames + args.warmup
    bar = tqdm(total=args.frames, initial=run.frames, unit=" frames")
    with bar, runs.catch_signals() as stop:
        while run.frames < args.frames and not stop.is_set():
            data: Any = collector.next()
            run.count(data)
            replay.extend(data.select(*learner.keys).set("stream", streams.expand(data.shape)))
            for _ in range(args.updates if run.frames >= warm else 0):
                batch = replay.sample().reshape(-1, args.slice_len).to(args.device)
                run.losses.append(learner.learn(batch, run.frames / args.frames))
            if run.frames % args.eval_every < args.batch_frames or run.frames >= args.frames:
                alpha = learner.loss.log_alpha.exp().item()
                run.record(evaluate(EVAL_SEED), actor, alpha=alpha)
                run.save()
            bar.set_postfix(run.summarize(), refresh=False)
            bar.update(data.numel())
    collector.shutdown()
    run.save()
    if stop.is_set() or not run.rows:
        print(f"Stopped after {run.frames} frames. Continue: --resume {args.output}/checkpoint.pt")
        return
    actor.load_state_dict(run.best["policy"])
    print(run.finish(evaluate(TEST_SEED)))


def main(argv: Sequence[str] | None = None) -> None:
    try:
        train(*read_args(argv))
    except (runs.RunError, EnvError) as error:
        print(f"recurrent_sac.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
