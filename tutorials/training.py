"""What the tutorials' runs have in common: rounds, evaluations, records, checkpoints, Ctrl-C."""

from __future__ import annotations

import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from command_line import RunSettings, StopOnInterrupt, read_settings
from evaluation import Evaluation
from progress import make_bar, show
from records import Records, save_checkpoint
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.envs import TransformedEnv

# Weights are chosen on other episodes than they were trained on, and tested on episodes that
# neither their training nor their choice has seen.
SELECTION_SEED = 100_000_000
TEST_SEED = 200_000_000
TEST_EPISODES = 20


class Learner:
    """Networks, their loss and their optimiser: all that gradient steps change."""

    settings: Any
    policy: Any  # plays in evaluations, without exploration
    loss: Any
    optimizer: Any
    target: Any = None  # lets target networks follow, if there are any

    saved: ClassVar[tuple[str, ...]] = ("loss", "optimizer")
    """What a checkpoint holds."""

    def step(self, loss: Tensor) -> None:
        """Take one gradient step down ``loss``, of a length that is cut to ``--max-grad-norm``."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.loss.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        if self.target is not None:
            self.target.step()

    def slow_down(self, progress: float) -> None:
        """Let the learning rate fall with ``progress``, from 0 to 1.

        Returns swing from one evaluation to the next until the steps get small.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * max(0.0, 1 - progress)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.saved:
            getattr(self, name).load_state_dict(state[name])


