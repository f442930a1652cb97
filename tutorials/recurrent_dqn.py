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

from collections.abc import Sequence

import torch
from dqn_settings import Settings
from environments import make_env
from eye import make_eye
from replay import EpsilonGreedyTrainer, GreedyLearner, set_returns
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import nn
from torchrl.data import TensorSpec
from torchrl.envs import TransformedEnv
from torchrl.modules import MLP, EGreedyModule, QValueModule
from torchrl.objectives import DQNLoss, SoftUpdate
from training import run_tutorial

from rnnkeys import GRUModule, LSTMModule
from rnnkeys.objectives import recurrent_loss

ENV = "CartPole-v1"


def make_policy(settings: Settings, seen: TensorSpec, action: TensorSpec) -> TensorDictSequential:
    """Observation -> features -> memory -> a value for each action -> the best action."""
    eye, size = make_eye(seen)
    head = MLP(
        in_features=settings.hidden_size,
        out_features=action.shape[-1],
        num_cells=[64],
        activation_class=nn.ReLU,
    )
    return TensorDictSequential(
        TensorDictModule(eye or nn.Identity(), in_keys=["observation"], out_keys=["features"]),
        make_memory(settings, size),
        TensorDictModule(head, in_keys=["memory"], out_keys=["action_value"]),
        QValueModule(spec=action),
    ).to(settings.device)


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
    set_returns(loss, settings)
    return loss if settings.memoryless else recurrent_loss(loss)


class Learner(GreedyLearner):
    """The network, its loss and its optimiser: all that gradient steps change."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        env = make_env(ENV, settings.observation, 1, device=settings.device)
        spec = env.action_spec_unbatched
        self.policy = make_policy(settings, env.observation_spec["observation"], spec)
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


class Trainer(EpsilonGreedyTrainer):
    """A run: collect, remember, learn. ``replay.py`` has what this shares with other tutorials."""

    def make_learner(self) -> Learner:
        return Learner(self.settings)

    def make_evaluation_env(self, episodes: int) -> TransformedEnv:
        return make_env(ENV, self.settings.observation, episodes, device=self.settings.device)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tutorial."""
    run_tutorial(Trainer, Settings, argv, __doc__ or "")


if __name__ == "__main__":
    main()
