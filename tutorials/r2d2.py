"""Recurrent replay as in R2D2: stored states, burn-in, prioritised windows, many actors.

    python tutorials/r2d2.py                                # CartPole without its velocities
    python tutorials/r2d2.py --memoryless                   # the same without memory: does not
    python tutorials/r2d2.py --burn-in 0 --state zero       # zero, stored or refreshed states
    python tutorials/r2d2.py --actors ray 2                 # collects on a Ray cluster
    python tutorials/r2d2.py --env popgym:popgym-RepeatPreviousEasy-v0     # a memory task
    python tutorials/r2d2.py --resume runs/r2d2/checkpoint.pt --frames 200000

See "Recurrent Experience Replay in Distributed Reinforcement Learning", Kapturowski et al., 2019
(https://openreview.net/forum?id=r1lyTjAqYX). Read this file from top to bottom: environments,
network, what learns, and the loop; settings, actors and replay have files of their own.

A run leaves in its --output folder

    learning_curve.csv   a row for each evaluation, with the staleness of states
    learning_curve.png   the same as a picture
    checkpoint.pt        all that --resume needs, the replay too, and the weights that did best
    result.json          the settings, and how those weights do on episodes never seen before
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, cast

import torch
from actors import ACTOR_KEY, ActorsLost, AnyCollector, make_collector
from environments import make_env
from exploration import EpsilonGreedy, epsilon_ladder
from r2d2_settings import Settings, spell_out
from records import Records
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.envs import DTypeCastTransform, RewardScaling, RewardSum, TransformedEnv
from torchrl.objectives import SoftUpdate
from training import Learner as BaseLearner
from training import Trainer as BaseTrainer
from training import run_tutorial
from window_replay import WindowReplay

from rnnkeys import CellModule, GatedCell, drqn_policy, get_env_transforms_from_module
from rnnkeys.objectives import R2D2Loss


def make_envs(settings: Settings, number: int) -> TransformedEnv:
    """Make environments that are stepped together; what they show is floats."""
    env = make_env(settings.env, settings.observation, number, device=settings.device)
    if not env.observation_spec["observation"].dtype.is_floating_point:
        key = "observation"
        env.append_transform(DTypeCastTransform(torch.int64, torch.float32, in_keys=[key]))
    return env


def make_actor_envs(settings: Settings, policy: TensorDictModuleBase) -> TransformedEnv:
    """Make an actor's environments, with what the memory needs to start each episode."""
    env = make_envs(settings, settings.envs_each)
    env.append_transform(RewardSum())
    env.append_transform(RewardScaling(loc=0.0, scale=settings.reward_scale))
    env.append_transform(get_env_transforms_from_module(policy))
    return env


