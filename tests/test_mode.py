"""The mode: a context manager and decorator whose state is TorchRL's own."""

from __future__ import annotations

import asyncio
import copy
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
def test_takes_these_modes(given, mode):
    with set_recurrent_mode(not mode), set_recurrent_mode(given):
        assert recurrent_mode() is mode
        assert torchrl.modules.recurrent_mode() is mode


def test_is_recurrent_by_default():
    with set_recurrent_mode():
        assert recurrent_mode() is True


@pytest.mark.parametrize("given", ["parallel", "", 1, 0.0, [True]])
def test_other_modes_are_refused(given):
    with pytest.raises(ValueError) as error:
        set_recurrent_mode(given)
    assert repr(given) in str(error.value)
    for accepted in ("True", "'recurrent'", "False", "'sequential'", "None"):
        assert accepted in str(error.value)


def test_nests_and_comes_back():
    with set_recurrent_mode(True):
        with set_recurrent_mode(False):
            with set_recurrent_mode("recurrent"):
                assert recurrent_mode() is True
            assert recurrent_mode() is False
            with set_recurrent_mode(None):
                assert recurrent_mode() is None
            assert recurrent_mode() is False
        assert recurrent_mode() is True


def test_one_instance_may_be_entered_again_inside_itself():
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


def test_an_exception_puts_the_mode_back():
    context = set_recurrent_mode(True)
    with set_recurrent_mode(False):
        for _ in range(2):
            with pytest.raises(KeyError), context, context:
                raise KeyError
            assert recurrent_mode() is False


def test_decorates_functions_methods_and_recursion():
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


def test_decorates_generators_only_while_they_run():
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


def test_is_local_to_the_thread():
    seen: list[bool | None] = []

    def other() -> None:
        seen.append(recurrent_mode())
        with set_recurrent_mode(False):
            seen.append(recurrent_mode())

    with set_recurrent_mode(True):
        _in_thread(other)
        assert recurrent_mode() is True
    assert seen == [None, False]


def test_one_instance_serves_two_threads_at_once():
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


def test_an_instance_may_be_copied_and_pickled():
    context = set_recurrent_mode(True)
    for duplicate in (copy.deepcopy(context), pickle.loads(pickle.dumps(context)), context.clone()):
        with duplicate:
            assert recurrent_mode() is True


def test_both_libraries_set_and_read_one_state():
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
def test_our_context_switches_both_libraries_modules(kind, library):
    sizes = {"input_size": 3, "hidden_size": 5, "in_key": "observation", "out_key": "embed"}
    module = library[kind](**sizes)
    data = batch(make(kind))
    with set_recurrent_mode(True):
        sequences = module(data.clone())["embed"]
    with set_recurrent_mode(False):
        steps = module(data.clone())["embed"]
    assert torch.isclose(sequences[:, 0], steps[:, 0])[~data["is_init"][:, 0, 0]].all()
    assert not torch.isclose(sequences[:, 1:], steps[:, 1:]).all()


@in_both_kinds
@pytest.mark.parametrize("default", [True, False, None])
def test_the_default_of_a_module_holds_where_no_mode_is_set(kind, default):
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


def test_losses_of_torchrl_run_our_modules_recurrently():
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
    assert len(probe.seen) == 2, "the root and the next view"
    assert all(probe.seen)
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())
    assert recurrent_mode() is None


def test_any_loss_module_enters_recurrent_mode():
    class Loss(LossModule):
        def forward(self, tensordict: TensorDict) -> TensorDict:
            return TensorDict(mode=torch.tensor(recurrent_mode() is True))

    assert Loss()(TensorDict())["mode"]
    assert recurrent_mode() is None


def test_coroutines_run_in_the_mode_they_are_decorated_with():
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


def test_asynchronous_generators_are_refused():
    async def steps() -> AsyncIterator[int]:
        yield 0

    with pytest.raises(TypeError, match="steps, an asynchronous generator.*inside it"):
        set_recurrent_mode(True)(steps)
