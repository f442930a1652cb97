"""Entry points that take a batch have a right result or an error in the package's own words."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.bad_batches import changes, find_fault, run
from tests.support.fuzzed_calls import CALLS, make_batch

# FUZZ_EXAMPLES=5000 draws more batches for every entry point, and new ones each time.
NUMBER = int(os.environ.get("FUZZ_EXAMPLES", "12"))
fuzz = settings(max_examples=NUMBER, derandomize="FUZZ_EXAMPLES" not in os.environ, deadline=None)


@pytest.mark.parametrize("name", CALLS)
@fuzz
@given(data=st.data())
def test_call_of_a_changed_batch_is_right_or_raises_by_name(name: str, data: st.DataObject) -> None:
    call = CALLS[name]
    made = data.draw(changes(call.keys))
    assert find_fault(call.run, make_batch, made) is None


@pytest.mark.parametrize("name", CALLS)
def test_call_of_a_batch_that_is_right_is_accepted(name: str) -> None:
    error, _ = run(CALLS[name].run, make_batch())
    assert error is None