class Forgetful(GatedCell):
    """A layer in place of the recurrent one: its state is there, and nothing reads it."""

    name = "forgetful"
    num_gates = 1
    state_names = ("h",)

    def pointwise(
        self, gates_x: Tensor, gates_h: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        return (gates_x.tanh(),)


def make_policy(settings: Settings, seen: TensorSpec, action: TensorSpec) -> TensorDictSequential:
    """Observation -> memory -> a value for each action (dueling) -> the best action."""
    size, hidden = seen.shape[-1], settings.hidden_size
    policy = drqn_policy(action, (size,), cell=settings.cell, hidden_size=hidden, encoder_sizes=())
    if settings.memoryless:
        see, _, head, choose = cast(Any, policy)
        memory: Any = CellModule(Forgetful(), size, hidden, in_key="features", out_key="memory")
        policy = TensorDictSequential(see, memory, head, choose)
    return policy.to(settings.device)


class Learner(BaseLearner):
    """The network, its loss and its optimiser: all that gradient steps change."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        env = make_envs(settings, 1)
        self.spec = env.action_spec_unbatched
        self.policy = make_policy(settings, env.observation_spec["observation"], self.spec)
        self.loss = R2D2Loss(
            self.policy,
            burn_in=settings.burn_in,
            learn_starts=True,
            n_steps=settings.n_steps,
            gamma=settings.gamma,
            eps=settings.rescale or None,
            eta=settings.eta,
            loss_function="smooth_l1",
        )
        self.target = SoftUpdate(self.loss, tau=settings.tau)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), settings.learning_rate, eps=1e-5)
        self.floor = torch.tensor(1.0, device=settings.device)

    def make_explorer(self, actor: int) -> TensorDictSequential:
        """Make what plays in an actor: each environment explores as often as its rung says."""
        ladder = epsilon_ladder(self.settings.num_envs, self.settings.epsilon)
        explore = EpsilonGreedy(self.spec, ladder.chunk(self.settings.workers)[actor])
        explore.floor = self.floor  # one for all: it sinks while the run goes on
        return TensorDictSequential(*cast(Any, (self.policy, explore)))

    def learn(self, windows: TensorDictBase) -> float:
        """Take one gradient step; the loss writes the windows' priorities. Return the loss."""
        loss = self.loss(windows)["loss"]
        self.step(loss)
        return loss.item()

    def anneal(self, frames: int) -> None:
        """Let the learning rate and the least chance of a random action fall with ``frames``."""
        settings = self.settings
        self.floor.fill_(max(0.0, 1 - frames / settings.epsilon_frames))
        self.slow_down(frames / settings.frames)


class Trainer(BaseTrainer):
    """A run: collect, remember, learn. Evaluations and records are those of all tutorials."""

    settings: Settings
    learner: Learner

    def __init__(self, settings: Settings, records: Records) -> None:
        super().__init__(settings, records)
        # TorchRL may miss an extension here, which the replay's sampler does without.
        logging.getLogger("torchrl").setLevel(logging.ERROR)
        self.replay = WindowReplay(settings, self.learner.policy, self.draws)
        self.staleness = {"first": math.nan, "last": math.nan}

    def make_learner(self) -> Learner:
        return Learner(self.settings)

    def make_evaluation_env(self, episodes: int) -> TransformedEnv:
        return make_envs(self.settings, episodes)

    def rounds(self) -> Generator[None, None, None]:
        """Collect and learn for ever; yield after every round.

        A resumed run starts with new episodes and with the windows that were saved.
        """
        self.learner.anneal(self.frames)
        try:
            with self._make_collector() as collector:
                while True:
                    self._collect(collector)
                    self.learner.anneal(self.frames)
                    if self.frames >= self.settings.warmup and len(self.replay):
                        self._learn()
                        collector.update_policy_weights_(self.learner.make_explorer(0))
                    yield
        except ActorsLost as error:
            self.save()
            raise SystemExit(f"{error}\nTo go on: --resume {self.records.checkpoint}") from None

    def _make_collector(self) -> AnyCollector:
        settings = self.settings
        return make_collector(
            settings.actors,
            settings.num_actors,
            partial(make_actor_envs, settings, self.learner.policy),
            self.learner.make_explorer,
            frames_per_batch=settings.batch_frames,
            seed=settings.seed + self.frames,  # not the same episodes again after a resume
            ray_address=settings.ray_address,
        )

    def _collect(self, collector: AnyCollector) -> None:
        """Collect ``--batch-frames`` frames of an actor, ``[envs_each, T]``, and remember them."""
        data = collector.next()
        self.count(data)
        self.replay.add(data.select(*self.learner.loss.in_keys, ACTOR_KEY))

    def _learn(self) -> None:
        settings = self.settings
        last = self.frames - settings.batch_frames
        if self.frames // settings.refresh_every > last // settings.refresh_every:
            if settings.state == "refreshed":
                self.replay.refresh()
        for _ in range(settings.updates):
            windows = self.replay.sample()
            self.losses.append(self.learner.learn(windows))
            self.replay.update_priorities(windows)

    def evaluate(self) -> None:
        """Measure what old states do to values, then play."""
        if len(self.replay):
            self.staleness = self.replay.staleness(seed=self.frames)
        super().evaluate()

    def numbers(self) -> dict[str, float]:
        return {
            "epsilon": self.learner.floor.item(),
            "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
            **{f"staleness_{step}": value for step, value in self.staleness.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "replay": self.replay.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.replay.load_state_dict(state["replay"])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tutorial."""
    argv = spell_out(sys.argv[1:] if argv is None else argv)
    run_tutorial(Trainer, Settings, argv, __doc__ or "")


if __name__ == "__main__":
    main()