class Trainer(ABC):
    """A run: collect and learn in rounds, evaluate in regular intervals, keep the best weights.

    A tutorial says how to make its environments and learner, and what a round is.

    Args:
        settings: of the run.
        records: are added to after every evaluation.
    """

    settings: Any
    learner: Any

    tests_best: ClassVar[bool] = True
    """Whether the weights tested in the end are those that did best, or the last ones."""

    def __init__(self, settings: RunSettings, records: Records) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.records = records
        self.learner = self.make_learner()
        self.selection = self.make_evaluation(settings.eval_episodes)
        self.draws = torch.Generator().manual_seed(settings.seed)
        self.frames = self.episodes = 0
        self.seconds = 0.0
        self.best: dict[str, Any] = {"return": -math.inf}
        self.returns: deque[float] = deque(maxlen=100)
        self.losses: deque[float] = deque(maxlen=100)

    @abstractmethod
    def make_learner(self) -> Learner:
        """Make what learns; it draws its first weights from torch's generator."""

    @abstractmethod
    def make_evaluation_env(self, episodes: int) -> TransformedEnv:
        """Make as many environments as an evaluation has episodes, stepped together."""

    @abstractmethod
    def rounds(self) -> Generator[None, None, None]:
        """Collect and learn for ever; yield after every round.

        A round adds to ``frames``, ``episodes``, ``returns`` and ``losses``. The generator is
        closed when the run ends: what has to be shut down belongs in ``with`` or ``finally``.
        """

    def numbers(self) -> dict[str, float]:
        """Return what else is worth recording, and showing in the progress bar."""
        return {}

    def count(self, data: TensorDictBase) -> None:
        """Add up the frames and episodes of what was collected, and note the returns."""
        ended = data["next", "done"]
        self.frames += data.numel()
        self.episodes += int(ended.sum())
        self.returns.extend(data["next", "episode_reward"][ended].tolist())

    def make_evaluation(self, episodes: int) -> Callable[[int], Tensor]:
        return Evaluation(self.make_evaluation_env(episodes), self.learner.policy)

    def run(self, stopped: Callable[[], bool]) -> None:
        """Learn until ``--frames`` are collected or ``stopped()``, and save what there is."""
        settings, clock = self.settings, time.perf_counter()
        bar = make_bar(settings.frames, self.frames)
        with bar, closing(self.rounds()) as rounds:
            while self.frames < settings.frames and not stopped():
                before = self.frames
                next(rounds)
                self._show(bar)
                self.seconds += time.perf_counter() - clock
                if self.frames // settings.eval_every > before // settings.eval_every:
                    self.evaluate()
                clock = time.perf_counter()
            if not stopped() and self.frames != self.records.last("frames"):
                self.evaluate()
        self.save()

    def evaluate(self) -> None:
        """Play episodes without exploration, keep the weights if none did better, record it."""
        rng = torch.get_rng_state()
        returns = self.selection(SELECTION_SEED + self.settings.seed)
        torch.set_rng_state(rng)
        mean = returns.mean().item()
        if mean >= self.best["return"]:
            weights = {k: v.clone() for k, v in self.learner.policy.state_dict().items()}
            self.best = {"return": mean, "frames": self.frames, "policy": weights}
        self.records.add(
            frames=self.frames,
            seconds=self.seconds,
            episodes=self.episodes,
            training_return=mean_of(self.returns),
            loss=mean_of(self.losses),
            **self.numbers(),
            evaluation=mean,
            evaluation_min=returns.min().item(),
            evaluation_max=returns.max().item(),
        )
        self.save()

    def test(self) -> dict[str, Any]:
        """Play episodes never seen before, and return what goes to result.json.

        The best of many noisy evaluations is in part good luck; fresh episodes tell how much.
        """
        if "policy" not in self.best:  # stopped before any evaluation, resumed with fewer frames
            self.evaluate()
        if self.tests_best:
            self.learner.policy.load_state_dict(self.best["policy"])
        returns = self.make_evaluation(TEST_EPISODES)(TEST_SEED + self.settings.seed)
        return {
            "tested": "best weights" if self.tests_best else "last weights",
            "test_return": returns.mean().item(),
            "test_returns": returns.tolist(),
            "best_evaluation": self.best["return"],
            "best_frames": self.best["frames"],
            "frames": self.frames,
            "seconds": round(self.seconds, 1),
            "settings": asdict(self.settings),
        }

    def _show(self, bar: Any) -> None:
        numbers = {
            "return": mean_of(self.returns),
            "evaluation": self.records.last("evaluation"),
            "loss": mean_of(self.losses),
            **self.numbers(),
        }
        show(bar, self.frames, numbers)

    def save(self) -> None:
        save_checkpoint(self.state_dict(), self.records.checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Return all that ``--resume`` needs. A replay buffer is left out: it is large."""
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


def mean_of(values: Collection[float]) -> float:
    """Return the mean of ``values``, NaN if there are none."""
    return sum(values) / len(values) if values else math.nan


AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def run_tutorial(
    trainer_class: type[AnyTrainer],
    settings_class: type[RunSettings],
    argv: Sequence[str] | None,
    description: str,
) -> AnyTrainer | None:
    """Do what the command line asks for, from reading it to the result.

    Returns:
        The trainer with the weights that were tested, or None if Ctrl-C stopped it.
    """
    settings, checkpoint = read_settings(settings_class, argv, description)
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # it tells of every buffer it makes
    torch.set_num_threads(settings.threads)
    records = Records(Path(settings.output), settings.title, tensorboard=settings.tensorboard)
    trainer = trainer_class(settings, records)
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint)
    print(f"{settings.title}: {trainer.frames} of {settings.frames} frames are done. Ctrl-C stops.")
    if trainer.frames >= settings.frames:
        print("A larger --frames would go on; the weights are tested again.")
    with StopOnInterrupt() as stop:
        trainer.run(stop)
    records.draw()
    if stop.asked:
        print(f"Stopped after {trainer.frames} frames; what there is lies in {records.folder}.")
        print(f"To go on: {sys.executable} {sys.argv[0]} --resume {records.checkpoint}")
        return None
    result = trainer.test()
    records.write_result(result)
    if trainer.tests_best:
        print(
            f"The best weights are those of frame {result['best_frames']}, with a mean return of "
            f"{result['best_evaluation']:.1f} when they were chosen."
        )
    print(
        f"{result['tested'].capitalize()}: mean return {result['test_return']:.1f} over "
        f"{len(result['test_returns'])} fresh episodes. Picture: {records.picture}"
    )
    return trainer
