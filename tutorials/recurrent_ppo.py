"""Recurrent PPO in one file: copy it, change it, train on any environment of Gymnasium.

    python recurrent_ppo.py                                          # CartPole without velocities
    python recurrent_ppo.py --cell feed_forward                      # the feed-forward baseline
    python recurrent_ppo.py --env 'LunarLander-v3(continuous=True)' --hide 2 3 5
    python recurrent_ppo.py --resume runs/recurrent_ppo/checkpoint.pt --frames 200000

It needs rnnkeys[tutorials]. Collector, GAE and loss are TorchRL's; recurrent layers, their wiring
into the loss and minibatches of whole sequences are rnnkeys'. A run writes learning_curve.csv,
learning_curve.png, checkpoint.pt and result.json, the returns of new episodes, to --output.
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
from tensordict.nn import AddStateIndependentNormalScale, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from torchrl.record.loggers import get_logger
from tqdm import tqdm

from rnnkeys import CellName, get_env_transforms_from_module, recurrent_module
from rnnkeys.environments import EnvError, evaluate_policy, make_gym_env
from rnnkeys.exploration import CorrelatedNoise, StateDependentNoise, StateDependentScale
from rnnkeys.objectives import SequenceMinibatches, recurrent_loss
from rnnkeys.spaces import Choices, ImageEncoder, Layers, RunningNorm, action_distribution


@dataclass
class Args:
    """Arguments of a run; each field is an option of the command line."""

    env: str = "CartPole-v1"  # ID of Gymnasium, MODULE:ID, or 'ID(name=value)'
    wrappers: tuple[str, ...] = ()  # MODULE:CLASS, or 'MODULE:CLASS(name=value)'
    observation: Literal["auto", "all", "pixels"] = "auto"  # auto: without known velocities
    hide: tuple[int, ...] = ()  # entries of the observation that the policy cannot see
    magnify: float = 1.0  # factor on observations
    frame_stack: int = 1  # last observations that the policy sees at once
    normalize_observation: bool = False  # to mean 0 and deviation 1 over the run
    normalize_reward: bool = False  # divide rewards by the deviation of discounted returns
    reward_scale: float = 0.1  # factor on rewards: keeps values small
    cell: CellName = "lstm"
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


# Velocities in the observations of some environments, and the scales of the other entries.
VELOCITIES: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "CartPole-v1": ((1, 3), (2.4, 0.2095)),
    "Pendulum-v1": ((2,), (1.0, 1.0)),
    "MountainCarContinuous-v0": ((1,), (0.6,)),
}
NETWORK_ARGS = ("env", "observation", "cell", "critic", "hidden_size", "num_layers", "net_arch")
LIMITS = {"seed": (0, math.inf), "sde_sample_freq": (0, math.inf), "log_std_init": (-9, 9)}
LIMITS |= {"gamma": (0, 1), "lmbda": (0, 1), "noise_correlation": (0, 1)}
EVAL_SEED, TEST_SEED = 100_000_000, 200_000_000
FILES = ("checkpoint.pt", "learning_curve.csv", "learning_curve.png", "result.json")
MODULES = ("agent", "optimizer", "return_norm")
VALUES = ("frames", "episodes", "seconds", "rows")


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
    for name, value in asdict(args).items():
        low, high = LIMITS.get(name, (int(isinstance(value, int)), math.inf))
        if type(value) in (int, float) and not low <= value <= high:
            raise UsageError(f"--{name} is {value}: expected {low} to {high}")
    steps, length = args.minibatch_steps, args.seq_len
    if steps % length:
        raise UsageError(
            f"--minibatch_steps is {steps}: expected a multiple of --seq_len, {length}"
        )
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
        vectorization=args.vectorization,
        device=args.device,
    )


class Agent(nn.Module):
    """The networks: ``actor``, ``critic``, and ``collector``, which has every recurrent state.

    The loss runs ``critic_in_loss`` after the actor: where the critic shares the actor's recurrent
    layer, that is the critic's head alone.
    """

    def __init__(self, args: Args, env: TransformedEnv) -> None:
        super().__init__()
        self.args, self.shape = args, env.observation_spec["observation"].shape[1:]
        self.masks = [key for key in env.observation_spec.keys() if key == "action_mask"]
        self.norm = RunningNorm(self.shape) if args.normalize_observation else None
        body, critic_body = self._make_body("actor", args.cell), []
        self.actor, noise = self._make_actor(body, env.action_spec)
        if args.critic != "shared":
            cell = args.cell if args.critic == "recurrent" else "feed_forward"
            critic_body = self._make_body("critic", cell)
        layers = nn.Sequential(*self._make_layers(args.hidden_size, *args.net_arch, 1, gain=1.0))
        head: Any = Layers(layers, ["critic" if critic_body else "actor"], ["state_value"])
        self.critic = TensorDictSequential(*(critic_body or body), head)
        self.critic_in_loss = self.critic if critic_body else TensorDictSequential(head)
        self.collector = TensorDictSequential(self.actor, *noise, *critic_body)
        self.to(args.device)

    def _make_layers(self, *sizes: int, gain: float) -> list[Any]:
        """Make linear layers with activations between them; ``gain`` is the last layer's."""
        activation = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}[self.args.activation]
        linear = [nn.Linear(*pair) for pair in zip(sizes[:-1], sizes[1:], strict=True)]
        if self.args.ortho_init:
            for layer in linear:
                nn.init.orthogonal_(layer.weight, gain if layer is linear[-1] else math.sqrt(2))
                nn.init.zeros_(layer.bias)
        return [module for layer in linear for module in (layer, activation())][:-1]

    def _make_body(self, name: str, cell: str) -> list[Any]:
        """Make what turns observations into the entry ``name``: an encoder, a recurrent layer."""
        size, encoder = self.shape[0], [] if self.norm is None else [self.norm]
        if len(self.shape) == 3:
            encoder = [ImageEncoder(self.shape, self.args.ortho_init)]
            size = encoder[0].num_features
        recurrent = recurrent_module(
            cell,
            size,
            self.args.hidden_size,
            self.args.num_layers,
            in_key=f"{name}_input" if encoder else "observation",
            out_key=name,
            state_key=f"{name}_state",
        )
        first = [Layers(one, ["observation"], [f"{name}_input"]) for one in encoder]
        return [*first, recurrent]

    def _make_actor(self, body: list[Any], spec: Any) -> tuple[Any, list[Any]]:
        """Make the distribution of actions that the spec asks for, and lasting noise, if any."""
        args, scale = self.args, None
        kind, options, outputs = action_distribution(spec, squash=args.squash)
        layers = self._make_layers(args.hidden_size, *args.net_arch, outputs, gain=0.01)
        keys: Any = ["logits"] if kind is Choices else ["loc", "scale"]
        if kind is Choices and (args.sde or args.noise_correlation):
            raise UsageError(f"--sde, --noise-correlation: the actions of {args.env} are discrete")
        if args.sde:
            scale = StateDependentScale(layers[-1].in_features, outputs, args.log_std_init)
            heads = [
                Layers(nn.Sequential(*layers[:-1]), ["actor"], ["features"]),
                Layers(layers[-1], ["features"], ["mean"]),
                Layers(scale, ["mean", "features"], keys),
            ]
        else:
            if kind is not Choices:
                layers.append(AddStateIndependentNormalScale(outputs, init_value=args.log_std_init))
            heads = [Layers(nn.Sequential(*layers), ["actor"], keys)]
        actor = ProbabilisticActor(
            TensorDictSequential(*body, *heads),
            in_keys=[*keys, *self.masks],
            distribution_class=kind,
            distribution_kwargs=options,
            return_log_prob=True,
        )
        if scale is not None:
            return actor, [StateDependentNoise(actor, scale, args.sde_sample_freq or None)]
        return actor, [CorrelatedNoise(actor, c)] if (c := args.noise_correlation) else []


