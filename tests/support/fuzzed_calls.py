"""The public entry points that take a batch, each with a batch that it takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import OneHotCategorical, ProbabilisticActor, QValueModule
from torchrl.objectives import A2CLoss, ClipPPOLoss, DQNLoss, ValueEstimators
from torchrl.objectives.value import GAE

import rnnkeys
from rnnkeys import recurrent_module, set_recurrent_mode
from rnnkeys.collectors import EpsilonGreedy
from rnnkeys.objectives import R2D2Loss, SequenceMinibatches, recurrent_loss
from rnnkeys.sequences import (
    find_sequence_problems,
    read_is_init,
    read_mask,
    set_next_is_init,
    set_segment_starts,
    zero_masked,
)
from rnnkeys.transforms import BurnIn, RefreshStates, Windows, state_staleness
from tests.support.bad_batches import seed

B, T, OBS, H, ACTIONS = 3, 6, 4, 5, 2
_Sequential: Any = TensorDictSequential
STATES = ["actor_h", "critic_h", ("next", "actor_h"), ("next", "critic_h")]
FLAGS = ["is_init", ("next", "done"), ("next", "terminated")]
OBSERVATIONS = ["observation", ("next", "observation")]


class Call(NamedTuple):
    """A call that takes a batch, and the entries that it reads."""

    run: Callable[[Any], Any]
    keys: list[Any]


def make_batch() -> TensorDict:
    """Return episodes ``[3, 6]`` with states of an actor and a critic, as they are collected."""
    return _make_once().clone()


@cache
def _make_once() -> TensorDict:
    seed(0)
    batch = TensorDict({"observation": torch.randn(B, T, OBS)}, [B, T])
    done = torch.zeros(B, T, 1, dtype=torch.bool)
    done[0, 2] = done[1, 4] = True
    batch["is_init"] = torch.cat([torch.ones(B, 1, 1, dtype=torch.bool), done[:, :-1]], 1)
    batch["action"] = nn.functional.one_hot(torch.randint(ACTIONS, (B, T)), ACTIONS)
    batch["priority_weight"] = torch.rand(B, 1).expand(B, T).clone()
    for key in ("advantage", "value_target"):
        batch[key] = torch.randn(B, T, 1)
    batch["action_log_prob"] = torch.full((B, T), -0.7)
    following = {"observation": torch.randn(B, T, OBS), "reward": torch.randn(B, T, 1)}
    batch["next"] = TensorDict({**following, "done": done, "terminated": done.clone()}, [B, T])
    following = torch.randn(B, T, 1, H), torch.randn(B, T, 1, H)
    for key, after in zip(("actor_h", "critic_h"), following, strict=True):
        before = torch.cat([torch.zeros(B, 1, 1, H), after[:, :-1]], 1)
        batch[key] = before.masked_fill(batch["is_init"].unsqueeze(-1), 0)
        batch["next", key] = after
    return batch


def recurrent(name: str = "actor", cell: str = "gru") -> Any:
    return recurrent_module(
        cell, OBS, H, in_keys=["observation", f"{name}_h"], out_keys=[name, ("next", f"{name}_h")]
    )


def network(name: str, out_key: str, size: int) -> Any:
    seed(1)
    return _Sequential(recurrent(name), TensorDictModule(nn.Linear(H, size), [name], [out_key]))


def make_actor() -> Any:
    return ProbabilisticActor(
        network("actor", "logits", ACTIONS),
        in_keys=["logits"],
        distribution_class=OneHotCategorical,
        return_log_prob=True,
    )


def call_module(cell: str, in_sequences: bool, batch: Any) -> Any:
    seed(2)
    module = recurrent("actor", cell)
    with set_recurrent_mode(in_sequences):
        return module(batch.copy() if isinstance(batch, TensorDictBase) else batch)


def call_dqn(batch: Any) -> Any:
    policy = _Sequential(network("actor", "action_value", ACTIONS), QValueModule("one-hot"))
    loss: Any = DQNLoss(policy, action_space="one-hot", delay_value=False)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    return recurrent_loss(loss)(batch)


def call_ppo(batch: Any) -> Any:
    loss: Any = ClipPPOLoss(make_actor(), network("critic", "state_value", 1))
    return recurrent_loss(loss)(batch)


def call_a2c(batch: Any) -> Any:
    loss: Any = A2CLoss(make_actor(), network("critic", "state_value", 1))
    return recurrent_loss(loss)(batch)


def call_gae(batch: Any) -> Any:
    critic = network("critic", "state_value", 1)
    gae = recurrent_loss(GAE(gamma=0.9, lmbda=0.9, value_network=critic))
    found = gae(batch.copy() if isinstance(batch, TensorDictBase) else batch)
    return found.select("advantage", "value_target")


def call_r2d2(batch: Any) -> Any:
    loss = R2D2Loss(
        network("actor", "action_value", ACTIONS), burn_in=2, delay_value=False, double_dqn=False
    )
    copy = batch.copy() if isinstance(batch, TensorDictBase) else batch
    return [loss(copy), copy.get("td_error")]


def call_explore(batch: Any) -> Any:
    explore = EpsilonGreedy(OneHot(ACTIONS), 0.5, first_visits=2)
    with set_exploration_type(ExplorationType.RANDOM):
        return explore(batch.copy() if isinstance(batch, TensorDictBase) else batch)


def call_minibatches(batch: Any) -> Any:
    networks = [network("actor", "logits", ACTIONS), network("critic", "state_value", 1)]
    options: Any = {"networks": networks, "normalize_advantage": True}
    return list(SequenceMinibatches(6, 3, **options)(batch))


def call_staleness(batch: Any) -> Any:
    found = state_staleness(network("actor", "action_value", ACTIONS), batch, batch, burn_in=2)
    return [found["first"], found["last"]]


def call_report(batch: Any) -> Any:
    rnnkeys.check_recurrent_policy(network("actor", "logits", ACTIONS), batch=batch)
    return []


def call_windows(batch: Any) -> Any:
    windows = Windows(4, "null", state_keys=["actor_h", "critic_h"])(batch)
    return windows.exclude(("window", "episode"))


def call_zero_masked(batch: Any) -> Any:
    return zero_masked(batch, torch.arange(T).expand(B, T) < 4)


def call_problems(batch: Any) -> Any:
    pairs = [(key, "is_init") for key in ("actor_h", "critic_h")]
    return [None for _ in find_sequence_problems(batch, ["is_init"], pairs)]


_ACTOR = ["observation", "is_init", "actor_h"]
_READ = [*FLAGS, *OBSERVATIONS, *STATES, ("next", "reward"), "action"]
CALLS: dict[str, Call] = {
    **{
        f"{cell} {'sequences' if in_sequences else 'steps'}": Call(
            partial(call_module, cell, in_sequences), _ACTOR
        )
        for cell in ("gru", "mingru")
        for in_sequences in (True, False)
    },
    "DQN": Call(call_dqn, _READ),
    "PPO": Call(call_ppo, [*_READ, "advantage", "value_target", "action_log_prob"]),
    "A2C": Call(call_a2c, [*_READ, "advantage", "value_target", "action_log_prob"]),
    "GAE": Call(call_gae, _READ),
    "R2D2Loss": Call(call_r2d2, [*_READ, "priority_weight"]),
    "EpsilonGreedy": Call(call_explore, ["action", "observation"]),
    "BurnIn": Call(lambda batch: BurnIn(network("actor", "x", 1), 2)(batch), _ACTOR),
    "RefreshStates": Call(lambda batch: RefreshStates(network("actor", "x", 1))(batch), _ACTOR),
    "Windows": Call(call_windows, _READ),
    "SequenceMinibatches": Call(call_minibatches, [*_READ, "advantage"]),
    "state_staleness": Call(call_staleness, _ACTOR),
    "check_recurrent_policy": Call(call_report, _READ),
    "set_next_is_init": Call(set_next_is_init, FLAGS),
    "set_segment_starts": Call(lambda batch: set_segment_starts(batch, ["is_init"]), FLAGS),
    "read_is_init": Call(lambda batch: read_is_init(batch, "is_init"), ["is_init"]),
    "read_mask": Call(read_mask, ["is_init"]),
    "zero_masked": Call(call_zero_masked, _READ),
    "find_sequence_problems": Call(call_problems, [*FLAGS, *STATES]),
}
