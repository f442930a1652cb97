"""Learn to remember together: QMIX with recurrent agents, from environment to picture.

    python tutorials/recurrent_qmix.py                # learns, in less than a minute on a CPU
    python tutorials/recurrent_qmix.py --memoryless   # the same without memory: does not
    python tutorials/recurrent_qmix.py --own          # each agent with weights of its own
    python tutorials/recurrent_qmix.py --resume runs/recurrent_qmix/checkpoint.pt --frames 80000

Three agents hear one word of a password each, at the first step and never again; ``password.py``
has the rules. Later all have to say theirs at once, and only all words right are worth anything.
Who does not remember can but guess, and guessing opens the door in 1 of 8 cases; a perfect team
opens it always.

The parts are TorchRL's: collector, replay buffer, agents' networks, mixer and loss. The memory is
rnnkeys'. ``docs/agents.md`` explains the keys. A run leaves in its --output folder

    learning_curve.csv   a row for each evaluation
    learning_curve.png   the same as a picture
    checkpoint.pt        all that --resume needs, and the weights that did best
    result.json          the settings, and how those weights do on episodes never seen before
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from password import Password
from qmix_settings import Settings
from replay import EpsilonGreedyTrainer, GreedyLearner, set_returns
from tensordict import unravel_key
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs import TransformedEnv
from torchrl.modules import EGreedyModule, MultiAgentMLP, QMixer, QValueModule
from torchrl.objectives import QMixerLoss, SoftUpdate
from training import run_tutorial

from rnnkeys import GRUModule, LSTMModule
from rnnkeys.objectives import recurrent_loss


def make_policy(settings: Settings) -> TensorDictSequential:
    """Each agent: observation -> memory -> a value for each word -> the best word.

    Entries of a group of agents, ``("agents", ...)``, have the shape ``[*batch, agents, ...]``.
    """
    head = MultiAgentMLP(
        n_agent_inputs=settings.hidden_size,
        n_agent_outputs=settings.words,
        n_agents=settings.agents,
        centralized=False,
        share_params=not settings.own,
        num_cells=[32],
        activation_class=nn.ReLU,
    )
    entries: list[NestedKey] = [
        ("agents", name) for name in ("action", "action_value", "chosen_action_value")
    ]
    return TensorDictSequential(
        *make_memory(settings),
        TensorDictModule(
            head, in_keys=[("agents", "memory")], out_keys=[("agents", "action_value")]
        ),
        QValueModule(
            action_space="categorical",
            action_value_key=("agents", "action_value"),
            out_keys=entries,
        ),
    ).to(settings.device)


def make_memory(settings: Settings) -> list[TensorDictModuleBase]:
    """Make the agents' recurrent layers or, for comparison, layers that cannot remember."""
    if settings.memoryless:
        layer = nn.Sequential(nn.Linear(settings.words + 1, settings.hidden_size), nn.Tanh())
        return [TensorDictModule(layer, [("agents", "observation")], [("agents", "memory")])]
    if not settings.own:
        return [make_layer(settings, "agents")]
    names = [f"agent_{number}" for number in range(settings.agents)]
    return [
        TensorDictModule(
            Apart(), [("agents", "observation")], [(name, "observation") for name in names]
        ),
        *(make_layer(settings, name) for name in names),
        TensorDictModule(Together(), [(name, "memory") for name in names], [("agents", "memory")]),
    ]


def make_layer(settings: Settings, group: str) -> TensorDictModuleBase:
    """Make a layer that reads and writes entries of ``group``: of all agents, or of one.

    Agents that share a layer share its weights only: each has a state of its own.
    """
    module = {"lstm": LSTMModule, "gru": GRUModule}[settings.cell]
    states = module.DEFAULT_IN_KEYS
    return module(
        input_size=settings.words + 1,
        hidden_size=settings.hidden_size,
        in_keys=[(group, "observation"), *((group, state) for state in states)],
        out_keys=[(group, "memory"), *(("next", group, state) for state in states)],
    )


class Apart(nn.Module):
    def forward(self, entry: Tensor) -> tuple[Tensor, ...]:
        return entry.unbind(-2)


class Together(nn.Module):
    def forward(self, *entries: Tensor) -> Tensor:
        return torch.stack(entries, -2)


def make_loss(settings: Settings, policy: TensorDictSequential) -> QMixerLoss:
    """QMIX: the agents' values are mixed to the team's, which is what the reward teaches.

    See "QMIX: Monotonic Value Function Factorisation for Deep Multi-Agent Reinforcement Learning",
    Rashid et al., 2018 (arXiv:1803.11485).
    """
    mixer = QMixer(
        state_shape=(settings.agents * settings.words + 1,),
        mixing_embed_dim=32,
        n_agents=settings.agents,
        device=settings.device,
    )
    mixed = TensorDictModule(
        mixer,
        in_keys=[("agents", "chosen_action_value"), "state"],
        out_keys=["chosen_action_value"],
    )
    loss = QMixerLoss(policy, mixed, action_space="categorical", delay_value=True)
    set_returns(loss, settings)
    return loss if settings.memoryless else recurrent_loss(loss)


class Learner(GreedyLearner):
    """The agents, the mixer, their loss and its optimiser: all that gradient steps change."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.policy = make_policy(settings)
        self.explore = EGreedyModule(
            spec=make_env(settings, 1).full_action_spec_unbatched,
            eps_end=settings.epsilon,
            annealing_num_steps=settings.epsilon_frames,
            action_key=("agents", "action"),
            device=torch.device(settings.device),
        )
        self.loss = make_loss(settings, self.policy)
        self.reads = self._find_what_to_remember()
        self.target = SoftUpdate(self.loss, tau=settings.tau)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), settings.learning_rate, eps=1e-5)

    def _find_what_to_remember(self) -> list[NestedKey]:
        """List what the loss reads, but for the states after each step: it computes them itself."""
        written = set(map(unravel_key, self.policy.out_keys)) - {("agents", "action")}
        return [key for key in map(unravel_key, self.loss.in_keys) if key not in written]


def make_env(settings: Settings, num_envs: int) -> TransformedEnv:
    return TransformedEnv(Password(num_envs, settings.agents, settings.words, settings.device))


class Trainer(EpsilonGreedyTrainer):
    """A run: collect, remember, learn. ``replay.py`` has what this shares with other tutorials."""

    def make_learner(self) -> Learner:
        return Learner(self.settings)

    def make_evaluation_env(self, episodes: int) -> TransformedEnv:
        return make_env(self.settings, episodes)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tutorial."""
    run_tutorial(Trainer, Settings, argv, __doc__ or "")


if __name__ == "__main__":
    main()
