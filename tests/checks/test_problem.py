"""Problems, numbers passed as arguments, and the switch of checks that read values."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from rnnkeys.checks import (
    Problem,
    as_float,
    as_int,
    can_read_values,
    raise_first,
    set_value_checks,
    should_read_values,
    suspend_value_checks,
    value_checks_enabled,
)

WARNING = Problem("odd", "This is odd.", "Look at it.", UserWarning)
ERROR = Problem("bad", "This is bad.", "Change it.", KeyError)


def test_raise_first_warns_before_the_error_and_computes_nothing_after_it() -> None:
    def find() -> Iterator[Problem]:
        yield WARNING
        yield ERROR
        raise AssertionError("computed after the first error")

    with (
        pytest.warns(UserWarning, match=r"This is odd. Look at it. \[odd\]") as warned,
        pytest.raises(KeyError, match=r"This is bad. Change it. \[bad\]"),
    ):
        raise_first(find())
    assert warned[0].filename == __file__


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None])
def test_as_int_with_another_value_raises(value: Any) -> None:
    with pytest.raises(ValueError, match=r"n_steps must be an int of at least 1. Got n_steps="):
        as_int("n_steps", value)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "1", None, 1j])
def test_as_float_with_another_value_raises(value: Any) -> None:
    with pytest.raises(ValueError, match=r"gamma must be a number from 0.0 to 1.0. Got gamma="):
        as_float("gamma", value)


def test_as_number_converts_numpy() -> None:
    assert type(as_int("n", np.int32(3))) is int and type(as_float("x", np.float32(0.5))) is float


def test_set_value_checks_as_a_context_restores_the_setting() -> None:
    with set_value_checks(False):
        with set_value_checks(True):
            assert value_checks_enabled()
        assert not value_checks_enabled() and not can_read_values(torch.zeros(1))
    assert can_read_values(torch.zeros(1)) and not can_read_values(None)
    wrong: Any = 0
    with pytest.raises(TypeError, match="expects True or False. Got 0"):
        set_value_checks(wrong)


def test_suspend_value_checks_acts_in_its_thread_only() -> None:
    seen = []
    with suspend_value_checks():
        thread = threading.Thread(target=lambda: seen.append(value_checks_enabled()))
        thread.start()
        thread.join()
        assert seen == [True] and not value_checks_enabled()
    assert value_checks_enabled()


def test_can_read_values_inside_a_transform_is_false() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(can_read_values(x))
        return x

    torch.func.vmap(look)(torch.zeros(2))
    assert seen == [False]


def test_should_read_values_on_the_cpu_always_and_elsewhere_only_where_there_are_some() -> None:
    entry, empty = torch.zeros(2), torch.zeros(2, device="meta")
    assert should_read_values(entry, True) and should_read_values(None, True)
    assert not should_read_values(empty, False)
    with set_value_checks(False):
        assert not should_read_values(entry, False)
