"""The mode: a context manager and decorator whose state is TorchRL's own."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
import torchrl.modules
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import QValueModule
from torchrl.objectives import DQNLoss
from torchrl.objectives.common import LossModule

from rnnkeys import recurrent_mode, set_recurrent_mode
from tests.support.recurrent import KINDS, THEIRS, batch, chain, make, make_theirs

in_both_kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _leaves_no_mode() -> Iterator[None]:
    assert recurrent_mode() is None
    yield
    assert recurrent_mode() is None


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        (True, True),
        (False, False),
        (None, None),
        ("recurrent", True),
        ("sequential", False),
        ("Recurrent", True),
    ],
)
def test_set_recurrent_mode_with_value_or_name_sets_that_mode(given, mode):
    with set_recurrent_mode(not mode), set_recurrent_mode(given):
        assert recurrent_mode() is mode
        assert torchrl.modules.recurrent_mode() is mode


def test_set_recurrent_mode_without_argument_sets_recurrent_mode():
    with set_recurrent_mode():
        assert recurrent_mode() is True


@pytest.mark.parametrize("given", ["parallel", "", 1, 0.0, [True]])
def test_set_recurrent_mode_with_another_value_is_rejected(given):
    with pytest.raises(ValueError) as error:
        set_recurrent_mode(given)
    assert repr(given) in str(error.value)
    for accepted in ("True", "'recurrent'", "False", "'sequential'", "None"):
        assert accepted in str(error.value)


def test_nested_contexts_restore_each_previous_mode():
    with set_recurrent_mode(True):
        with set_recurrent_mode(False):
            with set_recurrent_mode("recurrent"):
                assert recurrent_mode() is True
            assert recurrent_mode() is False
            with set_recurrent_mode(None):
                assert recurrent_mode() is None
            assert recurrent_mode() is False
        assert recurrent_mode() is True


def test_instance_entered_inside_itself_restores_each_previous_mode():
    context = set_recurrent_mode(True)
    with context, set_recurrent_mode(False):
        with context:
            with context:
                assert recurrent_mode() is True
            assert recurrent_mode() is True
        assert recurrent_mode() is False
    assert recurrent_mode() is None
    with context:
        assert recurrent_mode() is True


def test_context_left_by_an_exception_restores_the_mode():
    context = set_recurrent_mode(True)
    with set_recurrent_mode(False):
        for _ in range(2):
            with pytest.raises(KeyError), context, context:
                raise KeyError
            assert recurrent_mode() is False


def test_decorated_functions_run_in_the_mode():
    @set_recurrent_mode(True)
    def count(n: int) -> list[bool | None]:
        """Docstring."""
        if not n:
            return [recurrent_mode()]
        with set_recurrent_mode(False):
            return [recurrent_mode(), *count(n - 1)]

    assert count(2) == [False, False, True]
    assert count.__doc__ == "Docstring."

    class Agent:
        @set_recurrent_mode("recurrent")
        def loss(self) -> bool | None:
            return recurrent_mode()

    assert Agent().loss() is True


def test_decorated_generator_has_the_mode_only_while_it_runs():
    @set_recurrent_mode(True)
    def generate() -> Iterator[bool | None]:
        yield recurrent_mode()
        yield recurrent_mode()

    generator = generate()
    assert next(generator) is True
    assert recurrent_mode() is None
    with set_recurrent_mode(False):
        assert next(generator) is True
        assert recurrent_mode() is False


def _in_thread(function: Callable[[], object]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_mode_of_one_thread_is_not_that_of_another():
    seen: list[bool | None] = []

    def other() -> None:
        seen.append(recurrent_mode())
        with set_recurrent_mode(False):
            seen.append(recurrent_mode())

    with set_recurrent_mode(True):
        _in_thread(other)
        assert recurrent_mode() is True
    assert seen == [None, False]


def test_instance_in_two_threads_at_once_keeps_their_modes_apart():
    context = set_recurrent_mode(True)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with set_recurrent_mode(None), context:
            inside.set()
            assert leave.wait(10)
            assert recurrent_mode() is True
        assert recurrent_mode() is None

    thread_errors: list[BaseException] = []

    def guarded() -> None:
        try:
            other()
        except BaseException as error:
            thread_errors.append(error)

    thread = threading.Thread(target=guarded)
    with set_recurrent_mode(False), context:
        thread.start()
        assert inside.wait(10)
    # This thread has left while the other one is still inside.
    assert recurrent_mode() is None
    leave.set()
    thread.join()
    assert not thread_errors


def test_copied_or_pickled_instance_sets_the_same_mode():
    context = set_recurrent_mode(True)
    for duplicate in (copy.deepcopy(context), pickle.loads(pickle.dumps(context)), context.clone()):
        with duplicate:
            assert recurrent_mode() is True


def test_contexts_of_both_libraries_set_one_mode():
    ours, theirs = make("lstm"), make_theirs("lstm")
    for context in (set_recurrent_mode, torchrl.modules.set_recurrent_mode):
        for mode in (True, False):
            with context(mode):
                assert ours.recurrent_mode is theirs.recurrent_mode is mode
                assert recurrent_mode() is torchrl.modules.recurrent_mode() is mode
    with torchrl.modules.set_recurrent_mode(True), set_recurrent_mode(False):
        with torchrl.modules.set_recurrent_mode(True), set_recurrent_mode(None):
            assert torchrl.modules.recurrent_mode() is None
        assert torchrl.modules.recurrent_mode() is False


@in_both_kinds
@pytest.mark.parametrize("library", [KINDS, THEIRS], ids=["ours", "theirs"])
def test_context_switches_modules_of_both_libraries(kind, library):
    sizes = {"input_size": 3, "hidden_size": 5, "in_key": "observation", "out_key": "embed"}
    module = library[kind](**sizes)
    data = batch(make(kind))
    with set_recurrent_mode(True):
        sequences = module(data.clone())["embed"]
    with set_recurrent_mode(False):
        steps = module(data.clone())["embed"]
    inside = ~data["is_init"][:, 0, 0]
    torch.testing.assert_close(sequences[inside, 0], steps[inside, 0])
    assert not torch.isclose(sequences[:, 1:], steps[:, 1:]).all()


@in_both_kinds
@pytest.mark.parametrize("default", [True, False, None])
def test_default_mode_of_a_module_holds_where_no_mode_is_set(kind, default):
    module = make(kind, default_recurrent_mode=default)
    assert module.recurrent_mode is bool(default)
    data = batch(module)
    with set_recurrent_mode(bool(default)):
        expected = module(data.clone())["embed"]
    assert torch.equal(module(data.clone())["embed"], expected)
    with set_recurrent_mode(not default):
        assert module.recurrent_mode is not bool(default)
        assert not torch.isclose(module(data.clone())["embed"], expected).all()
        with set_recurrent_mode(None):
            assert torch.equal(module(data.clone())["embed"], expected)


class _Probe(nn.Module):
    """Writes the mode in force beside what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool | None] = []

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.seen.append(recurrent_mode())
        return values


