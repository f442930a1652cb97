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

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from tqdm import tqdm

from rnnkeys import CellName, get_env_transforms_from_module, recurrent_module, runs
from rnnkeys.environments import EnvError, evaluate_policy, make_gym_env
from rnnkeys.exploration import CorrelatedNoise, StateDependentNoise, StateDependentScale
from rnnkeys.objectives import SequenceMinibatches, recurrent_loss
from rnnkeys.spaces import (
    ActionParameters,
    ImageEncoder,
    Layers,
    RunningNorm,
    action_distribution,
    find_action_keys,
)

logging.getLogger("torchrl").setLevel(logging.WARNING)  # without a line for each buffer


@dataclass
class Args:
    """Arguments of a run; each field is an option of the command line."""

    env: str = "CartPole-v1"  # ID of Gymnasium, MODULE:ID, MODULE:CLASS, 'ID(name=value)'
    wrappers: tuple[str, ...] = ()  # MODULE:CLASS, or 'MODULE:CLASS(name=value)'
    observation: Literal["auto", "all", "pixels"] = "auto"  # auto: without known velocities
    hide: tuple[int, ...] = ()  # entries of the observation that the policy cannot see
    magnify: float = 1.0  # factor on observations
    frame_stack: int = 1  # last observations that the policy sees at once
    normalize_observation: bool = False  # to mean 0 and deviation 1 over the run
    normalize_reward: bool = False  # divide rewards by the deviation of discounted returns
    reward_scale: float = 0.1  # factor on rewards: keeps values small
    cell: CellName = "lstm"
    cell_options: dict[str, float | str] = field(default_factory=dict)  # such as: block plain
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
    normalize_advantage: bool = True  # over each minibatch, to mean 0 and deviation 1
    target_kl: float | None = None  # end a rollout's updates at 1.5 times this divergence
    entropy: float = 0.0  # weight of the entropy bonus
    critic_coeff: float = 0.5  # weight of the critic's loss
    max_grad_norm: float = 0.5
    seed: int = 0
    device: str = "cpu"
    threads: int = 1  # CPU threads of torch: networks this small are fastest with one
    output: str = "runs/recurrent_ppo"
    resume: str | None = None  # checkpoint.pt of the run to continue
    overwrite: bool = False  # delete the run in the output folder and start again
    logger: Literal["csv", "tensorboard", "wandb"] | None = None  # one of TorchRL's, in addition
    eval_every: int = 10_000  # frames between two evaluations
    eval_episodes: int = 32


# Velocities in the observations of some environments, and the scales of the other entries.
VELOCITIES: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "CartPole-v1": ((1, 3), (2.4, 0.2095)),
    "Pendulum-v1": ((2,), (1.0, 1.0)),
    "MountainCarContinuous-v0": ((1,), (0.6,)),
}
FIXED = ("env", "observation", "hide")  # --resume keeps them, and
FIXED += ("cell", "cell_options", "critic", "hidden_size", "num_layers", "net_arch")
LIMITS: dict[str, tuple[float, float]] = {"sde_sample_freq": (0, math.inf), "log_std_init": (-9, 9)}
LIMITS |= {"gamma": (0, 1), "lmbda": (0, 1), "noise_correlation": (0, 1)}
EVAL_SEED = 100_000_000  # of the episodes of the learning curve
TEST_SEED = 200_000_000  # of the episodes that test the last weights


