"""Whether recurrent modules run one step (collection) or whole sequences (losses)."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, TypeVar, cast

from torch.compiler import is_compiling

from ._compat import context_decorator, recurrent_mode_state_manager

_Function = TypeVar("_Function", bound=Callable[..., Any])
_NAMES: dict[str, bool] = {"recurrent": True, "sequential": False}


def recurrent_mode() -> bool | None:
    """Return the mode in force: sequences (True), single steps (False), modules' default (None).

    It is TorchRL's own state, so both libraries' modules always agree.

    Examples:
        >>> with set_recurrent_mode("recurrent"):
        ...     recurrent_mode()
        True
    """
    return recurrent_mode_state_manager.get_mode()


def as_mode(mode: Any, argument: str) -> bool | None:
    """Return a mode by its value or name; raise ValueError, naming the argument, if it is none."""
    if isinstance(mode, str) and mode.lower() in _NAMES:
        mode = _NAMES[mode.lower()]
    if mode is None or isinstance(mode, bool):
        return mode
    raise ValueError(
        f"Unsupported recurrent mode {argument}={mode!r}: expected True or 'recurrent' (whole "
        "sequences), False or 'sequential' (single steps), or None (each module's default)."
    )


class set_recurrent_mode:
    """Context manager and decorator that sets the mode of every recurrent module inside.

    Re-entrant (one instance may be entered many times), exception-safe, and local to the thread in
    eager mode. Under ``torch.compile`` the mode is read from a value of the whole process, as in
    TorchRL: compile and call from one thread at a time. TorchRL's modules see the mode too, and
        TorchRL's losses set it for these modules.

    Args:
        mode: True or ``"recurrent"`` (a call runs whole sequences, time is the last batch
            dimension), False or ``"sequential"`` (a call is one step), None (each module's
            ``default_recurrent_mode``).

    Raises:
        ValueError: if ``mode`` is anything else.

    Examples:
        >>> @set_recurrent_mode(True)
        ... def loss():
        ...     return recurrent_mode()
        >>> loss(), recurrent_mode()
        (True, None)
    """

    def __init__(self, mode: bool | Literal["recurrent", "sequential"] | None = True) -> None:
        self.mode = as_mode(mode, "mode")
        self._previous: dict[int, list[bool | None]] = {}

    def clone(self) -> set_recurrent_mode:
        """Return a fresh instance with the same mode."""
        return type(self)(self.mode)

    def __call__(self, function: _Function) -> _Function:
        """Decorate a function (generators and coroutines included: the mode holds as they run).

        Raises:
            TypeError: if it is an asynchronous generator.
        """
        if inspect.isasyncgenfunction(function):
            raise TypeError(
                f"set_recurrent_mode cannot decorate {function.__name__}, an asynchronous "
                "generator: write 'with set_recurrent_mode(...):' inside it."
            )
        if inspect.iscoroutinefunction(function):
            return cast(_Function, self._around(function))
        return cast(_Function, context_decorator(self.clone, function))

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def inside(*args: Any, **kwargs: Any) -> Any:
            with self.clone():
                return await function(*args, **kwargs)

        return inside

    def __enter__(self) -> None:
        """Set the mode and remember the one before, for this thread."""
        self._previous.setdefault(_thread(), []).append(recurrent_mode())
        recurrent_mode_state_manager.set_mode(self.mode)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Restore the mode that was in force at the matching entry."""
        thread = _thread()
        stack = self._previous[thread]
        recurrent_mode_state_manager.set_mode(stack.pop())
        if not stack:
            del self._previous[thread]


def _thread() -> int:
    # Dynamo cannot trace thread identities; compiled code reads a process-wide mode anyway.
    return 0 if is_compiling() else threading.get_ident()
