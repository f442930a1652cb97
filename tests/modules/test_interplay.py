"""Modules among the rest: copies, checkpoints, processes, function transforms, environments."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams, lazy_stack
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.envs import ParallelEnv, SerialEnv, TransformedEnv
from torchrl.testing.mocking_classes import CountingEnv

from rnnkeys import get_env_transforms_from_module, set_recurrent_mode
from tests.support.recurrent import (
    BACKENDS,
    KINDS,
    batch,
    chain,
    make,
    make_theirs,
    outputs,
    recurrently,
)
from tests.support.tolerances import assert_equal

in_both_kinds = pytest.mark.parametrize("kind", KINDS)
in_both_modes = pytest.mark.parametrize("recurrent", [True, False], ids=["sequences", "step"])
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def _run(module: Any, data: TensorDictBase, recurrent: bool) -> dict[str, Tensor]:
    with set_recurrent_mode(recurrent):
        return outputs(module, module(data.clone()))


def _parameters(module: nn.Module) -> Any:
    return TensorDict.from_module(module).data  # pyright: ignore[reportAttributeAccessIssue]


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        assert_equal(value, expected[key], torch.float32, key)


def _through_torch_save(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _through_a_state_dict(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = make(module.cell.name, num_layers=2)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return fresh


def _through_torchrl(module: Any) -> Any:
    theirs = make_theirs(module.cell.name, num_layers=2)
    theirs.load_state_dict(module.state_dict(), strict=True)
    fresh = make(module.cell.name, num_layers=2)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    return fresh


_COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": _through_torch_save,
    "state_dict": _through_a_state_dict,
    "torchrl": _through_torchrl,
}


@in_both_kinds
@in_both_modes
@pytest.mark.parametrize("way", _COPIES)
def test_module_copied_or_pickled_computes_the_same(kind, recurrent, way):
    module = make(kind, num_layers=2)
    data = batch(module)
    expected = _run(module, data, recurrent)
    duplicate = _COPIES[way](module)
    actual = _run(duplicate, data, recurrent)
    for key, value in actual.items():
        assert torch.equal(value, expected[key])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    again = _run(duplicate, data, recurrent)
    for key, value in again.items():
        assert torch.equal(value, expected[key]), "it reads its own parameters"


def _send(module: Any, data: TensorDict, queue: Any) -> None:
    queue.put(recurrently(module, data)["embed"].tolist())


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_module_sent_to_another_process_computes_the_same(start):
    module = make("lstm", num_layers=2)
    data = batch(module)
    context: Any = multiprocessing.get_context(start)
    queue = context.Queue()
    process = context.Process(target=_send, args=(module, data, queue))
    with warnings.catch_warnings():
        # Python 3.12 warns of every fork of a process that has threads, which torch has.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        process.start()
    actual = torch.tensor(queue.get(timeout=120))
    process.join()
    assert_equal(actual, recurrently(module, data)["embed"], torch.float32)


@in_both_kinds
@in_both_modes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_module_to_another_dtype_computes_in_it(kind, recurrent, dtype):
    module = make(kind).to(dtype)
    for key, value in _run(module, batch(module), recurrent).items():
        assert value.dtype == dtype, key
        assert value.isfinite().all()


@in_both_kinds
@in_both_modes
@on_every_backend
def test_module_without_data_returns_shapes(kind, recurrent, backend):
    module = make(kind, recurrent_backend=backend)
    data = batch(module)
    expected = _run(module, data, recurrent)
    module.to("meta")
    for states in (data, data.exclude(*module.state_keys)):
        actual = _run(module, states.to("meta"), recurrent)
        assert {k: v.shape for k, v in actual.items()} == {k: v.shape for k, v in expected.items()}
        assert {v.device.type for v in actual.values()} == {"meta"}


@in_both_kinds
@in_both_modes
def test_module_with_swapped_parameters_uses_them(kind, recurrent):
    module, other = make(kind, num_layers=2), make(kind, num_layers=2)
    data = batch(module)
    own, expected = _run(module, data, recurrent), _run(other, data, recurrent)
    params = TensorDictParams(_parameters(other).clone())
    with params.to_module(module):
        actual = _run(module, data, recurrent)
    _assert_same(actual, expected)
    actual["embed"].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in params.parameters())
    assert all(p.grad is None for p in module.parameters())
    _assert_same(_run(module, data, recurrent), own)


@in_both_kinds
@in_both_modes
@on_every_backend
@pytest.mark.parametrize("python_based", [True, False])
def test_module_in_vmap_over_parameters_equals_one_at_a_time(
    kind, recurrent, backend, python_based
):
    arguments = {"num_layers": 2, "recurrent_backend": backend, "python_based": python_based}
    modules = [make(kind, **arguments) for _ in range(3)]
    data = batch(modules[0])
    stacked: Any = torch.stack([_parameters(m) for m in modules])

    def call(params: Any, data: TensorDictBase) -> TensorDictBase:
        with params.to_module(modules[0]):
            return modules[0](data)

    with set_recurrent_mode(recurrent):
        out: Any = torch.vmap(call, (0, None))(stacked, data.clone())
    for i, module in enumerate(modules):
        _assert_same(outputs(module, out[i]), _run(module, data, recurrent))


@in_both_kinds
@in_both_modes
def test_module_in_a_functional_call_uses_its_parameters(kind, recurrent):
    module, other = make(kind), make(kind)
    data = batch(module)
    with set_recurrent_mode(recurrent):
        out: Any = torch.func.functional_call(module, other.state_dict(), (data.clone(),))
    _assert_same(outputs(module, out), _run(other, data, recurrent))


@in_both_kinds
@in_both_modes
def test_module_without_gradients_computes_the_same(kind, recurrent):
    module = make(kind)
    data = batch(module)
    expected = _run(module, data, recurrent)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            actual = _run(module, data, recurrent)
            assert not any(v.requires_grad for v in actual.values())
            _assert_same(actual, expected)


@in_both_kinds
@in_both_modes
def test_module_learns_from_data_collected_in_inference_mode(kind, recurrent):
    module = make(kind)
    with torch.inference_mode():
        data = batch(module)
    _run(module, data, recurrent)["embed"].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


@in_both_kinds
@in_both_modes
def test_stored_states_may_require_gradients(kind, recurrent):
    module = make(kind)
    data = batch(module, flag_rate=0.0)
    for key in module.state_keys:
        data.get(key).requires_grad_()
    with set_recurrent_mode(recurrent):
        out = module(data)
    out["embed"].sum().backward()
    for key in module.state_keys:
        assert data.get(key).grad.any()
        assert out.get(("next", key)).requires_grad is not recurrent


@in_both_kinds
def test_frozen_parameters_pass_gradients_to_the_input(kind):
    module = make(kind).requires_grad_(False)
    data = batch(module)
    data["observation"].requires_grad_()
    with set_recurrent_mode(True):
        module(data)["embed"].sum().backward()
    gradient: Any = data["observation"].grad
    assert gradient.any()


@in_both_kinds
@in_both_modes
@pytest.mark.parametrize("dim", [0, 1])
def test_module_of_lazy_stacks_computes_the_same(kind, recurrent, dim):
    module = make(kind)
    data = batch(module)
    lazy = lazy_stack([td.clone() for td in data.unbind(dim)], dim)
    with set_recurrent_mode(recurrent):
        module(lazy)
    _assert_same(outputs(module, lazy), _run(module, data, recurrent))


@in_both_kinds
def test_module_keeps_names_of_dimensions(kind):
    data = batch(make(kind))
    data.names = ["env", "time"]
    assert recurrently(make(kind), data).names == ["env", "time"]


@in_both_kinds
@in_both_modes
def test_locked_tensordict_raises_and_is_unchanged(kind, recurrent):
    module = make(kind)
    data = batch(module).lock_()
    keys = set(data.keys(True, True))
    with set_recurrent_mode(recurrent), pytest.raises(RuntimeError, match="lock"):
        module(data)
    assert set(data.keys(True, True)) == keys


def _policy(kind: str) -> Any:
    torch.manual_seed(3)
    first = TensorDictModule(lambda x: x.float(), ["observation"], ["x"])
    keys = {"in_key": "x", "out_key": "y", "input_size": 1, "num_layers": 2}
    act = TensorDictModule(lambda y: torch.ones_like(y[..., :1]), ["y"], ["action"])
    return chain(first, make(kind, **keys), act)


def _short_episodes() -> CountingEnv:
    return CountingEnv(max_steps=3)


def _with_memory() -> Any:
    wrap: Any = TransformedEnv
    return wrap(_short_episodes(), get_env_transforms_from_module(_policy("lstm")))


def _inside(batched: Any) -> Any:
    return batched(2, _with_memory)


def _outside(batched: Any) -> Any:
    wrap: Any = TransformedEnv
    return wrap(batched(2, _short_episodes), get_env_transforms_from_module(_policy("lstm")))


def _fork(number: int, make_env: Any) -> Any:
    return ParallelEnv(number, make_env, mp_start_method="fork")


def _assert_collected(policy: Any, data: TensorDictBase) -> None:
    """Check that sequences give what was collected step by step, in the midst of episodes too."""
    assert data["is_init"].any() and not data["is_init"].all()
    again = recurrently(policy, data.exclude("y"))
    assert_equal(again["y"], data["y"], torch.float32)
    for key in ("recurrent_state_h", "recurrent_state_c"):
        assert_equal(again["next", key], data["next", key], torch.float32)
        assert data["next", key].abs().sum(-1).all(), "real at every step"


@pytest.mark.parametrize("where", [_inside, _outside])
@pytest.mark.parametrize("batched", [SerialEnv, _fork], ids=["serial", "parallel"])
def test_batched_environments_carry_states(where, batched):
    policy = _policy("lstm")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        env = where(batched)
    try:
        data = env.rollout(10, policy, break_when_any_done=False)
    finally:
        env.close(raise_if_closed=False)
    assert data.shape == (2, 10)
    _assert_collected(policy, data)


@pytest.mark.parametrize("reset_at_each_iter", [True, False])
def test_collector_carries_states(reset_at_each_iter):
    policy = _policy("lstm")
    make_collector: Any = Collector
    collector = make_collector(
        _outside(SerialEnv),
        policy,
        frames_per_batch=14,
        total_frames=42,
        reset_at_each_iter=reset_at_each_iter,
    )
    try:
        for data in collector:
            assert data.shape == (2, 7)
            _assert_collected(policy, data)
    finally:
        collector.shutdown()


@pytest.mark.slow
def test_collectors_in_other_processes_carry_states():
    policy = _policy("lstm")
    make_collector: Any = MultiSyncCollector
    collector = make_collector(
        [_with_memory], policy, frames_per_batch=10, total_frames=20, cat_results="stack"
    )
    try:
        for data in collector:
            _assert_collected(policy, data.reshape(1, -1))
    finally:
        collector.shutdown()


@in_both_kinds
def test_policy_of_several_modules_equals_them_one_by_one(kind):
    names = [f"h{i}" for i in range(len(KINDS[kind].DEFAULT_IN_KEYS))]
    other = make(
        kind,
        input_size=5,
        in_keys=["embed", *names],
        out_keys=["y", *(("next", name) for name in names)],
    )
    head = TensorDictModule(nn.Linear(5, 2), ["y"], ["logits"])
    first = make(kind)
    policy = chain(first, other, head)
    data = batch(first)
    for name in names:
        data[name] = torch.randn(2, 7, 1, 5)
    separate = other(first(data[:, 0].clone()).exclude("next"))
    together = policy(data[:, 0].clone())
    assert torch.equal(together["y"], separate["y"])
    out = recurrently(policy, data)
    assert out["logits"].shape == (2, 7, 2)
    assert {("next", key) for key in (*first.state_keys, *names)} <= set(out.keys(True))
