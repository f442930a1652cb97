"""Each agent has its own state, with shared or separate weights, and affects no other agent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, TransformedEnv

import rnnkeys
from rnnkeys import get_env_transforms_from_module, recurrent_module
from rnnkeys.objectives import recurrent_loss
from tests.support import target_cases as cases
from tests.support import target_oracle as oracle
from tests.support.recurrent import BACKENDS, F64, batch, by_hand, chain, recurrently
from tests.support.tolerances import assert_equal

AGENTS = 3
GROUP: Any = {
    "lstm": ("h", "c"),
    "gru": ("h",),
    "lstm_ln": ("h", "c"),
}


def make_agents(cell: str, backend: str) -> Any:
    """One module for a group of agents, with nested keys and the group's own is_init flags."""
    states = [("agents", name) for name in GROUP[cell]]
    return recurrent_module(
        cell,
        3,
        5,
        num_layers=2,
        dtype=F64,
        in_keys=[("agents", "observation"), *states],
        out_keys=[("agents", "embed"), *(("next", *key) for key in states)],
        init_key=("agents", "is_init"),
        recurrent_backend=backend,
    )


def everything(module: Any, data: Any, cotangent: Tensor) -> list[Tensor]:
    """Outputs, states, and the gradients of inputs and stored states, agents third."""
    leaves = [data.get(key).detach().requires_grad_() for key in module.in_keys[:-1]]
    data = data.copy()
    for key, leaf in zip(module.in_keys[:-1], leaves, strict=True):
        data.set(key, leaf)
    out = recurrently(module, data)
    (out["agents", "embed"] * cotangent).sum().backward()
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [*(out.get(key).detach() for key in module.out_keys), *grads]


