"""Whether recurrent modules run one time step (collection) or whole sequences (losses)."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, cast

from torch.compiler import is_compiling

from ._compat import context_decorator, recurrent_mode_state_manager

_Function = TypeVar("_Function", bound=Callable[..., Any])
_NAMES: dict[str, bool] = {"recurrent": True, "sequential": False}

# The contexts that were entered and not left yet, each with the mode before it, outermost first.
# A context variable has a value of its own in every thread and asyncio task.
_Entered = tuple[tuple["set_recurrent_mode", "bool | None"], ...]
_entered: ContextVar[_Entered] = ContextVar("rnnkeys_entered", default=())


def recurrent_mode() -> bool | None:
    """Return the mode in force.

    It is TorchRL's own state, so the modules of both libraries always agree.

    Returns:
        True for sequences, False for single steps, None for each module's default.

    Examples:
        >>> with set_recurrent_mode("recurrent"):
        ...     recurrent_mode()
        True
    """
    return recurrent_mode_state_manager.get_mode()


def as_mode(mode: Any, argument: str) -> bool | None:
    """Return a mode given by its value or its name.

    Args:
        mode: True, False, None, ``"recurrent"`` or ``"sequential"``.
        argument: name of the argument, for the message.

    Raises:
        ValueError: if it is anything else.
    """
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

    One instance may be entered many times. The previous mode is restored when the block ends, also
    by an exception. In eager mode each thread and each asyncio task has a mode of its own. Under
    ``torch.compile`` the mode is one value of the whole process, as in TorchRL: compile and call
    from one thread at a time. TorchRL's modules read the same mode, and TorchRL's losses set it.

    It has to be entered: ``set_recurrent_mode(True)`` as a statement sets nothing, and warns.

    Args:
        mode: True or ``"recurrent"`` (a call runs whole sequences, time is the last batch
            dimension), False or ``"sequential"`` (a call is one time step), None (each module's
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

    # The value of an instance whose constructor raises.
    _is_used = True

    def __init__(self, mode: bool | Literal["recurrent", "sequential"] | None = True) -> None:
        self.mode = as_mode(mode, "mode")
        # Compiled code cannot read a context variable.
        self._previous: list[bool | None] = []
        self._is_used = is_compiling()

    def clone(self) -> set_recurrent_mode:
        """Return a new instance with the same mode."""
        self._is_used = True
        return type(self)(self.mode)

    def __reduce__(self) -> tuple[type[set_recurrent_mode], tuple[bool | None]]:
        self._is_used = True
        return type(self), (self.mode,)

    def __del__(self) -> None:
        if not self._is_used and not sys.is_finalizing():
            warnings.warn(
                f"set_recurrent_mode({self.mode}) was never entered, so it set nothing. Write "
                f"'with set_recurrent_mode({self.mode}):' around the calls, or decorate a "
                "function with it.",
                stacklevel=2,
            )

    def __call__(self, function: _Function) -> _Function:
        """Decorate a function; of generators and coroutines, each run of their code.

        Raises:
            TypeError: if it is an asynchronous generator.
        """
        self._is_used = True
        if inspect.isasyncgenfunction(function):
            raise TypeError(
                f"set_recurrent_mode cannot decorate {function.__name__}, an asynchronous "
                "generator: write 'with set_recurrent_mode(...):' inside it."
            )
        if inspect.iscoroutinefunction(function):
            return cast(_Function, self._decorate_coroutine(function))
        return cast(_Function, context_decorator(self.clone, function))

    def _decorate_coroutine(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def inside(*args: Any, **kwargs: Any) -> Any:
            with self.clone():
                return await function(*args, **kwargs)

        return inside

    def __enter__(self) -> None:
        """Set the mode and keep the one before."""
        if is_compiling():
            self._previous.append(recurrent_mode())
        else:
            self._is_used = True
            _entered.set((*_entered.get(), (self, recurrent_mode())))
        recurrent_mode_state_manager.set_mode(self.mode)

    def __exit__(self, *exc_info: object) -> None:
        """Restore the mode that was in force at the matching entry.

        Raises:
            RuntimeError: if the block was entered in another thread or asyncio task.
        """
        previous = self._previous.pop() if is_compiling() else self._forget_entry()
        recurrent_mode_state_manager.set_mode(previous)

    def _forget_entry(self) -> bool | None:
        """Remove the last entry of this instance, and return the mode before it."""
        entered = _entered.get()
        for i in reversed(range(len(entered))):
            context, previous = entered[i]
            if context is self:
                _entered.set((*entered[:i], *entered[i + 1 :]))
                return previous
        raise RuntimeError(
            f"set_recurrent_mode({self.mode}) is left here and was not entered in this thread or "
            "asyncio task, which has a mode of its own. Enter and leave it in the same one: write "
            "'with set_recurrent_mode(...):' inside the function that the thread runs."
        )
