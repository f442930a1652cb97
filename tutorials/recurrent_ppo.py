"""Recurrent PPO: actors and critics with memory, from environment to film.

    python tutorials/recurrent_ppo.py                               # CartPole without velocities
    python tutorials/recurrent_ppo.py --env Pendulum-v1             # continuous actions
    python tutorials/recurrent_ppo.py --env MountainCarContinuous-v0   # a goal that is hard to find
    python tutorials/recurrent_ppo.py --env Acrobot-v1 --observation pixels
    python tutorials/recurrent_ppo.py --memoryless                  # for comparison
    python tutorials/recurrent_ppo.py --resume runs/recurrent_ppo/checkpoint.pt --frames 200000

The parts are TorchRL's: environments, collector, GAE, loss. The memory is rnnkeys', and so are the
two things that memory asks of PPO: ``recurrent_loss``, so that values and ratios are those of the
steps as they were played, and ``SequenceMinibatches``, which tears no step from what came before.
Where velocities are hidden, two options help a memory to find out about them: ``--magnify``, since
they show in small changes of position, and ``--noise-correlation``, since noise that lasts makes
larger ones (``lasting_noise.py``). ``PRESETS`` in ``ppo_settings.py`` has both where they help.

A run leaves in its --output folder

    learning_curve.csv   a row for each evaluation
    learning_curve.png   the same as a picture
    checkpoint.pt        all that --resume needs
    result.json          the settings, and how the last weights do on episodes never seen before
    film.gif             with --film: an episode of the trained agent
    tensorboard/         with --tensorboard, which needs ``pip install tensorboard``
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from environments import make_env
from film import film
from ppo_networks import Agent
from ppo_settings import Settings
from records import Records
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from training import TEST_SEED, run_tutorial
from training import Learner as BaseLearner
from training import Trainer as BaseTrainer

from rnnkeys import get_env_transforms_from_module
from rnnkeys.objectives import SequenceMinibatches, recurrent_loss

ENDS = ("reward", "done")


def make_envs(settings: Settings, number: int, **options: Any) -> TransformedEnv:
    """Make environments that are stepped together, as the settings say."""
    return make_env(
        settings.env,
        settings.observation,
        number,
        magnify=settings.magnify,
        device=settings.device,
        **options,
    )


class Learner(BaseLearner):
    """The networks, their loss and optimiser: all that gradient steps change."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        env = make_envs(settings, 2)
        self.agent = Agent(settings, env.observation_spec["observation"], env.action_spec)
        self.policy = self.agent.actor
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
            self.step(loss)
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()

    def _keep_what_is_read(self, rollout: TensorDictBase) -> TensorDictBase:
        """Leave out what minibatches would carry along for nothing: advantages are worked out."""
        root = [key for key in self.loss.in_keys if isinstance(key, str)]
        more = ["is_init", "advantage", "value_target", ("next", "reward")]
        return rollout.select(*root, *more, strict=False)

    def slow_down(self, progress: float) -> None:
        """Let learning rate and clipping fall with ``progress``, from 0 to 1."""
        super().slow_down(progress)
        self.loss.clip_epsilon.fill_(self.settings.clip * max(1 - progress, 0.1))


class Trainer(BaseTrainer):
    """A run: collect, then learn. Evaluations and records are those of all tutorials."""

    learner: Learner
    tests_best = False  # what PPO has learned is in its last weights: its steps get small

    def __init__(self, settings: Settings, records: Records) -> None:
        super().__init__(settings, records)
        self.so_far = torch.zeros(settings.num_envs)

    def make_learner(self) -> Learner:
        return Learner(self.settings)

    def make_evaluation_env(self, episodes: int) -> TransformedEnv:
        return make_envs(self.settings, episodes)

    def rounds(self) -> Generator[None, None, None]:
        """Collect and learn for ever; yield after every round."""
        collector = self._make_collector()
        try:
            while True:
                rollout = self._collect(collector)
                self.learner.slow_down(self.frames / self.settings.frames)
                self.losses.append(self.learner.learn(rollout))
                self.frames += rollout.numel()
                yield
        finally:
            collector.shutdown()

    def numbers(self) -> dict[str, float]:
        return {"learning_rate": self.learner.optimizer.param_groups[0]["lr"]}

    def _make_collector(self) -> Collector:
        """Collect with actor *and* critic's memory: both their states are stored with each step."""
        settings = self.settings
        env = make_envs(settings, settings.num_envs, processes=settings.processes)
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tutorial."""
    trainer = run_tutorial(Trainer, Settings, argv, __doc__ or "")
    if trainer is not None and trainer.settings.film:
        settings = trainer.settings
        env = make_envs(settings, 1, film=True)
        film(env, trainer.learner.policy, trainer.records.folder / "film.gif", TEST_SEED)


if __name__ == "__main__":
    main()
