"""Recurrent PPO: actors and critics with memory, from environment to film.

    python tutorials/recurrent_ppo.py                               # CartPole without velocities
    python tutorials/recurrent_ppo.py --env Pendulum-v1             # continuous actions
    python tutorials/recurrent_ppo.py --env Acrobot-v1 --observation pixels
    python tutorials/recurrent_ppo.py --memoryless                  # for comparison
    python tutorials/recurrent_ppo.py --resume runs/recurrent_ppo/checkpoint.pt --frames 200000

The parts are TorchRL's: environments, collector, GAE, loss. The memory is rnnkeys', and so are the
two things that memory asks of PPO: ``recurrent_loss``, so that values and ratios are those of the
steps as they were played, and ``SequenceMinibatches``, which tears no step from what came before.

A run leaves in its --output folder

    learning_curve.csv   a row for each evaluation
    learning_curve.png   the same as a picture
    checkpoint.pt        all that --resume needs
    result.json          the settings, and how the last weights do on episodes never seen before
    film.gif             with --film: an episode of the trained agent
    tensorboard/         with --tensorboard, which needs ``pip install tensorboard``
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from command_line import StopOnInterrupt
from environments import make_env
from evaluation import Evaluation
from learning_records import save_checkpoint
from policy_networks import Agent
from policy_records import Records, film
from policy_settings import Settings, read_settings
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from tqdm import tqdm

from rnnkeys import get_env_transforms_from_module
from rnnkeys.objectives import SequenceMinibatches, recurrent_loss

SELECTION_SEED = 100_000_000
TEST_SEED = 200_000_000
TEST_EPISODES = 20
ENDS = ("reward", "done")


class Learner:
    """The networks, their loss and optimiser: all that gradient steps change."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        env = make_env(settings.env, settings.observation, 2, device=settings.device)
        self.agent = Agent(settings, env.observation_spec["observation"], env.action_spec)
        env.close()
        self.advantage = GAE(
            gamma=settings.gamma,
            lmbda=settings.lmbda,
            value_network=self.agent.critic,
            deactivate_vmap=True,
        )
        self.loss = ClipPPOLoss(
            self.agent.actor,
            self.agent.critic_in_loss,
            clip_epsilon=settings.clip,
            entropy_bonus=settings.entropy > 0,
            entropy_coeff=settings.entropy,
            critic_coeff=settings.critic_coeff,
            loss_critic_type="l2",
            log_explained_variance=False,
        )
        if not settings.memoryless:
            recurrent_loss(self.advantage)
            recurrent_loss(self.loss)
        self.minibatches = SequenceMinibatches(
            settings.minibatch_steps,
            settings.seq_len,
            epochs=settings.epochs,
            networks=self.agent.both,
            refresh=settings.refresh and not settings.memoryless,
            normalize_advantage=True,
        )
        self.optimizer = torch.optim.Adam(
            self.loss.parameters(), settings.learning_rate, eps=1e-5, fused=True
        )

    def learn(self, rollout: TensorDictBase) -> float:
        """Take the gradient steps of all epochs on a rollout ``[*, T]``; return the mean loss."""
        with torch.no_grad():
            self.advantage(rollout)
        losses = []
        for batch in self.minibatches(self._keep_what_is_read(rollout)):
            terms = self.loss(batch)
            loss = sum(value for key, value in terms.items() if key.startswith("loss_"))
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.loss.parameters(), self.settings.max_grad_norm)
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()

    def _keep_what_is_read(self, rollout: TensorDictBase) -> TensorDictBase:
        """Leave out what minibatches would carry along for nothing: advantages are worked out."""
        root = [key for key in self.loss.in_keys if isinstance(key, str)]
        more = ["is_init", "advantage", "value_target", ("next", "reward")]
        return rollout.select(*root, *more, strict=False)

    def slow_down(self, progress: float) -> None:
        """Let learning rate and clipping fall with ``progress``, from 0 to 1."""
        left = max(0.0, 1 - progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * left
        self.loss.clip_epsilon.fill_(self.settings.clip * max(left, 0.1))

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])


