"""Entry points that take a batch have a right result or an error in the package's own words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.bad_batches import changes, run, try_call
from tests.support.fuzzed_calls import CALLS, make_batch


# `make fuzz` draws thousands.
@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=30)
@given(data=st.data())
def test_call_of_a_changed_batch_is_right_or_raises_by_name(name: str, data: st.DataObject) -> None:
    call = CALLS[name]
    made = data.draw(changes(tuple(call.keys)))
    assert try_call(call.run, make_batch, made).fault is None


@pytest.mark.parametrize("name", CALLS)
def test_call_of_a_batch_that_is_right_is_accepted(name: str) -> None:
    error, _ = run(CALLS[name].run, make_batch())
    assert error is None
