"""Batches that are wrong, or only unusual, on purpose; and what a call may make of them.

A call on such a batch has a right result, or raises an error in the package's own words that names
what was changed. The batch is afterwards what it was before, bit by bit.
"""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from tensordict import NonTensorData, TensorDict, TensorDictBase
from torch import Tensor

MASK = ("collector", "mask")
ERRORS = (ValueError, TypeError, KeyError, RuntimeError)
_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
)


@dataclass(frozen=True)
class Change:
    """One change of a batch.

    Attributes:
        text: what it does, for the report of a failure.
        apply: takes a batch and returns the changed one; it may change the batch.
        key: key of the entry that it changes; None for the batch as a whole.
        is_harmless: whether the result of a call must stay the same.
    """

    text: str
    apply: Callable[[Any], Any]
    key: Any = None
    is_harmless: bool = False

    def __repr__(self) -> str:
        return self.text


@cache
def changes(keys: tuple[Any, ...]) -> st.SearchStrategy[list[Change]]:
    """Return a strategy of one or two changes of batches that have entries at ``keys``."""
    one = st.one_of(_changes_of_entries(list(keys)), _changes_of_batches())
    return st.lists(one, min_size=1, max_size=2)


def _changes_of_entries(keys: list[Any]) -> st.SearchStrategy[Change]:
    key = st.sampled_from(keys)
    place = st.integers(0, 2**16)
    number = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e38])
    return st.one_of(
        key.map(lambda k: Change(f"without {k!r}", lambda b: b.exclude(k), k)),
        key.map(lambda k: Change(f"{k!r} nested", lambda b: _nest(b, k), k)),
        key.map(lambda k: _set(k, "without its last dimension", lambda v: v[..., 0])),
        key.map(lambda k: _set(k, "with one more dimension", lambda v: v.unsqueeze(-1))),
        key.map(lambda k: _set(k, "twice as wide", lambda v: torch.cat([v, v], -1))),
        st.tuples(key, st.sampled_from(_DTYPES)).map(lambda c: _cast(*c)),
        key.map(lambda k: _set(k, "on the meta device", lambda v: v.to("meta"))),
        key.map(lambda k: Change(f"{k!r} a text", lambda b: b.set(k, NonTensorData("x")), k)),
        st.tuples(key, place, number).map(lambda c: _spoil(*c)),
        key.map(lambda k: _set(k, "expanded", lambda v: v[:1].expand_as(v))),
        key.map(lambda k: _set(k, "all the largest number", _largest)),
        key.map(lambda k: _set(k, "all zero", torch.zeros_like)),
        key.map(
            lambda k: _set(
                k,
                "with other strides",
                lambda v: v.transpose(0, 1).contiguous().transpose(0, 1) if v.ndim > 1 else v,
                is_harmless=True,
            )
        ),
    )


def _changes_of_batches() -> st.SearchStrategy[Change]:
    mask = st.sampled_from(["all", "none", "some", "wide", "integers", "floats", "flat", "agents"])
    return st.one_of(
        st.sampled_from(
            [
                Change("no row", lambda b: b.contiguous()[:0]),
                Change("no step", lambda b: b.contiguous()[:, :0]),
                Change("one step", lambda b: b[:, :1]),
                Change("flat", lambda b: b.reshape(-1)),
                Change("without a batch dimension", lambda b: b[0, 0]),
                Change("one more batch dimension", lambda b: b.unsqueeze(0)),
                Change("not a TensorDict", lambda b: None),
                Change("a dict", lambda b: b.to_dict()),
                Change("empty", lambda b: TensorDict({}, b.batch_size)),
                Change("on the meta device", lambda b: b.to("meta")),
                Change("rows stacked lazily", _stack_lazily, is_harmless=True),
                Change(
                    "another entry", lambda b: b.set("other", torch.zeros(b.shape)), "other", True
                ),
                Change("a text", lambda b: b.set("note", NonTensorData("x")), "note", True),
                Change("time first", lambda b: b.transpose(0, 1)),
                Change("steps in reverse", lambda b: b[..., torch.arange(b.shape[-1]).flip(0)]),
            ]
        ),
        mask.map(lambda kind: Change(f"a mask: {kind}", lambda b: _set_mask(b, kind), MASK)),
    )