def read_args(argv: Sequence[str] | None) -> tuple[Args, dict[str, Any]]:
    """Return the arguments and, after --resume, the checkpoint with their defaults."""
    args, checkpoint = runs.read_args(Args, argv, fixed=FIXED, description=__doc__)
    runs.check_ranges(args, **LIMITS)
    if args.minibatch_steps % args.seq_len:
        raise runs.RunError(
            f"--minibatch-steps is {args.minibatch_steps}: expected a multiple of --seq-len, "
            f"{args.seq_len}"
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
        """Make an encoder, if needed, and a recurrent layer that writes the entry ``name``."""
        size, encoder = self.shape[0], [] if self.norm is None else [self.norm]
        if len(self.shape) == 3:
            encoder = [ImageEncoder(self.shape, self.args.ortho_init)]
            size = encoder[0].num_features
        options: Any = self.args.cell_options if cell == self.args.cell else {}
        try:
            recurrent = recurrent_module(
                cell,
                size,
                self.args.hidden_size,
                self.args.num_layers,
                in_key=f"{name}_input" if encoder else "observation",
                out_key=name,
                state_key=f"{name}_state",
                **options,
            )
        except (TypeError, ValueError) as error:
            words = f"--cell is {cell}, --cell-options is {options}"
            raise runs.RunError(f"{words}: {error}") from error
        first = [Layers(one, ["observation"], [f"{name}_input"]) for one in encoder]
        return [*first, recurrent]

    def _make_actor(self, body: list[Any], spec: Any) -> tuple[Any, list[Any]]:
        """Make the distribution of actions that the spec asks for, and lasting noise, if any."""
        args, scale = self.args, None
        kind, options, outputs = action_distribution(spec, squash=args.squash)
        layers = self._make_layers(args.hidden_size, *args.net_arch, outputs, gain=0.01)
        parameters = ActionParameters(spec, args.log_std_init)
        keys = parameters.distribution_keys
        if keys != ["loc", "scale"] and (args.sde or args.noise_correlation):
            raise runs.RunError(
                f"--sde, --noise-correlation: the actions of {args.env} are discrete, or several"
            )
        if args.sde:
            scale = StateDependentScale(layers[-1].in_features, outputs, args.log_std_init)
            heads = [
                Layers(nn.Sequential(*layers[:-1]), ["actor"], ["features"]),
                Layers(layers[-1], ["features"], ["mean"]),
                Layers(scale, ["mean", "features"], keys),
            ]
        else:
            heads = [Layers(nn.Sequential(*layers, parameters), ["actor"], parameters.out_keys)]
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
    """The networks, and the gradient steps on a rollout."""

    def __init__(self, args: Args, checkpoint: dict[str, Any]) -> None:
        torch.manual_seed(args.seed)
        self.args = args
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
        self.loss.set_keys(**find_action_keys(self.evaluation_env.action_spec))
        recurrent_loss(self.advantage)
        recurrent_loss(self.loss)
        self.minibatches = SequenceMinibatches(
            args.minibatch_steps,
            args.seq_len,
            epochs=args.epochs,
            networks=agent.collector,
            refresh=args.refresh,
            normalize_advantage=args.normalize_advantage,
        )
        self.optimizer = torch.optim.Adam(self.loss.parameters(), eps=1e-5, fused=True)
        self.return_norm = RunningNorm()
        self.unfinished = torch.zeros(2, args.num_envs)  # sum and discounted sum of their rewards
        modules = {"agent": agent, "optimizer": self.optimizer, "return_norm": self.return_norm}
        title = f"{args.env}, {args.cell}, seed {args.seed}"
        self.run = runs.Run(args, checkpoint, title, **modules)

    def train(self) -> bool:
        """Collect and learn; return whether all frames are collected, or a signal came before."""
        args, run, size = self.args, self.run, self.args.num_envs * self.args.steps
        env = make_env(args, args.num_envs)
        env.append_transform(get_env_transforms_from_module(self.agent.collector))
        env.set_seed(args.seed + run.frames)  # a resumed run plays other episodes
        collector = Collector(env, self.agent.collector, frames_per_batch=size)
        bar = tqdm(total=args.frames, initial=run.frames, unit=" frames")
        with bar, runs.catch_signals() as stop:
            while run.frames < args.frames and not stop.is_set():
                rollout: Any = collector.next()
                self.scale_rewards(rollout)
                self.learn(rollout)
                run.count(rollout)
                if run.frames % args.eval_every < size or run.frames >= args.frames:
                    rate = self.optimizer.param_groups[0]["lr"]
                    run.record(self.evaluate(EVAL_SEED), learning_rate=rate)
                    run.save()
                bar.set_postfix(run.summarize(), refresh=False)
                bar.update(size)
        collector.shutdown()
        run.save()
        return run.frames >= args.frames

    def evaluate(self, seed: int) -> Tensor:
        """Play without exploration, and return the return of each episode."""
        return evaluate_policy(self.evaluation_env, self.agent.actor, seed + self.args.seed)

    def scale_rewards(self, rollout: TensorDictBase) -> None:
        """Note the returns of episodes that end in a rollout ``[num_envs, T]``; scale rewards."""
        reward, done = (rollout["next", key].squeeze(-1).cpu() for key in ("reward", "done"))
        discounted = []
        for r_t, done_t in zip(reward.unbind(-1), done.unbind(-1), strict=True):
            self.unfinished = self.unfinished * torch.tensor([[1.0], [self.args.gamma]]) + r_t
            discounted.append(self.unfinished[1])
            self.run.returns.extend(self.unfinished[0, done_t].tolist())
            self.unfinished = self.unfinished.masked_fill(done_t, 0)
        reward = rollout["next", "reward"] * self.args.reward_scale
        if self.args.normalize_reward:
            self.return_norm.update(torch.stack(discounted))
            reward = (reward / (self.return_norm.var.item() + 1e-8) ** 0.5).clamp(-10, 10)
        rollout["next", "reward"] = reward

    def learn(self, rollout: TensorDictBase) -> None:
        """Take the gradient steps of all epochs on a rollout ``[num_envs, T]``."""
        args, left = self.args, 1 - self.run.frames / self.args.frames
        rate = args.learning_rate * (left if args.lr_schedule == "linear" else 1)
        self.optimizer.param_groups[0]["lr"] = rate
        self.loss.clip_epsilon.fill_(args.clip * (left if args.clip_schedule == "linear" else 1))
        with torch.no_grad():
            self.advantage(rollout)
        keys = [key for key in self.loss.in_keys if key[0] != "next"]
        keys += ["is_init", "advantage", "value_target", "state_value"]
        keys += [("next", "reward"), ("next", "terminated")]
        for batch in self.minibatches(rollout.select(*keys, strict=False)):
            terms = self.loss(batch)
            if args.target_kl is not None and terms["kl_approx"] > 1.5 * args.target_kl:
                break
            loss: Any = sum(value for key, value in terms.items() if key.startswith("loss_"))
            if not loss.isfinite():
                bad = [key for key, value in terms.items() if not value.isfinite().all()]
                raise runs.RunError(f"not finite at frame {self.run.frames}: {', '.join(bad)}")
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.loss.parameters(), args.max_grad_norm)
            self.optimizer.step()
            self.run.losses.append(loss.item())
        if self.agent.norm is not None:
            self.agent.norm.update(rollout["observation"])


def main(argv: Sequence[str] | None = None) -> None:
    try:
        args, checkpoint = read_args(argv)
        torch.set_num_threads(args.threads)
        trainer = Trainer(args, checkpoint)
        if trainer.train():
            print(trainer.run.finish(trainer.evaluate(TEST_SEED)))
        else:
            print(f"Stopped. Continue: --resume {args.output}/checkpoint.pt")
    except (runs.RunError, EnvError) as error:
        print(f"recurrent_ppo.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
