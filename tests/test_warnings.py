"""Warnings name the line of the program that caused them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from torchrl.envs import GymEnv, TransformedEnv

from rnnkeys import get_env_transforms_from_module, get_primers_from_module, set_recurrent_mode
from rnnkeys.checks import Problem, raise_first
from rnnkeys.transforms import Windows
from tests.support.r2d2 import MASK, make_loss, make_network, make_windows
from tests.support.recurrent import batch, chain, make
from tests.support.windows import episode


def make_hooked() -> Any:
    module = make("gru")
    module.layers.register_forward_hook(lambda *_: None)
    return module


def make_unready() -> Any:
    module: Any = nn.Linear(2, 2)
    module.make_tensordict_primer = lambda: 1 / 0
    return module


def make_env() -> Any:
    wrap: Any = TransformedEnv
    return wrap(GymEnv("CartPole-v1"), get_env_transforms_from_module(make("gru")))


def forget_modes() -> None:
    for _ in range(2):
        set_recurrent_mode(True)


def drop_all() -> Any:
    transform = Windows(8, "drop")
    for _ in range(10):
        transform(episode(5))


def learn_nothing() -> Any:
    windows = make_windows()
    windows[MASK][:, 4:] = False
    return make_loss(make_network(0), make_network(1))(windows)


CAUSES: dict[str, Callable[[], Any]] = {
    "hook on the layers": lambda: make_hooked()(batch(make("gru"))),
    "lost state": lambda: make("gru")(batch(make("gru"), states=False)),
    "no primer": lambda: get_primers_from_module(nn.Linear(2, 2)),
    "no primer for a module": lambda: get_primers_from_module(make_unready(), strict=False),
    "one state of two modules": lambda: get_primers_from_module(chain(make("gru"), make("gru"))),
    "environment in recurrent mode": lambda: set_recurrent_mode(True)(make_env().reset)(),
    "mode without with": forget_modes,
    "no whole window": drop_all,
    "no step after the burn-in": learn_nothing,
    "problem": lambda: raise_first([Problem("mode", "It is off.", "Set it.", UserWarning)]),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_warning_names_the_line_that_caused_it(cause: str) -> None:
    function = CAUSES[cause]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    assert caught
    lines = {line for _, _, line in function.__code__.co_lines()}
    for one in caught:
        assert (one.filename, one.lineno in lines) == (__file__, True), str(one.message)