@pytest.mark.parametrize("change", ["observation", "h", "is_init", "nan"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", GROUP)
def test_agents_do_not_affect_each_other(cell, backend, change):
    module = make_agents(cell, backend)
    data = batch(module, (2, 7), agents=(AGENTS,), shared_flags=False)
    cotangent = torch.randn(2, 7, AGENTS, 5, dtype=F64)
    before = everything(module, data, cotangent)
    changed = data.clone()
    entry = changed.get(("agents", "observation" if change == "nan" else change))
    if change == "is_init":
        entry[:, 1:, 0] = ~entry[:, 1:, 0]
    else:
        entry[:, :, 0] = float("nan") if change == "nan" else entry[:, :, 0] + 1
    after = everything(module, changed, cotangent)
    assert any(not torch.equal(a[:, :, 0], b[:, :, 0]) for a, b in zip(before, after, strict=True))
    for a, b in zip(before, after, strict=True):
        # To rounding: rows are packed in another order when starts are moved.
        torch.testing.assert_close(a[:, :, 1:], b[:, :, 1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", GROUP)
def test_agents_shared_is_init_resets_all(cell):
    module = make_agents(cell, "auto")
    own = batch(module, (2, 7), agents=(AGENTS,), shared_flags=False)
    is_init = own["agents", "is_init"][:, :, :1]
    every = own.clone()
    every["agents", "is_init"] = is_init.expand(2, 7, AGENTS, 1).clone()
    shared = own.clone()
    shared["agents", "is_init"] = is_init[:, :, 0]
    for key in module.out_keys:
        expected = recurrently(module, every).get(key)
        assert torch.equal(recurrently(module, shared).get(key), expected)


class OwnEnds(EnvBase):
    """Two environments of three agents, whose episodes last 2, 3 and 5 steps over and over."""

    def __init__(self) -> None:
        super().__init__(batch_size=torch.Size([2]))
        group, size = torch.Size([2, AGENTS]), torch.Size

        def of_agents(**entries: Any) -> Composite:
            return Composite(agents=Composite(entries, shape=group), shape=self.batch_size)

        def flag() -> Categorical:
            return Categorical(2, size([*group, 1]), dtype=torch.bool)

        self.observation_spec = of_agents(observation=Unbounded(size([*group, 3]), dtype=F64))
        self.action_spec = of_agents(action=Unbounded(size([*group, 1]), dtype=F64))
        self.reward_spec = of_agents(reward=Unbounded(size([*group, 1])))
        self.done_spec = of_agents(done=flag(), terminated=flag())
        self.lengths = torch.tensor([2, 3, 5]).reshape(AGENTS, 1)
        self.steps = torch.zeros(*group, 1, dtype=torch.long)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        which = None if tensordict is None else tensordict.get(("agents", "_reset"), None)
        self.steps[slice(None) if which is None else which] = 0
        return self.observation_spec.rand().update(self.full_done_spec.zero())

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.steps += 1
        over = self.steps == self.lengths
        out = self.observation_spec.rand().update(self.reward_spec.zero())
        return out.update({"agents": {"done": over, "terminated": over.clone()}})

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(seed or 0)


@pytest.mark.parametrize("cell", GROUP)
def test_agents_with_separate_ends_depend_on_their_own_episode(cell):
    """Collected step by step and run as sequences, each agent is as if it were alone."""
    module = make_agents(cell, "auto")
    act = TensorDictModule(nn.Linear(5, 1).double(), [("agents", "embed")], [("agents", "action")])
    policy = chain(module, act)
    env = TransformedEnv(OwnEnds(), get_env_transforms_from_module(policy))
    collector = Collector(env, policy, frames_per_batch=2 * 14, total_frames=-1)
    data: Any = collector.next()
    collector.shutdown()
    starts = data["agents", "is_init"][0, :, :, 0]
    for agent, length in enumerate((2, 3, 5)):
        assert starts[:, agent].tolist() == [t % length == 0 for t in range(14)]
    alone = recurrent_module(cell, 3, 5, 2, dtype=F64, in_key="observation", out_key="embed")
    alone.load_state_dict(module.state_dict())
    sequences = recurrently(module, data)["agents", "embed"]
    for agent in range(AGENTS):
        seen = {key: data["agents", key][:, :, agent] for key in ("observation", "is_init")}
        states = {key: torch.zeros(2, 14, 2, 5, dtype=F64) for key in alone.state_keys}
        expected = by_hand(alone, TensorDict({**seen, **states}, [2, 14]))["embed"]
        assert_equal(data["agents", "embed"][:, :, agent], expected, F64, "collected")
        assert_equal(sequences[:, :, agent], expected, F64, "as sequences")


with_shared_and_own_weights = pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def make_qmix(own: bool, cell: str) -> tuple[Any, Any]:
    """A wired QMIX whose networks differ, and slices that start inside episodes."""
    setup = cases.make_qmix(rnnkeys, cell, own)
    recurrent_loss(setup.loss)
    case = next(one for one in cases.CASES if one.name == "QMIX")
    return setup, cases.flat(case, setup.policy)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@with_shared_and_own_weights
def test_qmix_has_the_loss_and_gradients_of_single_steps(own, cell, float64):
    setup, data = make_qmix(own, cell)
    loss, nets, starts = setup.loss, setup.networks, oracle.starts_of(data)
    keep = 0.9 * (~data["next", "terminated"]).double()
    target = data["next", "reward"] + keep * cases.expect_qmix(setup, data, starts).detach()
    local = oracle.with_params(nets["local"], loss.local_value_network_params, data, starts)
    chosen = local["agents", "action_value"].gather(-1, data["agents", "action"].unsqueeze(-1))
    local["agents", "chosen_action_value"] = chosen
    mixed = oracle.with_params(nets["mixer"], loss.mixer_network_params, local, starts)
    expected = nn.functional.mse_loss(mixed["chosen_action_value"], target)
    parameters = list(loss.parameters())
    truth = torch.autograd.grad(expected, parameters, allow_unused=True)
    actual = loss(data)["loss"]
    assert_equal(actual.detach(), expected.detach(), F64, "loss")
    found = torch.autograd.grad(actual, parameters, allow_unused=True)
    assert sum(g is not None for g in truth) >= 4 * (3 if own else 1) + 4
    for mine, true in zip(found, truth, strict=True):
        assert (mine is None) == (true is None)
        if true is not None:
            assert_equal(mine, true, F64, "gradient")


@with_shared_and_own_weights
def test_qmix_agents_do_not_affect_each_other(own, float64):
    """Inputs and states of one agent change its values, and those of no other agent."""
    setup, data = make_qmix(own, "gru")
    local = setup.networks["local"]
    changed = data.clone()
    changed["agents", "observation"][:, 0] += 1
    state = changed["agent_0", "local_h"] if own else changed["agents", "local_h"][:, 0]
    state += 1
    before, after = (recurrently(local, one)["agents", "action_value"] for one in (data, changed))
    assert (before[:, 0] != after[:, 0]).any(-1).all()
    assert_equal(after[:, 1:], before[:, 1:], F64)