def _set(
    key: Any, text: str, change: Callable[[Tensor], Tensor], is_harmless: bool = False
) -> Change:
    def apply(batch: Any) -> Any:
        value = batch.get(key, None)
        if not isinstance(value, Tensor):
            return batch
        return batch.set(key, change(value))

    return Change(f"{key!r} {text}", apply, key, is_harmless)


def _cast(key: Any, dtype: torch.dtype) -> Change:
    return _set(key, f"of {dtype}", lambda value: value.to(dtype))


def _spoil(key: Any, place: int, number: float) -> Change:
    def change(value: Tensor) -> Tensor:
        if not value.is_floating_point() or not value.numel():
            return value
        flat = value.flatten().clone()
        flat[place % len(flat)] = number
        return flat.reshape(value.shape)

    return _set(key, f"with {number} at {place}", change)


def _largest(value: Tensor) -> Tensor:
    if value.dtype == torch.bool:
        return torch.ones_like(value)
    if value.is_complex():
        return value
    info = torch.finfo(value.dtype) if value.is_floating_point() else torch.iinfo(value.dtype)
    return torch.full_like(value, info.max)


def _nest(batch: Any, key: Any) -> Any:
    value = batch.get(key, None)
    if value is None:
        return batch
    name = key if isinstance(key, str) else key[-1]
    return batch.exclude(key).set(("deep", name), value)


