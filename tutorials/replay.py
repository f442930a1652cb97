"""What the tutorials that replay sequences have in common: settings, buffer, rounds."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from command_line import RunSettings, option
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyMemmapStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import RewardScaling, RewardSum, TransformedEnv
from torchrl.modules import EGreedyModule
from torchrl.objectives import LossModule, ValueEstimators
from training import Learner, Trainer

from rnnkeys import get_env_transforms_from_module


@dataclass
class ReplaySettings(RunSettings):
    """What a run that learns from replayed sequences can be told."""

    cell: str = option("lstm", "the recurrent layer", ["lstm", "gru"])
    memoryless: bool = option(False, "a linear layer in place of the recurrent one")

    num_envs: int = option(16, "environments stepped together")
    batch_frames: int = option(128, "frames collected between two rounds of learning")
    updates: int = option(4, "gradient steps in a round of learning")
    warmup: int = option(2_000, "frames collected before the first round, after a resume too")
    capacity: int = option(100_000, "frames that the replay buffer holds")
    slices: int = option(32, "sequences in a gradient step")
    slice_len: int = option(64, "steps in a sequence")

    hidden_size: int = option(128, "size of each recurrent layer")
    gamma: float = option(0.99, "discount", most=1)
    lmbda: float = option(
        0.95, "lambda of the TD(lambda) returns; 0 bootstraps after one step", most=1
    )
    reward_scale: float = option(0.1, "rewards are multiplied by it, so that values stay small")
    learning_rate: float = option(1e-3, "Adam's at the start; it falls to 0 at --frames")
    max_grad_norm: float = option(10.0, "longer gradients are cut to this length")
    tau: float = option(
        0.01, "share of the way that target networks move in a gradient step", most=1
    )

    def check(self) -> None:
        """Raise ``ValueError`` if a number is out of range, or if numbers do not fit together."""
        super().check()
        if self.frames <= self.warmup:
            raise ValueError(
                f"--frames is {self.frames}: expected more than --warmup, {self.warmup}, because "
                "nothing is learned before"
            )
        if self.batch_frames % self.num_envs:
            raise ValueError(
                f"--batch-frames is {self.batch_frames}: expected a multiple of --num-envs, "
                f"{self.num_envs}, because the environments are stepped together"
            )
        shortest = self.num_envs * self.slice_len
        for name in ("warmup", "capacity"):
            if getattr(self, name) < shortest:
                raise ValueError(
                    f"--{name} is {getattr(self, name)}: expected at least --num-envs times "
                    f"--slice-len, {shortest}, so that a sequence can be drawn"
                )


def make_replay(
    settings: ReplaySettings, folder: str, draws: torch.Generator
) -> TensorDictReplayBuffer:
    """Keep experience on disk, one stream for each environment; draw sequences from it.

    A sequence starts anywhere in a stream, with the state that the memory had there, and runs on
    through the ends of episodes: ``is_init`` tells the memory where to start anew. Were episodes
    drawn instead, the many short ones of the beginning would crowd out the few long ones.
    """
    return TensorDictReplayBuffer(
        storage=LazyMemmapStorage(settings.capacity, scratch_dir=folder, ndim=2),
        sampler=SliceSampler(slice_len=settings.slice_len, traj_key="stream", cache_values=True),
        batch_size=settings.slices * settings.slice_len,
        prefetch=1,
        generator=draws,
    )


def set_returns(loss: LossModule, settings: ReplaySettings) -> None:
    """Make ``loss`` learn TD(lambda) returns; those of lambda 0, TorchRL calls TD(0)."""
    if settings.lmbda:
        options = {"gamma": settings.gamma, "lmbda": settings.lmbda}
        loss.make_value_estimator(ValueEstimators.TDLambda, **options)
    else:
        loss.make_value_estimator(ValueEstimators.TD0, gamma=settings.gamma)


class ReplayTrainer(Trainer):
    """A run: collect, remember, learn. Evaluations and records are those of all tutorials.

    The learner has a method ``learn``, which takes a gradient step on a batch
    ``[slices, slice_len]`` and returns its loss, and ``reads``, the entries to remember for it.
    """

    @abstractmethod
    def make_explorer(self) -> TensorDictModuleBase:
        """Return what plays while collecting: the policy, and how it explores."""

    def rounds(self) -> Generator[None, None, None]:
        """Collect and learn for ever; yield after every round.

        A resumed run starts with new episodes and an empty replay buffer: it collects ``--warmup``
        frames with the policy it has before it learns on.
        """
        first = self.frames
        with tempfile.TemporaryDirectory(prefix="replay_") as folder:
            replay = make_replay(self.settings, folder, self.draws)
            collector = self.make_collector()
            try:
                while True:
                    self.collect(collector, replay)
                    if self.frames - first >= self.settings.warmup:
                        self._learn(replay)
                    yield
            finally:
                collector.shutdown()
                replay.shutdown()

    def make_collector(self) -> Collector:
        return Collector(
            self._make_training_env(),
            self.make_explorer(),
            frames_per_batch=self.settings.batch_frames,
            storing_device="cpu",
        )

    def _make_training_env(self) -> TransformedEnv:
        """Make the environments to learn from, with what the memory needs to start each episode."""
        env = self.make_evaluation_env(self.settings.num_envs)
        env.append_transform(RewardSum())
        env.append_transform(RewardScaling(loc=0.0, scale=self.settings.reward_scale))
        env.append_transform(get_env_transforms_from_module(self.learner.policy))
        env.set_seed(self.settings.seed + self.frames)  # not the same episodes after a resume
        return env

    def collect(self, collector: Collector, replay: TensorDictReplayBuffer) -> None:
        """Collect ``--batch-frames`` frames and remember them, ``[num_envs, T]``."""
        data: Any = collector.next()
        self.count(data)
        data = data.reshape(self.settings.num_envs, -1).select(*self.learner.reads)
        streams = torch.arange(self.settings.num_envs).unsqueeze(-1)
        replay.extend(data.set("stream", streams.expand(data.shape)))

    def _learn(self, replay: TensorDictReplayBuffer) -> None:
        self.learner.slow_down(self.frames / self.settings.frames)
        for _ in range(self.settings.updates):
            batch: TensorDictBase = replay.sample().reshape(-1, self.settings.slice_len)
            self.losses.append(self.learner.learn(batch.to(self.settings.device)))


class GreedyLearner(Learner):
    """A learner of values that plays the best action, and now and then a random one.

    Its policy's values are learned by a loss that the tutorial makes.
    """

    explore: EGreedyModule
    saved = ("loss", "optimizer", "explore")

    def learn(self, batch: TensorDictBase) -> float:
        """Take one gradient step on ``batch``, ``[slices, slice_len]``; return the loss."""
        loss = self.loss(batch)["loss"]
        self.step(loss)
        return loss.item()


class EpsilonGreedyTrainer(ReplayTrainer):
    """A run of a :class:`GreedyLearner`: the chance of a random action falls with the frames."""

    learner: GreedyLearner

    def make_explorer(self) -> TensorDictSequential:
        """Play with the network that learns, and a random action now and then."""
        return TensorDictSequential(self.learner.policy, self.learner.explore)

    def collect(self, collector: Collector, replay: TensorDictReplayBuffer) -> None:
        super().collect(collector, replay)
        self.learner.explore.step(self.settings.batch_frames)

    def numbers(self) -> dict[str, float]:
        return {
            "epsilon": self.learner.explore.eps.item(),
            "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
        }
