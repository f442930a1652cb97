"""TorchRL's trainers run with recurrent modules and wired losses, and learn from sequences."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import RewardSum
from torchrl.modules import OneHotCategorical, ProbabilisticActor, QValueModule, TanhNormal
from torchrl.objectives import ClipPPOLoss, DQNLoss, SACLoss, SoftUpdate
from torchrl.objectives.value import GAE
from torchrl.trainers import Trainer
from torchrl.trainers.algorithms import DQNTrainer, PPOTrainer, SACTrainer

from rnnkeys import GRUModule, LSTMModule, get_env_transforms_from_module
from rnnkeys.environments import make_gym_env
from rnnkeys.objectives import SequenceMinibatches, recurrent_loss
from rnnkeys.trainers import ActorCriticCollector, SequenceMinibatchesHook
from tests.support.odd_environments import action_id
from tests.support.recurrent import chain

FRAMES = 64


@pytest.fixture(autouse=True)
def trainers_are_experimental() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*experimental/prototype", UserWarning)
        warnings.filterwarnings("ignore", ".*hook stage will be replaced", FutureWarning)
        yield


def make_collector(policy: Any, name: str = "Choice", kind: Any = Collector) -> Any:
    env = make_gym_env(action_id(name), 2, discrete_actions=name == "Choice")
    env.append_transform(RewardSum(["reward"], ["reward_sum"]))
    env.append_transform(get_env_transforms_from_module(policy))
    return kind(env, policy, frames_per_batch=FRAMES, total_frames=2 * FRAMES)


def make_trainer(kind: Any, loss: Any, collector: Any, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "collector": collector,
        "total_frames": 2 * FRAMES,
        "frame_skip": 1,
        "optim_steps_per_batch": None,
        "loss_module": loss,
        "optimizer": torch.optim.Adam(loss.parameters(), 1e-2),
        "progress_bar": False,
        "logger": None,
    }
    return kind(**{**arguments, **options})


def watch(loss: Any) -> list[torch.Size]:
    """Return a list to which every call of the loss adds the shape of its batch."""
    shapes: list[torch.Size] = []
    loss.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    return shapes


def make_actor() -> Any:
    torch.manual_seed(0)
    return ProbabilisticActor(
        chain(
            LSTMModule(3, 8, in_key="observation", out_key="embed"),
            TensorDictModule(nn.Linear(8, 2), ["embed"], ["logits"]),
        ),
        in_keys=["logits"],
        distribution_class=OneHotCategorical,
        return_log_prob=True,
    )


def make_critic() -> Any:
    return chain(
        GRUModule(3, 8, in_keys=["observation", "v_h"], out_keys=["v", ("next", "v_h")]),
        TensorDictModule(nn.Linear(8, 1), ["v"], ["state_value"]),
    )


def make_ppo(**options: Any) -> tuple[Any, Any]:
    actor, critic = make_actor(), make_critic()
    loss = recurrent_loss(ClipPPOLoss(actor, critic))
    gae = recurrent_loss(GAE(gamma=0.99, lmbda=0.9, value_network=critic))
    collector = make_collector(chain(actor, critic), kind=ActorCriticCollector)
    trainer = make_trainer(PPOTrainer, loss, collector, gae=gae, num_epochs=3, **options)
    return trainer, loss


def test_ppo_trainer_learns_from_minibatches_of_sequences() -> None:
    trainer, loss = make_ppo()
    SequenceMinibatchesHook(SequenceMinibatches(16, 8)).register(trainer)
    shapes = watch(loss)
    before = {name: value.clone() for name, value in loss.named_parameters()}
    trainer.train()
    # Two batches of 64 steps, three epochs of four minibatches each.
    assert shapes == [torch.Size([2, 8])] * (2 * 3 * 4)
    changed = [name for name, value in loss.named_parameters() if not value.equal(before[name])]
    assert len(changed) == len(before)


def test_ppo_trainer_plays_with_the_weights_that_it_learned() -> None:
    trainer, loss = make_ppo()
    SequenceMinibatchesHook(SequenceMinibatches(16, 8)).register(trainer)
    trainer.train()
    played = trainer.collector.policy
    for name, value in loss.actor_network_params.items(True, True):
        weight = dict(played[0].named_parameters())[".".join(name)]
        assert torch.equal(weight, value)


def test_sequence_minibatches_hook_beside_a_fixed_number_of_steps_raises() -> None:
    trainer, _ = make_ppo(optim_steps_per_batch=3)
    with pytest.raises(ValueError, match="PPOTrainer has optim_steps_per_batch=3: expected None"):
        SequenceMinibatchesHook(SequenceMinibatches(16, 8)).register(trainer)


def test_sequence_minibatches_hook_beside_a_replay_buffer_raises() -> None:
    trainer, _ = make_ppo()
    trainer.replay_buffer = make_buffer()
    with pytest.raises(ValueError, match="(?s)PPOTrainer has replay_buffer=.*: expected None"):
        SequenceMinibatchesHook(SequenceMinibatches(16, 8)).register(trainer)


def test_sequence_minibatches_hook_with_epochs_of_its_own_raises() -> None:
    with pytest.raises(ValueError, match="epochs=2: expected 1.*num_epochs"):
        SequenceMinibatchesHook(SequenceMinibatches(16, 8, epochs=2))


def make_buffer() -> Any:
    """Slices of eight steps, laid end to end as TorchRL's trainers store and sample them."""
    return TensorDictReplayBuffer(
        storage=LazyTensorStorage(1_000),
        sampler=SliceSampler(slice_len=8, traj_key=("collector", "traj_ids")),
        batch_size=32,
    )