def _set_mask(batch: Any, kind: str) -> Any:
    shape = batch.batch_size
    valid = torch.ones(shape, dtype=torch.bool)
    if kind in ("some", "wide") and batch.ndim:
        valid[..., shape[-1] // 2 :] = False
    made = {
        "none": ~valid,
        "wide": valid.unsqueeze(-1),
        "integers": valid.long(),
        "floats": valid.float(),
        "flat": valid.flatten().unsqueeze(0).expand(*shape[:1], valid.numel())
        if batch.ndim
        else valid,
        "agents": valid.unsqueeze(-1).expand(*shape, 2),
    }
    return batch.set(MASK, made.get(kind, valid))


def _stack_lazily(batch: Any) -> Any:
    # An empty lazy stack can do nothing in tensordict itself.
    return TensorDict.lazy_stack(list(batch.unbind(0))) if batch.batch_size.numel() else batch


class Outcome(NamedTuple):
    """What a call makes of a changed batch.

    Attributes:
        kind: ``"result"``, ``"error"``, or ``"none"`` where the changes contradict each other, so
            that there is no batch.
        fault: what is wrong with that; None if nothing is.
    """

    kind: str
    fault: str | None = None


def seed(number: int) -> None:
    """Seed the numbers of the CPU; ``torch.manual_seed`` takes milliseconds for other devices."""
    torch.default_generator.manual_seed(number)


def try_call(call: Callable[[Any], Any], make: Callable[[], Any], made: list[Change]) -> Outcome:
    """Call with a changed batch and judge the outcome.

    Args:
        call: what is tested; it takes a batch and returns tensors or TensorDicts.
        make: makes the batch, the same each time.
        made: the changes.
    """
    try:
        batch = _apply(make(), made)
    except Exception:  # the changes contradict each other
        return Outcome("none")
    is_batch = isinstance(batch, TensorDictBase)
    before = _snapshot(batch) if is_batch else None
    seed(0)
    error, result = run(call, batch)
    if error is None:
        is_compared = is_batch or batch is None
        fault = _fault_of_result(call, make, made, result) if is_compared else None
        return Outcome("result", fault)
    if before is not None and not _equal(_snapshot(batch), before):
        return Outcome("error", f"the batch is changed although it was rejected: {error}")
    return Outcome("error", _fault_of_error(error, made))


def _apply(batch: Any, made: list[Change]) -> Any:
    for change in made:
        batch = change.apply(batch)
    return batch


def run(call: Callable[[Any], Any], batch: Any) -> tuple[Exception | None, Any]:
    """Return the error that a call raises, or None, and its result. Warnings are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return None, call(batch)
        except Exception as error:
            return error, None


def _fault_of_error(error: Exception, made: list[Change]) -> str | None:
    message = str(error)
    if not isinstance(error, ERRORS):
        return f"a {type(error).__name__}: {message}"
    if not is_own(error):
        return f"an error in other words: {type(error).__name__}: {message}"
    names = [_last(change.key) for change in made if change.key is not None]
    # A change of the whole batch shows in its size.
    whole = ["batch", "TensorDict", "[*, T]", "windows", "is_init", "must be a tensor", "overflow"]
    if not any(name in message for name in names + whole):
        return f"an error that names neither {names} nor the batch: {message}"
    return None


def is_own(error: BaseException) -> bool:
    """Return whether a ``raise`` statement of the package raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("rnnkeys."):
        return False
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
    return line.strip().startswith("raise")


def _last(key: Any) -> str:
    return key if isinstance(key, str) else key[-1]


def _fault_of_result(
    call: Callable[[Any], Any], make: Callable[[], Any], made: list[Change], result: Any
) -> str | None:
    """Compare with the result for the same numbers in plain memory, and of the batch as it was."""
    seed(0)
    plain = _apply(make(), made)
    if plain is not None:
        plain = _as_plain(plain)
    error, expected = run(call, plain)
    if error is not None:
        return f"accepted, and the same numbers in plain memory are not: {error}"
    if not _close(_entries(result), _entries(expected)):
        return "the result differs from that of the same numbers in plain memory"
    if all(change.is_harmless for change in made):
        seed(0)
        _, unchanged = run(call, make())
        if not _close(_entries(result), _entries(unchanged)):
            return "the result differs although nothing that counts has changed"
    if _is_finite(make(), made) and not _all_finite(_entries(result)):
        return "the result is not finite although the batch is"
    return None


def _as_plain(batch: TensorDictBase) -> TensorDictBase:
    def copy(value: Any) -> Any:
        return value.clone(memory_format=torch.contiguous_format)

    return batch.contiguous().apply(copy) if batch.device != torch.device("meta") else batch  # pyright: ignore[reportReturnType]


def _is_finite(batch: Any, made: list[Change]) -> bool:
    batch = _apply(batch, made)
    # The square of a larger number, an integer too, is nearly float32's largest.
    return batch is not None and _all_finite(_entries(batch), limit=1e15)


def _entries(result: Any) -> dict[Any, Any]:
    """Return the tensors of a result by name."""
    if isinstance(result, TensorDictBase):
        items = result.items(True, True)
        return {key: value for key, value in items if isinstance(value, Tensor)}
    if isinstance(result, Tensor):
        return {"": result}
    if isinstance(result, (list, tuple)):
        parts = enumerate(map(_entries, result))
        return {(i, key): value for i, part in parts for key, value in part.items()}
    return {}


def _snapshot(batch: TensorDictBase) -> dict[Any, Any]:
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in batch.items(True, True)
    }


def _equal(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return one is other or bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one.is_meta or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _close(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Return whether all entries of ``other`` are in ``one``, but for rounding."""
    return all(key in one and _near(one[key], value) for key, value in other.items())


def _near(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one.is_meta or torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def _all_finite(entries: dict[Any, Any], limit: float = float("inf")) -> bool:
    return all(
        bool(value.isfinite().all()) and bool((_magnitude(value) < limit).all())
        for value in entries.values()
        if value.dtype != torch.bool and not value.is_meta
    )


def _magnitude(value: Tensor) -> Tensor:
    # The least int64 has no abs() of its own dtype.
    return value.abs() if value.is_complex() else value.double().abs()
