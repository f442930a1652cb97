"""Time single steps on one core, as collection makes them: modules, policies, collectors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torchrl.modules
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.envs import EnvBase, TransformedEnv

import rnnkeys

from .cases import STATES, Case, Shape
from .contestants import make_layers, make_module
from .timing import Budget, Timing, interleave

OURS, TORCHRL, FLOOR = "rnnkeys", "TorchRL", "floor"
MODULE, POLICY, COLLECTOR = "module", "policy", "collector"
LIBRARIES: dict[str, Any] = {OURS: rnnkeys, TORCHRL: torchrl.modules}
I, H = 64, 128
ACTIONS = 2
STEPS_PER_BATCH = 64


@dataclass(frozen=True)
class StepRecord:
    """Times of single steps.

    Attributes:
        kind: ``MODULE``, ``POLICY`` or ``COLLECTOR``.
        cell: ``"LSTM"`` or ``"GRU"``.
        batch: number of environments.
        timings: by contestant; per call, or per step of all environments for ``COLLECTOR``.
            ``FLOOR`` is ``nn.LSTMCell`` or ``nn.GRUCell`` for a module and the same policy
            without recurrent layers for the others.
    """

    kind: str
    cell: str
    batch: int
    timings: dict[str, Timing]

    def seconds(self, name: str) -> float:
        """Median time of a contestant."""
        return self.timings[name].median


@contextmanager
def one_core() -> Iterator[None]:
    """Run torch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def time_modules(cell: str, batch: int, budget: Budget) -> StepRecord:
    """Time one step of the recurrent modules alone; the floor is torch's cell without any entry."""
    calls = {
        name: _stepping(_make_recurrent(library, cell), cell, batch, x=I)
        for name, library in LIBRARIES.items()
    }
    floor = getattr(nn, f"{cell}Cell")(I, H)
    x = torch.randn(batch, I)
    states = tuple(torch.randn(batch, H) for _ in STATES[cell])
    hidden = states if len(states) == 2 else states[0]
    calls[FLOOR] = torch.no_grad()(lambda: floor(x, hidden))
    return StepRecord(MODULE, cell, batch, interleave(calls, budget))


def time_policies(cell: str, batch: int, budget: Budget) -> StepRecord:
    """Time one step of whole policies: encoder, recurrent layers, head, choice of an action."""
    calls = {
        name: _stepping(make_policy(library, cell), cell, batch, observation=4)
        for name, library in LIBRARIES.items()
    }
    calls[FLOOR] = _stepping(make_policy(None, cell), cell, batch, observation=4)
    return StepRecord(POLICY, cell, batch, interleave(calls, budget))


def time_collectors(cell: str, environments: int, budget: Budget) -> StepRecord:
    """Time ``Collector`` on CartPole, per step of all environments."""
    collectors = {
        name: _make_collector(library, cell, environments)
        for name, library in {**LIBRARIES, FLOOR: None}.items()
    }
    try:
        batches = {name: iter(collector) for name, collector in collectors.items()}
        calls = {name: (lambda each=each: next(each)) for name, each in batches.items()}
        timings = interleave(calls, budget)
    finally:
        for collector in collectors.values():
            collector.shutdown()
    per_step = {name: _divided(timing, STEPS_PER_BATCH) for name, timing in timings.items()}
    return StepRecord(COLLECTOR, cell, environments, per_step)


def _divided(timing: Timing, by: int) -> Timing:
    return Timing(timing.median / by, timing.low / by, timing.high / by, timing.rounds)


def _stepping(module: nn.Module, cell: str, batch: int, **sizes: int) -> Callable[[], Any]:
    """Call a module on the same step again and again, within one episode."""
    step = TensorDict({name: torch.randn(batch, size) for name, size in sizes.items()}, [batch])
    step["is_init"] = torch.zeros(batch, 1, dtype=torch.bool)
    for name in STATES[cell]:
        step[name] = torch.randn(batch, 1, H)
    return torch.no_grad()(lambda: module(step))


def _make_recurrent(library: Any, cell: str) -> nn.Module:
    layers = make_layers(Case(cell, Shape(1, 1, I, H), 0.0))
    return make_module(library, cell, layers)


def make_policy(library: Any, cell: str) -> TensorDictSequential:
    """Make a Q policy for CartPole with a library's recurrent module, or feed-forward."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(4, I), nn.ReLU())
        head = nn.Linear(H if library else I, ACTIONS)
    modules: list[Any] = [
        TensorDictModule(encoder, in_keys=["observation"], out_keys=["x"]),
        TensorDictModule(head, in_keys=["y" if library else "x"], out_keys=["action_value"]),
        torchrl.modules.QValueModule(action_space="one-hot"),
    ]
    if library:
        modules.insert(1, _make_recurrent(library, cell))
    return TensorDictSequential(*modules)


def _make_collector(library: Any, cell: str, environments: int) -> Any:
    from torchrl.collectors import Collector

    policy = make_policy(library, cell)
    # Primers of TorchRL's modules are found by the same call.
    transforms = rnnkeys.get_env_transforms_from_module(policy, init_key="is_init")
    environment = TransformedEnv(make_environments(environments), transforms)
    environment.set_seed(0)
    return Collector(
        environment,
        policy,
        frames_per_batch=STEPS_PER_BATCH * environments,
        total_frames=-1,
        auto_register_policy_transforms=False,
    )


def make_environments(number: int) -> EnvBase:
    """Make CartPole once, or several in one batched environment of gymnasium's.

    torchrl resets ended environments by itself, so that gymnasium must not.
    """
    import gymnasium
    from gymnasium.vector import AutoresetMode
    from torchrl.envs import GymWrapper

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if number == 1:
            return GymWrapper(gymnasium.make("CartPole-v1"))
        return GymWrapper(
            gymnasium.make_vec(
                "CartPole-v1",
                num_envs=number,
                vectorization_mode="sync",
                vector_kwargs={"autoreset_mode": AutoresetMode.DISABLED},
            )
        )