def test_torchrl_loss_runs_modules_in_recurrent_mode():
    module = make("gru")
    probe = _Probe()
    head = TensorDictModule(nn.Sequential(nn.Linear(5, 2), probe), ["embed"], ["action_value"])
    policy = chain(module, head, QValueModule(action_space="categorical"))
    loss = DQNLoss(policy, action_space="categorical", delay_value=False)
    data = batch(module)
    done = torch.zeros(2, 7, 1, dtype=torch.bool)
    after = {"observation": torch.randn(2, 7, 3), "reward": torch.randn(2, 7, 1)}
    after |= {"done": done, "terminated": done.clone(), "is_init": data["is_init"].clone()}
    for key in module.state_keys:
        after[key] = data[key].clone()
    data["next"] = TensorDict(after, batch_size=[2, 7])
    data["action"] = torch.zeros(2, 7, dtype=torch.long)
    loss(data)["loss"].backward()
    assert len(probe.seen) == 2, "the root and the next tensordict"
    assert all(probe.seen)
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())
    assert recurrent_mode() is None


def test_loss_module_of_a_user_runs_in_recurrent_mode():
    class Loss(LossModule):
        def forward(self, tensordict: TensorDict) -> TensorDict:
            return TensorDict(mode=torch.tensor(recurrent_mode() is True))

    assert Loss()(TensorDict())["mode"]
    assert recurrent_mode() is None


def test_decorated_coroutine_runs_in_the_mode():
    @set_recurrent_mode(True)
    async def inside() -> bool | None:
        await asyncio.sleep(0)
        return recurrent_mode()

    async def beside() -> bool | None:
        await asyncio.sleep(0)
        return recurrent_mode()

    async def both() -> Any:
        return await asyncio.gather(inside(), beside())

    assert list(asyncio.run(both())) == [True, None]


def test_decorated_asynchronous_generator_is_rejected():
    async def steps() -> AsyncIterator[int]:
        yield 0

    with pytest.raises(TypeError, match="steps, an asynchronous generator.*inside it"):
        set_recurrent_mode(True)(steps)


def test_instance_entered_by_two_tasks_keeps_their_modes_apart():
    context = set_recurrent_mode(True)

    async def task(outer: bool | None, turns: int) -> list[bool | None]:
        seen = []
        with set_recurrent_mode(outer):
            for _ in range(turns):
                with context:
                    await asyncio.sleep(0)
                    seen.append(recurrent_mode())
                    with set_recurrent_mode(False):
                        await asyncio.sleep(0)
                await asyncio.sleep(0)
                seen.append(recurrent_mode())
        return seen

    async def both() -> Any:
        return await asyncio.gather(task(False, 3), task(None, 4))

    first, second = asyncio.run(both())
    assert first == [True, False] * 3
    assert second == [True, None] * 4


def test_context_left_in_another_thread_is_rejected():
    context = set_recurrent_mode(True)
    with context:
        with pytest.raises(RuntimeError, match="not entered in this thread or asyncio task"):
            _in_thread(lambda: context.__exit__(None, None, None))
        assert recurrent_mode() is True


def test_instance_that_is_never_entered_warns():
    with pytest.warns(UserWarning, match=r"'with set_recurrent_mode\(True\):'") as caught:
        set_recurrent_mode(True)
        gc.collect()
    assert caught[0].filename == __file__


def test_instance_that_is_used_does_not_warn():
    set_recurrent_mode(True)(lambda: None)
    set_recurrent_mode(True).clone()(lambda: None)
    with pickle.loads(pickle.dumps(set_recurrent_mode(True))):
        pass
    with pytest.raises(ValueError):
        set_recurrent_mode("parallel")  # pyright: ignore[reportArgumentType]
    gc.collect()


def test_context_inside_compiled_code_sets_the_mode():
    @torch.compile(fullgraph=True, backend="eager")
    def run(x: torch.Tensor) -> torch.Tensor:
        with set_recurrent_mode(True):
            y = x + 1 if recurrent_mode() else x
        return y if recurrent_mode() else y * 2

    assert run(torch.ones(())) == 4
    gc.collect()
