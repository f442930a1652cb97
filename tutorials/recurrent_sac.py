"""Recurrent SAC: swing a pendulum up without seeing its velocity.

    python tutorials/recurrent_sac.py                # learns, in some minutes on a CPU
    python tutorials/recurrent_sac.py --memoryless   # the same without memory, for comparison
    python tutorials/recurrent_sac.py --env MountainCarContinuous-v0 --observation all
    python tutorials/recurrent_sac.py --resume runs/recurrent_sac/checkpoint.pt --frames 80000

The parts are TorchRL's: environments, collector, replay buffer, loss. The memory is rnnkeys', and
so is ``recurrent_loss``, by which targets are those of the steps as they follow each other. Read
the file from top to bottom: the networks, what they learn from, and the loop.

A run leaves in its --output folder

    learning_curve.csv   a row for each evaluation
    learning_curve.png   the same as a picture
    checkpoint.pt        all that --resume needs, and the weights that did best
    result.json          the settings, and how those weights do on episodes never seen before
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from environments import make_env
from replay import ReplayTrainer, set_returns
from sac_settings import Settings
from tensordict import TensorDictBase
from tensordict.nn import (
    NormalParamExtractor,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import nn
from torchrl.data import TensorSpec
from torchrl.envs import TransformedEnv
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal
from torchrl.objectives import SACLoss, SoftUpdate
from training import Learner as BaseLearner
from training import run_tutorial

from rnnkeys import GRUModule, LSTMModule
from rnnkeys.objectives import recurrent_loss

# Marks the steps that losses learn from. What a mask at ("collector", "mask") hides was never
# played, and no memory reads it; the steps of a burn-in were, and memories do.
LEARNED = "learned"

CELLS = {"lstm": (LSTMModule, "hc"), "gru": (GRUModule, "h")}


def make_envs(settings: Settings, number: int) -> TransformedEnv:
    return make_env(
        settings.env,
        settings.observation,
        number,
        magnify=settings.magnify,
        device=settings.device,
    )


def make_memory(settings: Settings, size: int, name: str) -> TensorDictModuleBase:
    """Make what turns observations into ``name``: a recurrent layer, or one without memory."""
    if settings.memoryless:
        layer = nn.Sequential(nn.Linear(size, settings.hidden_size), nn.Tanh())
        return TensorDictModule(layer, in_keys=["observation"], out_keys=[name])
    module, states = CELLS[settings.cell]
    return module(
        input_size=size,
        hidden_size=settings.hidden_size,
        in_keys=["observation", *(f"{name}_{state}" for state in states)],
        out_keys=[name, *(("next", f"{name}_{state}") for state in states)],
    )


def make_head(settings: Settings, inputs: int, outputs: int) -> MLP:
    return MLP(
        in_features=settings.hidden_size + inputs,
        out_features=outputs,
        num_cells=[settings.head_size],
        activation_class=nn.ReLU,
    )


def make_actor(settings: Settings, size: int, spec: TensorSpec) -> ProbabilisticActor:
    """Observation -> memory; both -> a bell squeezed between the bounds of the action."""
    head = make_head(settings, size, 2 * spec.shape[-1])
    body = TensorDictSequential(
        make_memory(settings, size, "actor"),
        TensorDictModule(head, in_keys=["actor", "observation"], out_keys=["bell"]),
        TensorDictModule(NormalParamExtractor(), in_keys=["bell"], out_keys=["loc", "scale"]),
    )
    return ProbabilisticActor(
        body,
        in_keys=["loc", "scale"],
        spec=spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": spec.space.low, "high": spec.space.high, "tanh_loc": False},
        return_log_prob=True,
    ).to(settings.device)


def make_critic(settings: Settings, size: int, actions: int) -> TensorDictSequential:
    """Observation -> memory; both and an action -> value.

    The action comes in behind the memory: what the loss asks is the value of *one* other action,
    after the steps that were played, and not after a sequence of others.
    """
    keys = ["critic", "observation", "action"]
    head = make_head(settings, size + actions, 1)
    return TensorDictSequential(
        make_memory(settings, size, "critic"),
        TensorDictModule(head, in_keys=keys, out_keys=["state_action_value"]),
    ).to(settings.device)


def make_loss(
    settings: Settings, actor: ProbabilisticActor, critic: TensorDictSequential, spec: TensorSpec
) -> SACLoss:
    """SAC with two critics and TD(lambda) returns.

    An episode of Pendulum is cut after 200 steps and never terminates: the target of its last step
    takes in the value of the observation that it was cut at, as if it went on.
    """
    loss = SACLoss(
        actor,
        critic,
        num_qvalue_nets=2,
        alpha_init=settings.alpha,
        action_spec=spec,
        loss_function="l2",
    )
    loss.loss_mask_key = LEARNED
    set_returns(loss, settings)
    return loss if settings.memoryless else recurrent_loss(loss)


class Learner(BaseLearner):
    """The networks, their loss and its optimiser: all that gradient steps change."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        env = make_envs(settings, 1)
        spec, size = env.action_spec_unbatched, env.observation_spec["observation"].shape[-1]
        self.policy = make_actor(settings, size, spec)
        critic = make_critic(settings, size, spec.shape[-1])
        self.loss = make_loss(settings, self.policy, critic, spec)
        critics = [key[-1] for key in critic.out_keys if isinstance(key, tuple)]
        self.reads = [key for key in self.loss.in_keys if key not in critics]
        self.target = SoftUpdate(self.loss, tau=settings.tau)
        self.optimizer = torch.optim.Adam(
            self.loss.parameters(), settings.learning_rate, eps=1e-5, fused=True
        )

    def find_losses(self, batch: TensorDictBase) -> TensorDictBase:
        """Return the losses of actor, critics and alpha on ``batch``, ``[slices, slice_len]``.

        The actor starts from the states it had when it played. The critics did not play: they start
        from zero, like their targets. Nothing is learned from the first ``--burn-in`` steps, in
        which all of them warm up, each with its own weights.
        """
        if not self.settings.memoryless:
            steps = torch.arange(batch.shape[-1], device=batch.device)
            batch[LEARNED] = (steps >= self.settings.burn_in).expand(batch.shape)
        return self.loss(batch)

    def learn(self, batch: TensorDictBase) -> float:
        """Take one gradient step on ``batch``; return the critics' loss."""
        losses = self.find_losses(batch)
        # Each reaches its own weights only: one backward pass and one optimiser serve all three.
        loss = losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]
        self.step(loss)
        return losses["loss_qvalue"].item()


class Trainer(ReplayTrainer):
    """A run: collect, remember, learn. What is remembered, and when, is as for DQN."""

    learner: Learner

    def make_learner(self) -> Learner:
        return Learner(self.settings)

    def make_evaluation_env(self, episodes: int) -> TransformedEnv:
        return make_envs(self.settings, episodes)

    def make_explorer(self) -> TensorDictModuleBase:
        """Explore with actions drawn from the actor's distribution: no noise need be added."""
        return self.learner.policy

    def numbers(self) -> dict[str, float]:
        return {"alpha": self.learner.loss.log_alpha.exp().item()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tutorial."""
    run_tutorial(Trainer, Settings, argv, __doc__ or "")


if __name__ == "__main__":
    main()