def test_dqn_trainer_learns_from_slices() -> None:
    policy = chain(
        GRUModule(3, 8, in_key="observation", out_key="embed"),
        TensorDictModule(nn.Linear(8, 2), ["embed"], ["action_value"]),
        QValueModule("one_hot"),
    )
    loss: Any = recurrent_loss(DQNLoss(policy, action_space="one_hot", delay_value=True))
    shapes = watch(loss)
    make_trainer(
        DQNTrainer,
        loss,
        make_collector(policy),
        replay_buffer=make_buffer(),
        target_net_updater=SoftUpdate(loss, tau=0.1),
        optim_steps_per_batch=3,
    ).train()
    assert shapes == [torch.Size([32])] * 6
    weights = list(loss.value_network_params.values(True, True))
    assert all(bool(weight.isfinite().all()) for weight in weights)


def test_sac_trainer_learns_from_slices() -> None:
    actor = ProbabilisticActor(
        chain(
            GRUModule(3, 8, in_key="observation", out_key="embed"),
            TensorDictModule(nn.Linear(8, 4), ["embed"], ["both"]),
            TensorDictModule(NormalParamExtractor(), ["both"], ["loc", "scale"]),
        ),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    join: Any = TensorDictModule(
        lambda q, action: torch.cat([q, action], -1), ["q", "action"], ["both_q"]
    )
    critic = chain(
        GRUModule(3, 8, in_keys=["observation", "q_h"], out_keys=["q", ("next", "q_h")]),
        join,
        TensorDictModule(nn.Linear(10, 1), ["both_q"], ["state_action_value"]),
    )
    loss: Any = recurrent_loss(SACLoss(actor, critic, num_qvalue_nets=2, target_entropy=-2.0))
    shapes = watch(loss)
    make_trainer(
        SACTrainer,
        loss,
        make_collector(actor, "Box"),
        replay_buffer=make_buffer(),
        target_net_updater=SoftUpdate(loss, tau=0.1),
        optim_steps_per_batch=3,
    ).train()
    assert shapes == [torch.Size([32])] * 6
    weights = [*loss.actor_network_params.values(True, True)]
    assert all(bool(weight.isfinite().all()) for weight in weights)


def test_generic_trainer_runs_a_wired_loss_on_whole_batches() -> None:
    actor, critic = make_actor(), make_critic()
    loss = recurrent_loss(ClipPPOLoss(actor, critic))
    gae: Any = recurrent_loss(GAE(gamma=0.99, lmbda=0.9, value_network=critic))
    shapes = watch(loss)
    trainer = make_trainer(
        Trainer, loss, make_collector(chain(actor, critic)), optim_steps_per_batch=2
    )
    trainer.register_op("pre_epoch", gae)
    trainer.train()
    assert shapes == [torch.Size([2, 32])] * 4