class Trainer:
    """A run: collect, learn, evaluate in regular intervals.

    Args:
        settings: of the run.
        records: are added to after every evaluation.
    """

    def __init__(self, settings: Settings, records: Records) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.records = settings, records
        self.learner = Learner(settings)
        self.selection = self._make_evaluation(settings.eval_episodes)
        self.frames = self.episodes = 0
        self.seconds = {"collect": 0.0, "learn": 0.0}
        self.returns: deque[float] = deque(maxlen=100)
        self.so_far = torch.zeros(settings.num_envs)
        self.loss = math.nan

    def run(self, stopped: Callable[[], bool]) -> None:
        """Learn until ``--frames`` are collected or ``stopped()``, and save what there is."""
        settings = self.settings
        collector = self._make_collector()
        with self._bar() as bar:
            while self.frames < settings.frames and not stopped():
                clock = time.perf_counter()
                rollout = self._collect(collector)
                self.seconds["collect"] += time.perf_counter() - clock
                clock = time.perf_counter()
                self.learner.slow_down(self.frames / settings.frames)
                self.loss = self.learner.learn(rollout)
                self.seconds["learn"] += time.perf_counter() - clock
                self.frames += rollout.numel()
                self._show(bar)
                if self._evaluation_is_due():
                    self._evaluate()
        collector.shutdown()
        self.save()

    def _make_collector(self) -> Collector:
        """Collect with actor *and* critic's memory: both their states are stored with each step."""
        settings = self.settings
        env = make_env(
            settings.env,
            settings.observation,
            settings.num_envs,
            processes=settings.processes,
            device=settings.device,
        )
        env.append_transform(get_env_transforms_from_module(self.learner.agent.both))
        env.set_seed(settings.seed + self.frames)  # not the same episodes after a resume
        return Collector(
            env,
            self.learner.agent.both,
            frames_per_batch=settings.num_envs * settings.steps,
            total_frames=-1,
        )

    def _collect(self, collector: Collector) -> TensorDictBase:
        """Collect a rollout ``[*, T]``; note the returns of episodes that ended, scale rewards.

        Both could be transforms of the environment, at the price of two more calls for every step.
        """
        rollout = collector.next()
        reward, done = (rollout["next", key].reshape(-1, self.settings.steps).cpu() for key in ENDS)
        for t in range(self.settings.steps):
            self.so_far = self.so_far + reward[:, t]
            self.returns.extend(self.so_far[done[:, t]].tolist())
            self.so_far = self.so_far.masked_fill(done[:, t], 0)
        self.episodes += int(done.sum())
        rollout["next", "reward"] *= self.settings.reward_scale
        return rollout

    def _evaluation_is_due(self) -> bool:
        """Tell whether the last rollout passed a multiple of ``--eval-every``, or the end."""
        last = self.frames - self.settings.num_envs * self.settings.steps
        every = self.settings.eval_every
        return self.frames // every > last // every or self.frames >= self.settings.frames

    def _make_evaluation(self, episodes: int) -> Evaluation:
        env = make_env(
            self.settings.env, self.settings.observation, episodes, device=self.settings.device
        )
        return Evaluation(env, self.learner.agent.actor)

    def _evaluate(self) -> None:
        """Play episodes without exploration, and record how it went."""
        rng = torch.get_rng_state()
        returns = self.selection(SELECTION_SEED + self.settings.seed)
        torch.set_rng_state(rng)
        self.records.add(
            frames=self.frames,
            seconds=sum(self.seconds.values()),
            frames_per_second=self.frames / sum(self.seconds.values()),
            episodes=self.episodes,
            training_return=_mean(self.returns),
            loss=self.loss,
            learning_rate=self.learner.optimizer.param_groups[0]["lr"],
            evaluation=returns.mean().item(),
            evaluation_min=returns.min().item(),
            evaluation_max=returns.max().item(),
        )
        self.save()

    def test(self) -> Tensor:
        """Play episodes never seen before, without exploration; return their returns."""
        return self._make_evaluation(TEST_EPISODES)(TEST_SEED + self.settings.seed)

    def _bar(self) -> tqdm:
        frames = self.settings.frames
        return tqdm(total=frames, initial=min(self.frames, frames), unit=" frames", smoothing=0.1)

    def _show(self, bar: tqdm) -> None:
        last = self.records.last("evaluation")
        text = f"return {_mean(self.returns):.0f}, evaluation {last:.0f}, loss {self.loss:.3f}"
        bar.set_postfix_str(text, refresh=False)
        bar.update(min(self.frames, self.settings.frames) - bar.n)

    def save(self) -> None:
        save_checkpoint(self.state_dict(), self.records.checkpoint)

    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "learner": self.learner.state_dict(),
            "frames": self.frames,
            "episodes": self.episodes,
            "seconds": self.seconds,
            "rows": self.records.rows,
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.frames, self.episodes = state["frames"], state["episodes"]
        self.seconds, self.records.rows = state["seconds"], state["rows"]
        torch.set_rng_state(state["rng"])


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tutorial."""
    settings, checkpoint = read_settings(argv, __doc__ or "")
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    torch.set_num_threads(settings.threads)
    records = Records(Path(settings.output), settings.title, tensorboard=settings.tensorboard)
    trainer = Trainer(settings, records)
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint)
    with StopOnInterrupt() as stop:
        trainer.run(stop)
    records.draw()
    if stop.asked:
        print(f"Stopped after {trainer.frames} frames; what there is lies in {records.folder}.")
        print(f"To go on: python {sys.argv[0]} --resume {records.checkpoint}")
        return
    returns = trainer.test()
    records.write_result(asdict(settings), returns, trainer.seconds, trainer.frames)
    if settings.film:
        env = make_env(settings.env, settings.observation, 1, film=True)
        film(env, trainer.learner.agent.actor, records.folder / "film.gif", TEST_SEED)
    print(
        f"Mean return {returns.mean():.1f} over {TEST_EPISODES} fresh episodes after "
        f"{trainer.frames} frames. Picture: {records.folder / 'learning_curve.png'}"
    )


if __name__ == "__main__":
    main()
