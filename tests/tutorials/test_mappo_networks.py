"""The networks of the recurrent-MAPPO tutorial, and runs of it in an environment without VMAS."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

# Imported before the stand-ins of VMAS, which it looks for.
import torchrl.envs.libs.vmas
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.objectives.multiagent import IPPOLoss, MAPPOLoss
from torchrl.objectives.value import MultiAgentGAE

from tests.support.tutorials import assert_complete, load_tutorial

assert torchrl.envs.libs.vmas
PACKAGE = "vmas.simulator"
AGENTS = 3
SHORT = [
    *("--num-envs", "4", "--steps", "8", "--sequences", "2", "--epochs", "2"),
    *("--hidden-size", "8", "--eval-every", "32", "--frames", "64"),
]
pytestmark = pytest.mark.usefixtures("signal_handlers")


class Walk(EnvBase):
    """Agents that walk in the plane and see where they are."""

    def __init__(self, num_envs: int, steps: int) -> None:
        super().__init__(batch_size=torch.Size([num_envs]))
        group = torch.Size([num_envs, AGENTS])
        specs: list[Any] = [
            Composite(agents=Composite({name: spec}, shape=group), shape=group[:1])
            for name, spec in (
                ("observation", Unbounded(torch.Size([*group, 5]))),
                ("action", Bounded(-1.0, 1.0, torch.Size([*group, 2]))),
                ("reward", Unbounded(torch.Size([*group, 1]))),
            )
        ]
        self.observation_spec, self.action_spec, self.reward_spec = specs
        self.steps, self.age, self.place = steps, 0, torch.zeros(*group, 2)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        self.age, self.place = 0, torch.zeros_like(self.place)
        return self._observe()

    def _observe(self) -> TensorDict:
        seen = torch.cat([self.place, torch.full((*self.place.shape[:2], 3), self.age)], -1)
        agents = TensorDict({"observation": seen}, seen.shape[:2])
        return TensorDict({"agents": agents}, self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.age, self.place = self.age + 1, self.place + tensordict["agents", "action"]
        out = self._observe()
        out["agents", "reward"] = self.place.sum((1, 2), keepdim=True).expand(-1, AGENTS, 1)
        over = torch.full((*self.batch_size, 1), self.age >= self.steps)
        return out.update({"done": over, "terminated": over.clone()})

    def _set_seed(self, seed: int | None) -> None:
        pass


@pytest.fixture(scope="module")
def tutorial() -> Iterator[Any]:
    """The tutorial, with empty classes for those of VMAS where that is missing."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("vmas") is None:
            for name in (PACKAGE, f"{PACKAGE}.core", f"{PACKAGE}.scenario", "vmas"):
                module: Any = ModuleType(name)
                module.Agent = module.Landmark = module.World = module.BaseScenario = object
                patch.setitem(sys.modules, name, module)
        loaded: Any = load_tutorial("recurrent_mappo")
        patch.setattr(loaded, "make_env", lambda args, n: TransformedEnv(Walk(n, args.steps)))
        yield loaded


def make_step(observation: Tensor) -> TensorDict:
    step = TensorDict({"is_init": torch.ones(len(observation), 1, dtype=torch.bool)}, [4])
    step["agents"] = TensorDict({"observation": observation}, [4, AGENTS])
    return step


@pytest.mark.parametrize("own", [False, True])
def test_actor_has_weights_for_each_agent_if_they_are_its_own(tutorial: Any, own: bool) -> None:
    torch.manual_seed(0)
    args = tutorial.Args(own=own, hidden_size=8)
    actor = tutorial.make_actor(args, tutorial.make_env(args, 1))
    same = torch.randn(4, 1, 5).expand(4, AGENTS, 5)
    mean = actor(make_step(same))["agents", "loc"]
    for agent in range(1, AGENTS):
        assert torch.allclose(mean[:, 0], mean[:, agent]) != own


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("agent", range(AGENTS))
def test_actor_moves_each_agent_by_what_it_sees_itself(
    tutorial: Any, agent: int, own: bool
) -> None:
    torch.manual_seed(0)
    args = tutorial.Args(own=own, hidden_size=8)
    actor = tutorial.make_actor(args, tutorial.make_env(args, 1))
    seen = torch.randn(4, AGENTS, 5)
    other = seen.clone()
    other[:, agent] = torch.randn(4, 5)
    means = [actor(make_step(x))["agents", "loc"] for x in (seen, other)]
    changed = (means[0] != means[1]).any(-1).any(0)
    assert changed.tolist() == [one == agent for one in range(AGENTS)]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
def test_critic_of_mappo_alone_values_what_other_agents_see(
    tutorial: Any, algorithm: str, own: bool
) -> None:
    torch.manual_seed(0)
    learner = tutorial.Learner(tutorial.Args(algorithm=algorithm, own=own, hidden_size=8))
    assert learner.loss.wired_class is {"mappo": MAPPOLoss, "ippo": IPPOLoss}[algorithm]
    assert learner.advantage.wired_class is MultiAgentGAE
    seen = torch.randn(4, AGENTS, 5)
    other = torch.cat([torch.randn(4, 1, 5), seen[:, 1:]], 1)
    values = [learner.policy(make_step(x))["agents", "state_value"] for x in (seen, other)]
    changed = (values[0] != values[1]).flatten(2).any(-1).any(0)
    assert changed.tolist() == [True, *[algorithm == "mappo"] * (AGENTS - 1)]


@pytest.mark.parametrize("argv", [["--own"], ["--algorithm", "ippo"]], ids=" ".join)
def test_run_writes_all_files(tutorial: Any, tmp_path: Path, argv: list[str]) -> None:
    tutorial.main([*SHORT, *argv, "--output", str(tmp_path)])
    assert_complete(tmp_path, [32, 64], tested=256)
