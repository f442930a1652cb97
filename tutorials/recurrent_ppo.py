"""Recurrent PPO in one file: copy it, change it, train on any environment of Gymnasium.

    pip install "rnnkeys[tutorials]"
    python recurrent_ppo.py                                          # CartPole without velocities
    python recurrent_ppo.py --cell feed_forward                      # the feed-forward baseline
    python recurrent_ppo.py --env FrozenLake-v1
    python recurrent_ppo.py --env 'LunarLander-v3(continuous=True)' --hide 2 3 5
    python recurrent_ppo.py --env Acrobot-v1 --observation pixels
    python recurrent_ppo.py --resume runs/recurrent_ppo/checkpoint.pt --frames 200000

Collector, GAE and loss are TorchRL's; recurrent layers, their wiring into the loss and minibatches
of whole sequences are rnnkeys'. A run writes learning_curve.csv, learning_curve.png, checkpoint.pt
and result.json, which has the returns of episodes never seen before, to its --output folder.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
import tyro
from gymnasium import Space, spaces
from tensordict import TensorDictBase
from tensordict.nn import AddStateIndependentNormalScale as ConstantScale
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical, Independent
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type
from torchrl.modules import ConvNet, IndependentNormal, ProbabilisticActor, TanhNormal, gSDEModule
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from torchrl.record.loggers import get_logger
from tqdm import tqdm

from rnnkeys import get_env_transforms_from_module, recurrent_module
from rnnkeys.environments import EnvError, make_gym_env, make_simple_env
from rnnkeys.objectives import SequenceMinibatches, recurrent_loss


@dataclass
class Args:
    """Arguments of a run; each field is an option of the command line."""

    env: str = "CartPole-v1"  # ID of Gymnasium, MODULE:ID, or 'ID(name=value)'
    wrappers: tuple[str, ...] = ()  # MODULE:CLASS, or 'MODULE:CLASS(name=value)'
    observation: Literal["positions", "all", "pixels"] | None = None  # default: see POSITIONS
    hide: tuple[int, ...] = ()  # entries of the observation that the policy cannot see
    magnify: float = 1.0  # factor on observations
    frame_stack: int = 1  # last observations that the policy sees at once
    normalize_observation: bool = False  # to mean 0 and deviation 1 over the run
    normalize_reward: bool = False  # divide rewards by the deviation of discounted returns
    reward_scale: float = 0.1  # factor on rewards: keeps values small

    cell: Literal["lstm", "gru", "lstm_ln", "feed_forward"] = "lstm"
    critic: Literal["recurrent", "shared", "feed_forward"] = "recurrent"  # shared: actor's layer
    hidden_size: int = 64  # size of each recurrent layer
    num_layers: int = 1  # recurrent layers on top of each other
    net_arch: tuple[int, ...] = (64,)  # linear layers between recurrent layer and output
    activation: Literal["tanh", "relu", "gelu"] = "tanh"
    ortho_init: bool = False  # orthogonal weights and zero biases in linear layers
    squash: bool = True  # tanh to the action's bounds; otherwise a Gaussian that is clipped
    log_std_init: float = 0.0  # logarithm of the Gaussian's deviation at the start
    noise_correlation: float = 0.0  # of a continuous action's noise, from one step to the next
    sde: bool = False  # state-dependent exploration (gSDE) of continuous actions
    sde_sample_freq: int = 0  # steps between two draws of its matrix; 0: one draw per episode

    frames: int = 100_000  # environment steps of the whole run
    num_envs: int = 8  # environments that are stepped together
    vectorization: Literal["sync", "async"] = "sync"  # in this process, or in one process each
    steps: int = 64  # steps of each environment in a rollout
    seq_len: int = 64  # steps in a sequence of a minibatch
    minibatch_steps: int = 256  # steps in a minibatch of whole sequences
    epochs: int = 10  # passes over a rollout
    refresh: bool = False  # recompute stored states between epochs
    gamma: float = 0.99  # discount
    lmbda: float = 0.95  # lambda of GAE
    learning_rate: float = 1e-3
    lr_schedule: Literal["linear", "constant"] = "linear"  # linear: to 0 at the end of the run
    clip: float = 0.2  # range of the ratio
    clip_schedule: Literal["linear", "constant"] = "linear"
    clip_value: float | None = None  # range of a value's change
    target_kl: float | None = None  # end a rollout's updates at 1.5 times this divergence
    entropy: float = 0.0  # weight of the entropy bonus
    critic_coeff: float = 0.5  # weight of the critic's loss
    max_grad_norm: float = 0.5

    seed: int = 0
    device: str = "cpu"
    threads: int = 1  # CPU threads of torch: networks this small are fastest with one
    output: str = "runs/recurrent_ppo"
    resume: str | None = None  # checkpoint.pt of a run to continue
    logger: Literal["csv", "tensorboard", "wandb"] | None = None  # one of TorchRL's, in addition
    eval_every: int = 10_000  # frames between two evaluations
    eval_episodes: int = 32


# Velocities of some environments, and what their positions are divided by.
POSITIONS: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "CartPole-v1": ((1, 3), (2.4, 0.2095)),
    "Pendulum-v1": ((2,), (1.0, 1.0)),
    "MountainCar-v0": ((1,), (0.6,)),
    "MountainCarContinuous-v0": ((1,), (0.6,)),
    "Acrobot-v1": ((4, 5), (1.0, 1.0, 1.0, 1.0)),
}
STATES = {"lstm": "hc", "lstm_ln": "hc", "gru": "h", "feed_forward": ""}
LOWEST = {"seed": 0, "sde_sample_freq": 0, "log_std_init": -math.inf}
HIGHEST = {"gamma": 1, "lmbda": 1, "noise_correlation": 1}
EVALUATION_SEED, TEST_SEED, TEST_EPISODES = 100_000_000, 200_000_000, 20


class UsageError(Exception):
    """A bad argument, or a run that cannot continue; the message is one line."""


def check_args(args: Args) -> Args:
    """Raise UsageError at a bad value; resolve the default of --observation."""
    for name, value in asdict(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = LOWEST.get(name, int(isinstance(value, int))), HIGHEST.get(name, math.inf)
            if not low <= value <= high:
                raise UsageError(f"--{name.replace('_', '-')} is {value}: expected {low} to {high}")
    if args.minibatch_steps % args.seq_len:
        raise UsageError(
            f"--minibatch-steps is {args.minibatch_steps}: expected a multiple of --seq-len, "
            f"{args.seq_len}, because a sequence stays whole"
        )
    if args.observation is None:
        args.observation = "all" if args.hide or args.env not in POSITIONS else "positions"
    if args.observation == "positions" and (args.hide or args.env not in POSITIONS):
        raise UsageError(
            f"--observation positions needs {args.env} in POSITIONS, and no --hide: use "
            "--observation all, and --hide INDEX ... for the entries to hide"
        )
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device is {args.device}: {str(error).splitlines()[0]}") from error
    return args


def make_env(args: Args, num_envs: int) -> TransformedEnv:
    hide, scales = args.hide, (1.0,)
    if args.observation == "positions":
        hide, scales = POSITIONS[args.env]
    return make_gym_env(
        args.env,
        num_envs,
        wrappers=args.wrappers,
        pixels=args.observation == "pixels",
        hide=hide,
        scale=[args.magnify / scale for scale in scales],
        frame_stack=args.frame_stack,
        vectorization=args.vectorization,
        device=args.device,
    )


class Moments(nn.Module):
    """Running mean and variance of the values seen so far, by which other values are normalised."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        values = values.reshape(-1, *self.mean.shape)
        share = len(values) / (self.count + len(values))
        delta = values.mean(0) - self.mean
        self.var.lerp_(values.var(0, correction=0) + (1 - share) * delta**2, share)
        self.mean.add_(share * delta)
        self.count.add_(len(values))

    def forward(self, values: Tensor) -> Tensor:
        return ((values - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)


class StateDependentScale(gSDEModule):
    """Deviation of state-dependent exploration, from features that it does not train."""

    def forward(self, mean: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale, _, _ = super().forward(mean, features.detach(), None)
        return loc, scale


class LastingNoise(TensorDictModuleBase):
    r"""While collecting, draw a Gaussian's actions again, with noise that lasts for several steps.

    With ``--noise-correlation`` c the noise is :math:`x_t = c x_{t-1} + \sqrt{1 - c^2} \xi_t` times
    the scale (Hollenstein et al., 2024, arXiv:2312.11091). With ``--sde`` x is a matrix, with c = 1
    between two draws, times the features (Raffin et al., 2021, arXiv:2005.05719). Each single
    action is distributed as the actor says, and has the log-probability that PPO needs.
    """

    def __init__(self, args: Args, actor: Any, sde: StateDependentScale | None) -> None:
        super().__init__()
        self.in_keys = ["loc", "scale", "is_init"]
        self.out_keys = ["action", "action_log_prob"]
        self.args, self.make_distribution = args, actor.build_dist_from_params
        self.find_sigma = None if sde is None else lambda: sde.sigma
        self.noise: Tensor | None = None
        self.calls = 0

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if exploration_type() is not ExplorationType.RANDOM:
            return tensordict
        loc, scale, c = tensordict["loc"], tensordict["scale"], self.args.noise_correlation
        size = loc.shape
        if self.find_sigma is not None:
            size = (*loc.shape, tensordict["features"].shape[-1])
            c = float(not self.args.sde_sample_freq or self.calls % self.args.sde_sample_freq > 0)
        fresh = torch.randn(size, device=loc.device)
        start = tensordict["is_init"].reshape(-1, *[1] * (fresh.ndim - 1))
        kept = fresh if self.noise is None else c * self.noise + math.sqrt(1 - c**2) * fresh
        self.noise, self.calls = torch.where(start, fresh, kept), self.calls + 1
        if self.find_sigma is None:
            action = loc + scale * self.noise
        else:
            weights = self.find_sigma() * self.noise
            action = loc + (weights @ tensordict["features"].unsqueeze(-1)).squeeze(-1)
        distribution = self.make_distribution(tensordict)
        for squash in getattr(distribution, "transforms", ())[:1]:
            action = squash(action)
        tensordict["action"] = action
        tensordict["action_log_prob"] = distribution.log_prob(action)
        return tensordict


class Agent(nn.Module):
    """The networks: ``actor``, ``critic``, and ``collector``, which has every recurrent state.

    The loss runs ``critic_in_loss`` after the actor: where the critic shares the actor's recurrent
    layer, that is the critic's head alone.
    """

    def __init__(self, args: Args, env: TransformedEnv) -> None:
        super().__init__()
        self.args, self.size = args, env.observation_spec["observation"].shape[1:]
        self.normalizer = Moments(self.size) if args.normalize_observation else None
        body, critic_body = self._make_body("actor", args.cell), []
        self.actor, noise = self._make_actor(body, env.action_spec)
        if args.critic != "shared":
            cell = args.cell if args.critic == "recurrent" else "feed_forward"
            critic_body = self._make_body("critic", cell)
        head = self._make_head("critic" if critic_body else "actor", ["state_value"], 1, gain=1.0)
        self.critic = TensorDictSequential(*(critic_body or body), head)
        self.critic_in_loss = self.critic if critic_body else TensorDictSequential(head)
        self.collector = TensorDictSequential(self.actor, *noise, *critic_body)
        self.to(args.device)

    def _make_body(self, name: str, cell: str) -> list[Any]:
        """Make what turns observations into the entry ``name``: an encoder, a recurrent layer."""
        size, encoder = self.size[0], [] if self.normalizer is None else [self.normalizer]
        if len(self.size) == 3:  # images; see Mnih et al., 2015
            encoder = [ConvNet(size, None, [32, 64, 64], [8, 4, 3], [4, 2, 1], activation_class=nn.ReLU)]
            features = encoder[0](torch.zeros(self.size)).shape[-1]
            size, encoder = 512, [ToUnit(), *encoder, self._linear(features, 512), nn.ReLU()]
        states = [f"{name}_{state}" for state in STATES[cell]]
        recurrent = recurrent_module(
            cell,
            size,
            self.args.hidden_size,
            self.args.num_layers,
            in_keys=[f"{name}_input" if encoder else "observation", *states],
            out_keys=[name, *(("next", state) for state in states)],
        )
        first = TensorDictModule(nn.Sequential(*encoder), ["observation"], [f"{name}_input"])
        return [first, recurrent] if encoder else [recurrent]

    def _make_head(self, in_key: str, out_keys: list[str], outputs: int, *more: nn.Module, gain: float = 0.01) -> Any:
        """Make linear layers from a recurrent layer's output."""
        activation = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}[self.args.activation]
        sizes = [self.args.hidden_size, *self.args.net_arch]
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        layers = [layer for pair in pairs for layer in (self._linear(*pair), activation())]
        ...

    def _make_actor(self, body: list[Any], spec: Any) -> tuple[Any, list[LastingNoise]]:
        ...


class Trainer:
    """A run: collect a rollout, learn from it, evaluate now and then.

    Args:
        args: arguments of the run.
        checkpoint: what :meth:`save` wrote, to continue from.
    """

    def __init__(self, args: Args, checkpoint: dict[str, Any] | None = None) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.evaluation_env = make_env(args, args.eval_episodes)
        self.agent = Agent(args, self.evaluation_env)
        self.advantage = recurrent_loss(
            GAE(
                gamma=args.gamma,
                lmbda=args.lmbda,
                value_network=self.agent.critic,
                deactivate_vmap=True,
            )
        )
        self.loss = recurrent_loss(
            ClipPPOLoss(
                self.agent.actor,
                self.agent.critic_in_loss,
                clip_epsilon=args.clip,
                clip_value=args.clip_value,
                entropy_bonus=args.entropy > 0,
                entropy_coeff=args.entropy,
                critic_coeff=args.critic_coeff,
                loss_critic_type="l2",
                log_explained_variance=False,
            )
        )
        self.minibatches = SequenceMinibatches(
            args.minibatch_steps,
            args.seq_len,
            epochs=args.epochs,
            networks=self.agent.collector,
            refresh=args.refresh,
            normalize_advantage=True,
        )
        self.optimizer = torch.optim.Adam(
            self.loss.parameters(), args.learning_rate, eps=1e-5, fused=True
        )
        self.return_moments = Moments()
        self.frames = self.episodes = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []
        self.returns: deque[float] = deque(maxlen=100)  # of the last episodes
        self.losses: deque[float] = deque(maxlen=100)
        self.running = torch.zeros(2, args.num_envs)  # returns so far, plain and discounted
        if checkpoint is not None:
            self.load(checkpoint)

    def run(self, stopped: Callable[[], bool]) -> None:
        """Collect and learn until ``--frames`` are collected or ``stopped()``."""
        args = self.args
        env = make_env(args, args.num_envs)
        env.append_transform(get_env_transforms_from_module(self.agent.collector))
        env.set_seed(args.seed + self.frames)  # a resumed run plays other episodes
        if self.agent.normalizer is not None and not self.frames:
            random = env.rollout(args.steps, break_when_any_done=False)
            self.agent.normalizer.update(random["observation"])
        size = args.num_envs * args.steps
        collector = Collector(env, self.agent.collector, frames_per_batch=size, total_frames=-1)
        quiet = 0.1 if sys.stderr.isatty() else 10.0
        with tqdm(total=args.frames, initial=min(self.frames, args.frames), unit=" frames", mininterval=quiet) as bar:
            while self.frames < args.frames and not stopped():
                start = time.perf_counter()
                rollout = collector.next()
                self.count_returns(rollout)
                self.learn(rollout)
                self.frames += size
                self.seconds += time.perf_counter() - start
                if self.frames // args.eval_every > (self.frames - size) // args.eval_every:
                    self.record(self.evaluate(...))
                    self.save()
                ...
        collector.shutdown()
