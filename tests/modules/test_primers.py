"""Transforms that environments need for a recurrent policy: made once, in order, and right."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchrl.modules.utils
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import (
    Compose,
    GymEnv,
    InitTracker,
    RewardSum,
    SerialEnv,
    TensorDictPrimer,
    TransformedEnv,
)
from torchrl.modules import MLP, ConsistentDropoutModule
from torchrl.testing.mocking_classes import (
    ContinuousActionVecMockEnv,
    CountingEnv,
    MockBatchedLockedEnv,
    MultiKeyCountingEnv,
    NestedCountingEnv,
)

from rnnkeys import get_env_transforms_from_module, get_primers_from_module, set_recurrent_mode
from rnnkeys.keys import as_tuple
from rnnkeys.transforms import StatePrimer
from tests.support.recurrent import KINDS, THEIRS, chain, make, make_theirs

in_both_kinds = pytest.mark.parametrize("kind", KINDS)


def _keyed(kind: str, prefix: str, **arguments: Any) -> Any:
    """Return a module whose states have keys of their own."""
    states = [f"{prefix}{i}" for i in range(len(KINDS[kind].DEFAULT_IN_KEYS))]
    keys = {
        "in_keys": ["observation", *states],
        "out_keys": [f"{prefix}_out", *(("next", s) for s in states)],
    }
    return make(kind, **keys, **arguments)


def _type(value: Any) -> type:
    # Typed apart: the checker would take torchrl's annotations, which know no nested specs.
    return type(value)


def _append(env: Any, transform: Any) -> Any:
    wrap: Any = TransformedEnv
    return wrap(env, transform)


@in_both_kinds
@pytest.mark.parametrize("num_layers", [1, 2])
def test_primer_has_the_specs_of_torchrls(kind, num_layers):
    ours, theirs = (m(kind, num_layers=num_layers) for m in (make, make_theirs))
    primer, reference = (m.make_tensordict_primer() for m in (ours, theirs))
    assert _type(primer) is TensorDictPrimer
    assert primer.expand_specs and reference.expand_specs
    assert set(primer.primers.keys(True, True)) == set(reference.primers.keys(True, True))
    for key, spec in reference.primers.items(True, True):
        assert primer.primers[key] == spec
        assert primer.default_value[key] == reference.default_value[key] == 0.0


@in_both_kinds
def test_primer_of_states_that_are_not_carried_is_rejected(kind):
    module = make(kind)
    states = [f"elsewhere{i}" for i in range(len(module.state_keys))]
    module = make(kind, out_keys=["embed", *states])
    with pytest.raises(RuntimeError) as error:
        module.make_tensordict_primer()
    for word in (repr(module.state_keys[0]), "'elsewhere0'", str(("next", module.state_keys[0]))):
        assert word in str(error.value)


@in_both_kinds
def test_primer_of_meta_parameters_has_no_device(kind):
    primer = make(kind, device="meta").make_tensordict_primer()
    env = _append(ContinuousActionVecMockEnv(), primer)
    assert env.reset()[make(kind).state_keys[0]].device.type == "cpu"


_ENVIRONMENTS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "one": (ContinuousActionVecMockEnv, ()),
    "serial": (lambda: SerialEnv(3, ContinuousActionVecMockEnv), (3,)),
    "batch-locked": (lambda: MockBatchedLockedEnv(device="cpu", batch_size=[4]), (4,)),
}


@in_both_kinds
@pytest.mark.parametrize("name", _ENVIRONMENTS)
def test_states_are_zeros_of_the_environments_batch(kind, name):
    make_env, lead = _ENVIRONMENTS[name]
    module = make(kind, num_layers=2, dtype=torch.float64)
    env = _append(make_env(), get_env_transforms_from_module(module))
    reset, rollout = env.reset(), env.rollout(3)
    for key in module.state_keys:
        for spec in (env.observation_spec, env.state_spec):
            assert spec[key].shape == (*lead, 2, 5)
            assert spec[key].dtype == torch.float64
        assert reset[key].shape == (*lead, 2, 5)
        assert reset[key].dtype == torch.float64
        assert not reset[key].any()
        assert rollout[key].shape == (*lead, 3, 2, 5)
    assert reset["is_init"].all()


@in_both_kinds
def test_partial_reset_clears_states_of_these_environments_only(kind):
    module = make(kind, num_layers=2)
    env = _append(
        SerialEnv(3, lambda: CountingEnv(max_steps=5)), get_env_transforms_from_module(module)
    )
    step = env.reset()
    step["is_init"].fill_(False)
    for key in module.state_keys:
        step[key] = torch.ones_like(step[key])
    fresh = torch.tensor([True, False, True])
    step["_reset"] = fresh.unsqueeze(-1)
    step = env.reset(step)
    for key in module.state_keys:
        assert not step[key][fresh].any()
        assert (step[key][~fresh] == 1).all()
    assert torch.equal(step["is_init"].squeeze(-1), fresh)


def test_primer_with_other_default_values_sets_them():
    constant, random = (make("gru").make_tensordict_primer() for _ in range(2))
    constant.default_value["recurrent_state"] = 2.0
    random.random = True
    first = _append(SerialEnv(2, ContinuousActionVecMockEnv), constant).reset()
    assert (first["recurrent_state"] == 2.0).all()
    drawn = _append(SerialEnv(2, ContinuousActionVecMockEnv), random).reset()["recurrent_state"]
    assert drawn.shape == (2, 1, 5)
    assert drawn.unique().numel() == 10


@pytest.mark.parametrize("key", ["h", ("agents", "h")])
def test_copied_or_pickled_primer_makes_the_same_states(key):
    module = make("gru", in_keys=["observation", key], out_keys=["y", ("next", *_path(key))])
    primer = module.make_tensordict_primer()
    _append(SerialEnv(2, ContinuousActionVecMockEnv), primer).reset()
    for duplicate in (primer.clone(), copy.deepcopy(primer), pickle.loads(pickle.dumps(primer))):
        assert duplicate.primers == primer.primers


def _path(key: Any) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


def _nested(group: str, init_key: Any = None, num_layers: int = 2) -> Any:
    return make(
        "gru",
        in_keys=[(group, "x"), (group, "h")],
        out_keys=[(group, "y"), ("next", group, "h")],
        input_size=1,
        num_layers=num_layers,
        init_key=init_key,
    )


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("own_ends", [True, False])
def test_nested_states_have_the_agents_of_their_group(lead, own_ends):
    module = _nested("data", ("data", "is_init") if own_ends else "is_init")
    inner = NestedCountingEnv(nest_done=own_ends, batch_size=lead, max_steps=2)
    env = _append(inner, get_env_transforms_from_module(module))
    cast = TensorDictModule(lambda x: x.float(), [("data", "states")], [("data", "x")])
    act = TensorDictModule(
        lambda y: torch.ones_like(y[..., :1]), [("data", "y")], [("data", "action")]
    )
    out = env.rollout(5, chain(cast, module, act), break_when_any_done=False)
    assert out["data", "h"].shape == (*lead, 5, 3, 2, 5)
    starts = out[module.init_key].reshape(*lead, 5, -1).any(-1)
    assert starts.reshape(-1, 5).any(0).tolist() == [True, False, False, True, False]
    assert not out["data", "h"][starts].any()
    assert out["data", "h"][~starts].any(-1).all()


@pytest.mark.parametrize("num_layers", [1, 2])
def test_reset_of_one_agent_clears_its_state_only(num_layers):
    module = _nested("data", ("data", "is_init"), num_layers)
    env = _append(NestedCountingEnv(nest_done=True), get_env_transforms_from_module(module))
    step = env.reset()
    step["data", "h"] = torch.ones(3, num_layers, 5)
    step["data", "_reset"] = torch.tensor([[True], [False], [False]])
    step = env.reset(step)
    assert not step["data", "h"][0].any()
    assert (step["data", "h"][1:] == 1).all()


@pytest.mark.parametrize("group", ["nested_1", "nested_2"])
def test_groups_with_other_done_keys_follow_their_reset_key(group):
    module = _nested(group)
    env = _append(MultiKeyCountingEnv(batch_size=(2,)), get_env_transforms_from_module(module))
    agents = env.observation_spec[group].shape[1:]
    step = env.reset()
    assert step[group, "h"].shape == (2, *agents, 2, 5)
    step[group, "h"] = torch.ones_like(step[group, "h"])
    step["_reset"] = torch.tensor([[True], [False]])
    step = env.reset(step)
    assert not step[group, "h"][0].any()
    assert (step[group, "h"][1] == 1).all()


def test_nested_primer_in_another_environment_takes_its_shape():
    primer = _nested("data").make_tensordict_primer()
    assert _type(primer) is StatePrimer
    first = _append(NestedCountingEnv(batch_size=(2,)), primer)
    assert first.reset()["data", "h"].shape == (2, 3, 2, 5)
    other = _append(NestedCountingEnv(batch_size=(4,), nested_dim=5), primer.clone())
    assert other.reset()["data", "h"].shape == (4, 5, 2, 5)


def test_policy_without_state_has_no_primer():
    with pytest.warns(UserWarning, match="No primers found in the module"):
        assert get_primers_from_module(nn.Linear(3, 3)) is None


def test_policy_without_state_and_warn_false_does_not_warn(recwarn):
    assert get_primers_from_module(nn.Linear(3, 3), warn=False) is None
    assert not recwarn.list


@in_both_kinds
def test_module_inside_others_has_one_primer(kind):
    module = make(kind)
    holder = nn.ModuleDict({"a": nn.Sequential(chain(module)), "again": module})
    primer: Any = get_primers_from_module(holder)
    assert _type(primer) is TensorDictPrimer
    assert set(primer.primers.keys()) == set(module.state_keys)


def test_several_modules_have_one_primer_each_in_their_order():
    first, second = _keyed("gru", "a"), _keyed("lstm", "b")
    primers: Any = get_primers_from_module(chain(first, second, first))
    assert issubclass(_type(primers), Compose)
    assert [sorted(p.primers.keys()) for p in primers] == [["a0"], ["b0", "b1"]]


def test_torchrls_modules_have_primers():
    policy = chain(_keyed("gru", "a"), make_theirs("lstm"))
    ours: Any = get_primers_from_module(policy)
    theirs: Any = torchrl.modules.utils.get_primers_from_module(policy)
    assert [set(p.primers.keys()) for p in [*ours]] == [set(p.primers.keys()) for p in [*theirs]]
    assert isinstance(policy[1], THEIRS["lstm"])


def test_modules_with_the_same_layers_share_a_state(recwarn):
    layers = nn.GRU(3, 5, batch_first=True)
    primer = get_primers_from_module(chain(make("gru", gru=layers), make("gru", gru=layers)))
    assert _type(primer) is TensorDictPrimer
    assert not recwarn.list


def test_two_modules_with_one_state_key_warn():
    policy = chain(make("lstm"), make("lstm", in_key="embed", out_key="y", input_size=5))
    with pytest.warns(UserWarning) as caught:
        primer = get_primers_from_module(policy)
    assert _type(primer) is TensorDictPrimer, "created once"
    for word in ("'recurrent_state_h'", "LSTMModule", "in_keys and out_keys"):
        assert word in str(caught[0].message)
    assert caught[0].filename == __file__


def test_two_modules_with_one_state_key_and_other_shapes_are_rejected():
    policy = chain(make("gru"), make("gru", hidden_size=7))
    with pytest.raises(ValueError) as error:
        get_primers_from_module(policy)
    for word in ("'recurrent_state'", "(1, 5)", "(1, 7)", "in_keys and out_keys"):
        assert word in str(error.value)


def test_primer_that_fails_raises_if_strict_and_else_warns():
    dropout = ConsistentDropoutModule(p=0.1, in_keys="embed")
    policy = chain(make("gru"), dropout)
    with pytest.raises(RuntimeError, match="input_shape"):
        get_primers_from_module(policy)
    with pytest.warns(UserWarning, match="ConsistentDropoutModule") as caught:
        primer: Any = get_primers_from_module(policy, strict=False)
    assert "recurrent_state" in primer.primers
    assert caught[0].filename == __file__


def test_env_transforms_without_state_are_the_tracker_alone():
    transform = get_env_transforms_from_module(MLP(in_features=3, out_features=3))
    assert type(transform) is InitTracker
    assert transform.init_key == "is_init"
    renamed = get_env_transforms_from_module(nn.Linear(3, 3), init_key="start")
    assert isinstance(renamed, InitTracker) and renamed.init_key == "start"


@in_both_kinds
def test_env_transforms_flag_starts_before_states_are_made(kind):
    transforms: Any = get_env_transforms_from_module(chain(make(kind)))
    assert [type(t) for t in transforms] == [InitTracker, TensorDictPrimer]


@pytest.mark.parametrize("key", ["start", ("agents", "start"), ("a", "b", "start")])
def test_env_transforms_write_flags_at_the_init_key_of_the_modules(key):
    policy = chain(_keyed("gru", "a", init_key=key), _keyed("lstm", "b", init_key=key))
    transforms: Any = get_env_transforms_from_module(policy)
    assert [t.init_key for t in transforms if isinstance(t, InitTracker)] == ["start"]
    transforms: Any = get_env_transforms_from_module(policy, init_key="other")
    assert [t.init_key for t in transforms if isinstance(t, InitTracker)] == ["other"]


def test_env_transforms_of_modules_with_several_init_keys_write_all():
    policy = chain(_keyed("gru", "a", init_key="start"), _keyed("gru", "b"))
    env = _append(ContinuousActionVecMockEnv(), get_env_transforms_from_module(policy))
    step = env.reset()
    assert step["start"].all() and step["is_init"].all()


@in_both_kinds
def test_env_transforms_pass_torchrls_own_check(kind):
    policy = chain(make(kind))
    missing = torchrl.modules.utils.utils._compute_missing_env_transforms
    env: Any = CountingEnv()
    found = missing(env, policy)
    assert [type(t) for t in found] == [InitTracker, TensorDictPrimer]
    assert not missing(_append(env, get_env_transforms_from_module(policy)), policy)


def test_env_transforms_for_a_policy_in_torchrls_env_argument():
    policy = chain(make("gru"))
    env: Any = CountingEnv(max_steps=3, policy=policy)  # pyright: ignore[reportCallIssue]
    step = env.reset()
    assert step["is_init"].all()
    assert step["recurrent_state"].shape == (1, 5)


def test_env_transforms_suffice_for_a_call():
    module = make("gru", input_size=7)
    env = _append(SerialEnv(2, ContinuousActionVecMockEnv), get_env_transforms_from_module(module))
    step: TensorDict = module(env.reset())
    assert step["embed"].shape == (2, 5)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("state", ["h", ("agents", "h")])
def test_env_transforms_inside_another_compose_write_flags_and_states(is_first, state):
    keys = {"in_keys": ["observation", state], "out_keys": ["embed", ("next", *as_tuple(state))]}
    inner: Any = get_env_transforms_from_module(make("gru", input_size=4, **keys))
    parts: Any = (inner, RewardSum()) if is_first else (RewardSum(), inner)
    transforms = Compose(*parts)
    for one in (transforms.clone(), transforms):
        rollout = _append(GymEnv("CartPole-v1"), one).rollout(5)
        assert {"episode_reward", "is_init"} <= set(rollout.keys())
        assert rollout.get(state).shape == (*rollout.shape, 1, 5)


def test_env_that_runs_in_recurrent_mode_warns(recwarn):
    transforms = get_env_transforms_from_module(make("gru", input_size=4))
    env = _append(SerialEnv(3, lambda: GymEnv("CartPole-v1")), transforms)
    with set_recurrent_mode(True), set_recurrent_mode(False):
        step = env.rand_action(env.reset())
    assert not recwarn.list
    with set_recurrent_mode(True):
        for call in (env.reset, lambda: env.step(step)):
            with pytest.warns(UserWarning, match=r"with set_recurrent_mode\(False\).*\[mode\]"):
                call()


def test_env_transforms_in_recurrent_mode_warn():
    policy = chain(make("gru"))
    env = _append(CountingEnv(), get_env_transforms_from_module(policy))
    with set_recurrent_mode(True):
        with pytest.warns(UserWarning, match="An environment runs inside set_recurrent_mode"):
            env.reset()
