"""One switch for the checks that read the values of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from .._compat import FakeTensor, has_data, in_transform

_enabled = True
_suspended: ContextVar[bool] = ContextVar("_suspended", default=False)


class set_value_checks:
    """Switch the checks that read values on or off, in the whole process.

    Checks of keys, dtypes and shapes cost nothing that can be measured and always run. Checks of
    values (continuity of time, stored states, masks without a step, NaN) compare tensors. They run
    on tensors in CPU memory at every call, and on other devices at the first call of a loss, where
    they wait for the device. ``docs/what_is_checked.md`` lists them and what they cost.

    Like ``torch.set_grad_enabled``, it acts as a function, and as a context manager that restores
    the previous setting.

    Args:
        mode: whether the checks run.

    Examples:
        >>> with set_value_checks(False):
        ...     value_checks_enabled()
        False
        >>> value_checks_enabled()
        True
    """

    def __init__(self, mode: bool) -> None:
        global _enabled
        if not isinstance(mode, bool):
            raise TypeError(f"set_value_checks expects True or False. Got {mode!r}.")
        self._previous = _enabled
        self.mode = mode
        _enabled = mode

    def __enter__(self) -> None:
        global _enabled
        _enabled = self.mode

    def __exit__(self, *exc_info: object) -> None:
        global _enabled
        _enabled = self._previous


def value_checks_enabled() -> bool:
    """Return whether the checks that read values are switched on."""
    return _enabled and not _suspended.get()


@contextmanager
def suspend_value_checks() -> Iterator[None]:
    """Switch the checks that read values off in this thread: an outer call has run them.

    Examples:
        >>> with suspend_value_checks():
        ...     value_checks_enabled()
        False
    """
    token = _suspended.set(True)
    try:
        yield
    finally:
        _suspended.reset(token)


def can_read_values(tensor: Tensor | None) -> bool:
    """Return whether a check may read the values of a tensor: eager mode, CPU memory, real data.

    Examples:
        >>> import torch
        >>> can_read_values(torch.zeros(2)), can_read_values(torch.zeros(2, device="meta"))
        (True, False)
    """
    if tensor is None or is_compiling() or in_transform() or not value_checks_enabled():
        return False
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)


def should_read_values(entry: Any, has_read: bool) -> bool:
    """Return whether a loss checks values: in CPU memory always, elsewhere at its first call.

    Args:
        entry: an entry of the batch, whose device counts; it may be anything.
        has_read: whether an earlier call has checked values.
    """
    if is_compiling() or not value_checks_enabled():
        return False
    if not isinstance(entry, Tensor):
        return True
    return entry.device.type == "cpu" or has_data(entry) and not has_read