class Trainer:
    """A run: collect rollouts, learn from them, evaluate in regular intervals."""

    def __init__(self, args: Args, checkpoint: dict[str, Any] | None = None) -> None:
        torch.manual_seed(args.seed)
        self.args, self.folder = args, Path(args.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [self.folder / name for name in (FILES[-1:] if checkpoint else FILES)]:
            if path.exists():  # of an earlier run
                path.replace(self.folder / f"previous_{path.name}")
        self.evaluation_env = make_env(args, args.eval_episodes)
        self.agent = agent = Agent(args, self.evaluation_env)
        self.evaluation_env.append_transform(get_env_transforms_from_module(agent.actor))
        self.advantage: Any = GAE(gamma=args.gamma, lmbda=args.lmbda, value_network=agent.critic)
        self.loss: Any = ClipPPOLoss(
            agent.actor,
            agent.critic_in_loss,
            clip_epsilon=args.clip,
            clip_value=args.clip_value,
            entropy_bonus=args.entropy > 0,
            entropy_coeff=args.entropy,
            critic_coeff=args.critic_coeff,
            loss_critic_type="l2",
            log_explained_variance=False,
        )
        recurrent_loss(self.advantage)
        recurrent_loss(self.loss)
        self.minibatches = SequenceMinibatches(
            args.minibatch_steps,
            args.seq_len,
            epochs=args.epochs,
            networks=agent.collector,
            refresh=args.refresh,
            normalize_advantage=True,
        )
        self.optimizer = torch.optim.Adam(self.loss.parameters(), eps=1e-5, fused=True)
        self.return_norm = RunningNorm()
        self.frames = self.episodes = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []  # of the learning curve
        self.returns: deque[float] = deque(maxlen=100)  # of the last episodes
        self.losses: deque[float] = deque(maxlen=100)
        self.unfinished = torch.zeros(2, args.num_envs)  # sum and discounted sum of their rewards
        self.logger = get_logger(args.logger, str(self.folder), "logger")
        if checkpoint is not None:
            for name in MODULES:
                getattr(self, name).load_state_dict(checkpoint[name])
            for name in VALUES:
                setattr(self, name, checkpoint[name])
            torch.set_rng_state(checkpoint["rng"])

    def run(self, stops: list[int]) -> None:
        """Collect and learn until ``--frames`` are collected, or until ``stops`` has a signal."""
        args, size = self.args, self.args.num_envs * self.args.steps
        env = make_env(args, args.num_envs)
        env.append_transform(get_env_transforms_from_module(self.agent.collector))
        env.set_seed(args.seed + self.frames)  # a resumed run plays other episodes
        collector = Collector(env, self.agent.collector, frames_per_batch=size)
        interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file stays short
        bar = tqdm(total=args.frames, initial=self.frames, unit=" frames", mininterval=interval)
        while self.frames < args.frames and not stops:
            start = time.perf_counter()
            rollout: Any = collector.next()
            self.scale_rewards(rollout)
            self.learn(rollout)
            self.frames += size
            self.seconds += time.perf_counter() - start
            if self.frames % args.eval_every < size or self.frames >= args.frames:
                self.evaluate()
            shown = {"return": fmean(self.returns or [math.nan]), "loss": fmean(self.losses)}
            bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
            bar.update(size)
        bar.close()
        collector.shutdown()
        self.save()

    def scale_rewards(self, rollout: TensorDictBase) -> None:
        """Note the returns of episodes that end in a rollout ``[num_envs, T]``; scale rewards."""
        reward, done = (rollout["next", key].squeeze(-1).cpu() for key in ("reward", "done"))
        discounted = []
        for r_t, done_t in zip(reward.unbind(-1), done.unbind(-1), strict=True):
            self.unfinished = self.unfinished * torch.tensor([[1.0], [self.args.gamma]]) + r_t
            discounted.append(self.unfinished[1])
            self.returns.extend(self.unfinished[0, done_t].tolist())
            self.unfinished = self.unfinished.masked_fill(done_t, 0)
        self.episodes += int(done.sum())
        reward = rollout["next", "reward"] * self.args.reward_scale
        if self.args.normalize_reward:
            self.return_norm.update(torch.stack(discounted))
            reward = (reward / (self.return_norm.var.item() + 1e-8) ** 0.5).clamp(-10, 10)
        rollout["next", "reward"] = reward

    def learn(self, rollout: TensorDictBase) -> None:
        """Take the gradient steps of all epochs on a rollout ``[num_envs, T]``."""
        args, left = self.args, 1 - self.frames / self.args.frames
        rate = args.learning_rate * (left if args.lr_schedule == "linear" else 1)
        self.optimizer.param_groups[0]["lr"] = rate
        self.loss.clip_epsilon.fill_(args.clip * (left if args.clip_schedule == "linear" else 1))
        with torch.no_grad():
            self.advantage(rollout)
        keys = [key for key in self.loss.in_keys if isinstance(key, str)]
        keys += ["is_init", "advantage", "value_target", "state_value"]
        keys += [("next", "reward"), ("next", "terminated")]
        for batch in self.minibatches(rollout.select(*keys, strict=False)):
            terms = self.loss(batch)
            if args.target_kl is not None and terms["kl_approx"] > 1.5 * args.target_kl:
                break
            loss: Any = sum(value for key, value in terms.items() if key.startswith("loss_"))
            if not loss.isfinite():
                bad = [key for key, value in terms.items() if not value.isfinite().all()]
                raise UsageError(f"not finite at frame {self.frames}: {', '.join(bad)}")
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.loss.parameters(), args.max_grad_norm)
            self.optimizer.step()
            self.losses.append(loss.item())
        if self.agent.norm is not None:
            self.agent.norm.update(rollout["observation"])

    def evaluate(self) -> None:
        """Play episodes without exploration, add a row to the learning curve, and save."""
        returns = evaluate_policy(self.evaluation_env, self.agent.actor, EVAL_SEED + self.args.seed)
        row = {
            "frames": self.frames,
            "seconds": self.seconds,
            "episodes": self.episodes,
            "training_return": fmean(self.returns or [math.nan]),
            "loss": fmean(self.losses or [math.nan]),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
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
        state |= {"args": asdict(self.args), "rng": torch.get_rng_state()}
        torch.save(state, self.folder / "checkpoint.part")
        (self.folder / "checkpoint.part").replace(self.folder / "checkpoint.pt")

    def finish(self) -> None:
        """Test the last weights on episodes never seen before, and write the result."""
        returns = evaluate_policy(self.evaluation_env, self.agent.actor, TEST_SEED + self.args.seed)
        best = max(self.rows, key=lambda row: (row["evaluation"], row["frames"]))
        result = {
            "test_return": returns.mean().item(),
            "test_returns": returns.tolist(),
            "best_evaluation": best["evaluation"],
            "best_frames": best["frames"],
            "frames": self.frames,
            "seconds": round(self.seconds, 1),
            "args": asdict(self.args),
        }
        (self.folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"The last weights return {returns.mean():.1f} on average in new episodes.")

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
        print(f"recurrent_ppo.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
