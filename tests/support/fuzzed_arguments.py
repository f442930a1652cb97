"""Constructors and functions, with values that one argument takes and does not take."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torchrl.data import Categorical, OneHot

import rnnkeys
from rnnkeys import GRUModule, StatefulPolicy, drqn_policy, recurrent_module, set_recurrent_mode
from rnnkeys.backends import linear_scan
from rnnkeys.collectors import EpsilonGreedy, epsilon_ladder
from rnnkeys.exploration import CorrelatedNoise, StateDependentNoise, StateDependentScale
from rnnkeys.objectives import R2D2Loss, SequenceMinibatches, value_rescale
from rnnkeys.sequences import sequence_mask
from rnnkeys.spaces import RunningNorm
from rnnkeys.transforms import BurnIn, PreviousActionReward, RefreshStates, Windows
from tests.support.bad_batches import ERRORS, Outcome, is_own, run

# Numbers that people have, and things that are none.
INTEGERS = [1, 2, np.int64(2), np.int32(1)]
FLOATS = [0.5, 1, np.float32(0.5), np.float64(0.25)]
NO_NUMBERS = [None, True, False, "2", "", [2], (), {}, float("nan"), torch.tensor(2), object(), 2j]
NO_INTEGERS = [*NO_NUMBERS, 2.0, 0.5, np.float64(2.0), -1, -(2**70)]
NO_SHARES = [*NO_NUMBERS, -0.5, 2.0, float("inf")]
HUGE = [2**31, 2**40, 10**30]
NO_KEYS = [3, None, 1.5, object(), ("a", 3), {}]
NO_NETWORKS = [3, "policy", [3], torch.nn.Linear(2, 2), object()]


def make_policy() -> Any:
    return drqn_policy(OneHot(2), (4,), hidden_size=3)


def make_gru(**arguments: Any) -> Any:
    keywords: Any = {"input_size": 4, "hidden_size": 3, "in_key": "x", "out_key": "y"} | arguments
    return GRUModule(**keywords)


def call_mode(mode: Any) -> None:
    with set_recurrent_mode(mode):
        pass


def make(kind: Any, first: Callable[[], Any], **keywords: Any) -> Any:
    return kind(first(), **keywords)


# Callable, argument, values that it takes, values that it does not take.
Argument = tuple[Callable[..., Any], str, list[Any], list[Any]]
loss = partial(make, R2D2Loss, make_policy)
player = partial(make, StatefulPolicy, make_policy)
explore = partial(EpsilonGreedy, **{"spec": OneHot(2), "epsilons": 0.5})
scan = partial(linear_scan, **dict.fromkeys("ab", torch.ones(2, 3, 4)))
actor = SimpleNamespace(build_dist_from_params=None)
FLAGS = torch.ones(2, 3, dtype=torch.bool)
META = torch.ones(2, 3, 4, device="meta")
cell = partial(recurrent_module, "gru", 4, in_key="x", out_key="y")
q_policy = partial(drqn_policy, OneHot(2), (4,))
ARGUMENTS: list[Argument] = [
    (loss, "burn_in", [0, *INTEGERS], [*NO_INTEGERS, *HUGE]),
    (loss, "n_steps", INTEGERS, [0, *NO_INTEGERS, *HUGE]),
    (loss, "gamma", [0, *FLOATS], NO_SHARES),
    (loss, "eta", [0, *FLOATS], NO_SHARES),
    (loss, "eps", [None, *FLOATS], [0, *NO_SHARES[1:-2]]),
    (loss, "loss_function", ["l2", "l1", "smooth_l1"], ["huber", None, 3]),
    (player, "num_envs", INTEGERS, [0, *NO_INTEGERS[1:], *HUGE]),
    (player, "autoreset", ["same_step", "next_step", "disabled", None], ["never", 3]),
    (player, "observation_key", ["observation", ("a", "b")], NO_KEYS),
    (player, "action_key", ["action", ("a", "b")], NO_KEYS),
    (player, "action_spec", [None, OneHot(2)], [3, "one-hot"]),
    (player, "exploration", [None], [3, "random"]),
    (StatefulPolicy, "policy", [make_policy()], [None, *NO_NETWORKS]),
    (Windows, "length", INTEGERS, [0, *NO_INTEGERS, *HUGE]),
    (partial(Windows, 3), "residual", ["drop", "last", "null", "repeat"], ["rest", None, 3]),
    (
        partial(Windows, 3, "overlap"),
        "period",
        INTEGERS,
        [0, 4, *NO_INTEGERS[1:], *HUGE],
    ),
    (partial(Windows, 3), "init_key", ["is_init", ("a", "b")], NO_KEYS),
    (partial(Windows, 3), "state_keys", ["h", ["h", "c"], None], [[3], [None]]),
    (partial(BurnIn, make_gru()), "burn_in", [0, *INTEGERS], [*NO_INTEGERS, *HUGE]),
    (partial(BurnIn, burn_in=2), "networks", [make_gru(), [make_gru()]], [None, [], *NO_NETWORKS]),
    (partial(RefreshStates, make_gru()), "chunk_size", INTEGERS, [0, *NO_INTEGERS, *HUGE]),
    (RefreshStates, "network", [make_gru()], [None, *NO_NETWORKS]),
    (SequenceMinibatches, "minibatch_steps", [None, *INTEGERS], [0, *NO_INTEGERS[1:], *HUGE]),
    (SequenceMinibatches, "seq_len", [None, *INTEGERS], [0, *NO_INTEGERS[1:], *HUGE]),
    (SequenceMinibatches, "epochs", INTEGERS, [0, *NO_INTEGERS, *HUGE]),
    (SequenceMinibatches, "networks", [None, make_gru(), [make_gru()]], [3, "policy", [3]]),
    (SequenceMinibatches, "init_key", ["is_init", ("a", "b")], NO_KEYS),
    (SequenceMinibatches, "advantage_key", ["advantage", ("a", "b")], NO_KEYS),
    (SequenceMinibatches, "generator", [None, torch.Generator()], [3, "random"]),
    *[
        (maker, size, INTEGERS, [0, *NO_INTEGERS, *HUGE])
        for maker in (make_gru, partial(make_gru, python_based=True))
        for size in ("input_size", "hidden_size", "num_layers")
    ],
    (cell, "hidden_size", INTEGERS, [0, *NO_INTEGERS, *HUGE]),
    (q_policy, "hidden_size", INTEGERS, [0, *NO_INTEGERS, *HUGE]),
    (partial(rnnkeys.GRUCell, 4), "hidden_size", INTEGERS, [0, *NO_INTEGERS, *HUGE]),
    (partial(rnnkeys.LSTMCell, hidden_size=4), "input_size", INTEGERS, [0, *NO_INTEGERS, *HUGE]),
    (partial(value_rescale, torch.ones(2)), "eps", FLOATS, [0, *NO_SHARES[:-2]]),
    (sequence_mask, "lengths", [torch.tensor([1, 2])], [None, 3, [1, 2], torch.tensor([1.5])]),
    (partial(sequence_mask, torch.tensor([1])), "max_len", [None, *INTEGERS], NO_INTEGERS[1:]),
    (partial(epsilon_ladder, base=0.5), "count", INTEGERS, [0, *NO_INTEGERS, *HUGE]),
    (partial(epsilon_ladder, 3), "base", [0, *FLOATS], NO_SHARES),
    (partial(epsilon_ladder, 3), "exponent", FLOATS, [*NO_NUMBERS, -1]),
    (explore, "epsilons", [0.5, 1, torch.ones(2)], [*NO_SHARES, -torch.ones(2)]),
    (explore, "first_visits", [0, 20, *FLOATS], [*NO_NUMBERS, -1]),
    (explore, "spec", [Categorical(3)], [None, 3, "one-hot"]),
    *[(explore, key, ["a", ("a", "b")], NO_KEYS) for key in ("action_key", "observation_key")],
    (explore, "action_mask_key", [None, "a"], [one for one in NO_KEYS if one is not None]),
    (PreviousActionReward, "action_key", ["action", ("a", "b")], NO_KEYS),
    (PreviousActionReward, "reward_key", [None, "reward", ("a", "b")], NO_KEYS[:1]),
    (RunningNorm, "shape", [(), (2,), [2, 3], torch.Size([2])], [None, 3, "2", (2.0,), (-1,)]),
    (RunningNorm, "limit", [1, 10.0, np.float32(5)], [*NO_NUMBERS, -1]),
    (partial(CorrelatedNoise, actor), "correlation", [0, *FLOATS], NO_SHARES),
    (
        partial(StateDependentNoise, actor, StateDependentScale(2, 2)),
        "sample_every",
        [None, *INTEGERS],
        [0, *NO_INTEGERS[1:], *HUGE],
    ),
    *[
        (scan, name, [torch.ones(2, 3, 4)], [3, "b", torch.ones(2, 3), torch.ones(2, 3, 5), META])
        for name in ("a", "b", "initial")
    ],
    (
        scan,
        "is_init",
        [None, FLAGS],
        [3, FLAGS.long(), FLAGS[:1], FLAGS[..., None], FLAGS.to("meta")],
    ),
    (call_mode, "mode", [True, False, None, "recurrent"], ["fast", 1, 0, 1.0, [True]]),
]


def try_wrong_argument(argument: Argument, value: Any) -> Outcome:
    """Call with a value that does not fit, and judge the outcome."""
    function, name, _, _ = argument
    error, _ = run(lambda one: function(**{name: one}), value)
    if error is None:
        return Outcome("result", f"{name}={value!r} is accepted")
    is_right = isinstance(error, ERRORS) and is_own(error)
    if is_right and (name in str(error) or "network" in str(error)):
        return Outcome("error")
    return Outcome("error", f"{name}={value!r}: {type(error).__name__}: {error}")
