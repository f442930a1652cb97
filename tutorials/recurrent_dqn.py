"""Learn CartPole without seeing its velocities: a recurrent DQN, from environment to picture.

    python tutorials/recurrent_dqn.py                        # learns, in a few minutes on a CPU
    python tutorials/recurrent_dqn.py --memoryless           # the same without memory: does not
    python tutorials/recurrent_dqn.py --observation pixels   # from rendered frames
    python tutorials/recurrent_dqn.py --resume runs/recurrent_dqn/checkpoint.pt --frames 200000

The parts are TorchRL's: environments, collector, replay buffer, loss. The memory is rnnkeys'. Read
the file from top to bottom: the settings, the network, what it learns from, and the loop.

A run leaves in its --output folder

    learning_curve.csv   a row for each evaluation
    learning_curve.png   the same as a picture
    checkpoint.pt        all that --resume needs, and the weights that did best
    result.json          the settings, and how those weights do on episodes never seen before
"""

from __future__ import annotations

import logging
import math
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cartpole import make_env
from command_line import Settings, StopOnInterrupt, read_settings
from evaluation import Evaluation
from learning_records import Records, save_checkpoint
from progress import make_bar, show
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import LazyMemmapStorage, SliceSampler, TensorDictReplayBuffer, TensorSpec
from torchrl.envs import RewardScaling, RewardSum, TransformedEnv
from torchrl.modules import MLP, ConvNet, EGreedyModule, QValueModule
from torchrl.objectives import DQNLoss, SoftUpdate, ValueEstimators
from tqdm import tqdm

from rnnkeys import GRUModule, LSTMModule, get_env_transforms_from_module
from rnnkeys.objectives import recurrent_loss

# Weights are chosen on other episodes than they were trained on, and tested on episodes that
# neither their training nor their choice has seen.
SELECTION_SEED = 100_000_000
TEST_SEED = 200_000_000
TEST_EPISODES = 20


def make_policy(settings: Settings, spec: TensorSpec) -> TensorDictSequential:
    """Observation -> features -> memory -> a value for each action -> the best action."""
    see, size = make_eye(settings.observation)
    head = MLP(
        in_features=settings.hidden_size,
        out_features=spec.shape[-1],
        num_cells=[64],
        activation_class=nn.ReLU,
    )
    return TensorDictSequential(
        TensorDictModule(see, in_keys=["observation"], out_keys=["features"]),
        make_memory(settings, size),
        TensorDictModule(head, in_keys=["memory"], out_keys=["action_value"]),
        QValueModule(spec=spec),
    ).to(settings.device)


def make_eye(observation: str) -> tuple[nn.Module, int]:
    """Make the network in front of the memory; return it and the size of its features.

    The scene is dark lines on white: as ink, ``1 - grey / 255``, most of it is zero.
    """
    if observation == "positions":
        return nn.Identity(), 2
    conv = ConvNet(
        in_features=1,
        num_cells=[16, 32, 32],
        kernel_sizes=[8, 4, 3],
        strides=[4, 2, 1],
        activation_class=nn.ReLU,
        aggregator_class=nn.AdaptiveAvgPool2d,
        aggregator_kwargs={"output_size": (4, 7)},
    )
    return nn.Sequential(Ink(), conv, nn.Flatten(-3)), 32 * 4 * 7


class Ink(nn.Module):
    def forward(self, frame: Tensor) -> Tensor:
        return 1 - frame.float() / 255


def make_memory(settings: Settings, input_size: int) -> TensorDictModuleBase:
    """Make the recurrent layer or, for comparison, one of its size that cannot remember."""
    if settings.memoryless:
        layer = nn.Sequential(nn.Linear(input_size, settings.hidden_size), nn.Tanh())
        return TensorDictModule(layer, in_keys=["features"], out_keys=["memory"])
    module = {"lstm": LSTMModule, "gru": GRUModule}[settings.cell]
    return module(
        input_size=input_size,
        hidden_size=settings.hidden_size,
        in_key="features",
        out_key="memory",
        store_states="starts",  # a DQN reads states where its sequences start, and nowhere else
    )


def make_loss(settings: Settings, policy: TensorDictSequential, spec: TensorSpec) -> DQNLoss:
    """Double DQN with a slow target network and TD(lambda) returns.

    The longer returns decide whether anything is learned: a one-step target passes the news of a
    fallen pole back by one step of the 500 in each round.
    """
    loss = DQNLoss(
        policy, action_space=spec, delay_value=True, double_dqn=True, loss_function="smooth_l1"
    )
    loss.make_value_estimator(ValueEstimators.TDLambda, gamma=settings.gamma, lmbda=settings.lmbda)
    return loss if settings.memoryless else recurrent_loss(loss)


def make_replay(settings: Settings, folder: str, draws: torch.Generator) -> TensorDictReplayBuffer:
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


def make_training_env(
    settings: Settings, policy: TensorDictSequential, seed: int
) -> TransformedEnv:
    """Make the environments to learn from, with what the memory needs to start each episode."""
    env = make_env(settings.observation, settings.num_envs, settings.device)
    env.append_transform(RewardSum())
    env.append_transform(RewardScaling(loc=0.0, scale=settings.reward_scale))
    env.append_transform(get_env_transforms_from_module(policy))
    env.set_seed(seed)
    return env


class Learner:
    """The network, its loss and its optimiser: all that gradient steps change."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        spec = make_env(settings.observation, 1, settings.device).action_spec
        self.policy = make_policy(settings, spec)
        self.explore = EGreedyModule(
            spec=spec,
            eps_end=settings.epsilon,
            annealing_num_steps=settings.epsilon_frames,
            device=torch.device(settings.device),
        )
        self.loss = make_loss(settings, self.policy, spec)
        self.reads = self._find_what_to_remember()
        self.target = SoftUpdate(self.loss, tau=settings.tau)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), settings.learning_rate, eps=1e-5)

    def _find_what_to_remember(self) -> list[NestedKey]:
        """List what the loss reads, but for the states after each step: it computes them itself."""
        memory = self.policy[1]
        return [key for key in self.loss.in_keys if key not in memory.out_keys]

    def learn(self, batch: TensorDictBase) -> float:
        """Take one gradient step on ``batch``, ``[slices, slice_len]``; return the loss."""
        loss = self.loss(batch)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.loss.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.target.step()
        return loss.item()

    def slow_down(self, progress: float) -> None:
        """Let the learning rate fall with ``progress``, from 0 to 1.

        Greedy returns swing from one evaluation to the next until the steps get small.
        """
        rate = self.settings.learning_rate * max(0.0, 1 - progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        parts = {"loss": self.loss, "optimizer": self.optimizer, "explore": self.explore}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.explore.load_state_dict(state["explore"])


class Trainer:
    """A run: collect, remember, learn; evaluate in regular intervals and keep the best weights.

    Args:
        settings: of the run.
        records: are added to after every evaluation.
    """

    def __init__(self, settings: Settings, records: Records) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.records = records
        self.learner = Learner(settings)
        self.selection = self._make_evaluation(settings.eval_episodes)
        self.draws = torch.Generator().manual_seed(settings.seed)
        self.frames = self.episodes = 0
        self.seconds = 0.0
        self.best: dict[str, Any] = {"return": -1.0}
        self.returns: deque[float] = deque(maxlen=100)
        self.losses: deque[float] = deque(maxlen=100)

    def run(self, stopped: Callable[[], bool]) -> None:
        """Learn until ``--frames`` are collected or ``stopped()``, and save what there is.

        A resumed run starts with new episodes and an empty replay buffer: it collects ``--warmup``
        frames with the policy it has before it learns on.
        """
        settings, first, clock = self.settings, self.frames, time.perf_counter()
        bar = make_bar(settings.frames, self.frames)
        with tempfile.TemporaryDirectory(prefix="recurrent_dqn_") as folder, bar:
            replay = make_replay(settings, folder, self.draws)
            collector = self._make_collector()
            while self.frames < settings.frames and not stopped():
                self._collect(collector, replay)
                if self.frames - first >= settings.warmup:
                    self._learn(replay)
                self._show(bar)
                self.seconds += time.perf_counter() - clock
                clock = time.perf_counter()
                if self._evaluation_is_due():
                    self._evaluate()
            collector.shutdown()
            replay.shutdown()
        self.save()

    def _make_collector(self) -> Collector:
        """Collect with the network that learns, and a random action now and then."""
        policy = TensorDictSequential(self.learner.policy, self.learner.explore)
        seed = self.settings.seed + self.frames  # not the same episodes again after a resume
        env = make_training_env(self.settings, self.learner.policy, seed)
        return Collector(
            env,
            policy,
            frames_per_batch=self.settings.batch_frames,
            storing_device="cpu",
        )

    def _collect(self, collector: Collector, replay: TensorDictReplayBuffer) -> None:
        """Collect ``--batch-frames`` frames and remember them, ``[num_envs, T]``."""
        data = collector.next()
        ended = data["next", "done"]
        self.frames += data.numel()
        self.episodes += int(ended.sum())
        self.returns.extend(data["next", "episode_reward"][ended].tolist())
        self.learner.explore.step(data.numel())
        data = data.reshape(self.settings.num_envs, -1).select(*self.learner.reads)
        streams = torch.arange(self.settings.num_envs).unsqueeze(-1)
        replay.extend(data.set("stream", streams.expand(data.shape)))

    def _learn(self, replay: TensorDictReplayBuffer) -> None:
        self.learner.slow_down(self.frames / self.settings.frames)
        for _ in range(self.settings.updates):
            batch = replay.sample().reshape(-1, self.settings.slice_len)
            self.losses.append(self.learner.learn(batch.to(self.settings.device)))

    def _evaluation_is_due(self) -> bool:
        """Tell whether the last batch passed a multiple of ``--eval-every``, or the end."""
        last, every = self.frames - self.settings.batch_frames, self.settings.eval_every
        return self.frames // every > last // every or self.frames >= self.settings.frames

    def _make_evaluation(self, episodes: int) -> Evaluation:
        env = make_env(self.settings.observation, episodes, self.settings.device)
        return Evaluation(env, self.learner.policy)

    def _evaluate(self) -> None:
        """Play greedy episodes, keep the weights if none did better, and record it."""
        returns = self.selection(SELECTION_SEED + self.settings.seed)
        mean = returns.mean().item()
        if mean >= self.best["return"]:
            weights = {k: v.clone() for k, v in self.learner.policy.state_dict().items()}
            self.best = {"return": mean, "frames": self.frames, "policy": weights}
        self.records.add(
            frames=self.frames,
            seconds=self.seconds,
            episodes=self.episodes,
            training_return=_mean(self.returns),
            loss=_mean(self.losses),
            epsilon=self.learner.explore.eps.item(),
            learning_rate=self.learner.optimizer.param_groups[0]["lr"],
            greedy_return=mean,
            greedy_return_min=returns.min().item(),
            greedy_return_max=returns.max().item(),
        )
        self.save()

    def test_best(self) -> Tensor:
        """Play the weights that did best on episodes that nothing was chosen by; return returns.

        The best of many noisy evaluations is in part good luck; fresh episodes tell how much.
        """
        if "policy" not in self.best:  # stopped before any evaluation, resumed with fewer frames
            self._evaluate()
        self.learner.policy.load_state_dict(self.best["policy"])
        return self._make_evaluation(TEST_EPISODES)(TEST_SEED + self.settings.seed)

    def _show(self, bar: tqdm) -> None:
        numbers = {
            "return": f"{_mean(self.returns):.0f}",
            "greedy": f"{self.records.last('greedy_return', default=math.nan):.0f}",
            "loss": f"{_mean(self.losses):.3f}",
            "epsilon": f"{self.learner.explore.eps.item():.2f}",
        }
        show(bar, self.frames, numbers)

    def save(self) -> None:
        save_checkpoint(self.state_dict(), self.records.checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Return all that ``--resume`` needs. The replay buffer is left out: it is large."""
        rng = {"torch": torch.get_rng_state(), "draws": self.draws.get_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        return {
            "settings": asdict(self.settings),
            "learner": self.learner.state_dict(),
            "frames": self.frames,
            "episodes": self.episodes,
            "seconds": self.seconds,
            "rows": self.records.rows,
            "best": self.best,
            "rng": rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.frames, self.episodes = state["frames"], state["episodes"]
        self.seconds = state["seconds"]
        self.records.rows, self.best = state["rows"], state["best"]
        torch.set_rng_state(state["rng"]["torch"])
        self.draws.set_state(state["rng"]["draws"])
        if "cuda" in state["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["rng"]["cuda"])


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tutorial."""
    settings, checkpoint = read_settings(argv, __doc__ or "")
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # it tells of every buffer it makes
    torch.set_num_threads(settings.threads)
    records = Records(Path(settings.output), settings.title)
    trainer = Trainer(settings, records)
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint)
    print(f"{settings.title}: {trainer.frames} of {settings.frames} frames are done. Ctrl-C stops.")
    if trainer.frames >= settings.frames:
        print("A larger --frames would go on; the best checkpoint is tested again.")
    with StopOnInterrupt() as stop:
        trainer.run(stop)
    records.draw()
    if stop.asked:
        print(f"Stopped after {trainer.frames} frames; what there is lies in {records.folder}.")
        print(f"To go on: {sys.executable} {sys.argv[0]} --resume {records.checkpoint}")
        return
    returns = trainer.test_best()
    records.write_result(asdict(settings), trainer.best, returns)
    print(
        f"Best checkpoint (frame {trainer.best['frames']}, mean return "
        f"{trainer.best['return']:.1f} when it was chosen): mean return {returns.mean():.1f} over "
        f"{TEST_EPISODES} fresh episodes. Picture: {records.folder / 'learning_curve.png'}"
    )


if __name__ == "__main__":
    main()
