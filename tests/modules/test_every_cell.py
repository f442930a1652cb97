"""Every cell that ``recurrent_module`` makes can do what every other one can.

Cells come from ``CellName``: a new one is tested here with no further line.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchrl.data import OneHot
from torchrl.envs import GymEnv, TransformedEnv
from torchrl.objectives import DQNLoss, SoftUpdate

from rnnkeys import (
    CellName,
    StatefulPolicy,
    check_recurrent_policy,
    drqn_policy,
    export_step,
    get_env_transforms_from_module,
    recurrent_module,
    set_recurrent_mode,
)
from rnnkeys.modules import RecurrentNetwork
from rnnkeys.objectives import R2D2Loss, recurrent_loss
from rnnkeys.transforms import BurnIn, RefreshStates
from tests.support.recurrent import F64, batch, by_hand, chain, outputs, recurrently
from tests.support.tolerances import assert_equal

CELLS = get_args(CellName)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
with_every_cell = pytest.mark.parametrize("cell", CELLS)
with_every_state = pytest.mark.parametrize("cell", [c for c in CELLS if c != "feed_forward"])


def make(cell: str, **arguments: Any) -> Any:
    """Return a module of two layers in float64, unless arguments say otherwise."""
    keys = {"in_key": "observation", "out_key": "embed"}
    return recurrent_module(cell, 3, 6, **{"num_layers": 2, "dtype": F64, **keys, **arguments})


def make_policy(cell: str) -> Any:
    return drqn_policy(OneHot(2), (4,), cell=cell, hidden_size=8, encoder_sizes=(), num_layers=2)


def make_env(policy: Any) -> TransformedEnv:
    transforms: Any = get_env_transforms_from_module(policy)
    return TransformedEnv(GymEnv("CartPole-v1"), transforms)


def play(policy: Any, steps: int = 48) -> Any:
    """Return steps ``[T]`` of several episodes, played one step at a time."""
    env = make_env(policy)
    env.set_seed(1)
    with torch.no_grad():
        return env.rollout(steps, policy, break_when_any_done=False)


def gradients(module: Any, out: Any, *leaves: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    values = [value for value in outputs(module, out).values() if value.requires_grad]
    cotangents = [torch.randn(value.shape, dtype=value.dtype) for value in values]
    inputs = [*leaves, *module.parameters()]
    return list(torch.autograd.grad(values, inputs, cotangents, materialize_grads=True))


@with_every_state
@pytest.mark.parametrize("shape", [(2, 7), (1, 7), (3, 1)])
def test_cell_sequence_equals_single_steps_with_agents_and_nested_keys(cell, shape):
    module = make(
        cell,
        in_key=("agents", "observation"),
        out_key=("agents", "embed"),
        state_key=("agents", "state"),
        state_grad=True,
    )
    data = batch(module, shape, agents=(3,))
    leaves = [data.get(key).requires_grad_() for key in module.in_keys[:-1]]
    sequence, steps = recurrently(module, data), by_hand(module, data)
    for name, value in outputs(module, sequence).items():
        assert_equal(value, outputs(module, steps)[name], F64, name)
    pairs = (gradients(module, sequence, *leaves), gradients(module, steps, *leaves))
    for actual, expected in zip(*pairs, strict=True):
        if expected.any():  # none flows through one step to some parameters
            assert_equal(actual, expected, F64)


@with_every_state
def test_cell_nan_in_an_episode_stays_in_it(cell):
    module = make(cell)
    data = batch(module, (2, 12), flag_rate=0.0)
    data["is_init"][:, 6] = True
    expected = recurrently(module, data)["embed"]
    data["observation"][0, 2] = torch.nan
    actual = recurrently(module, data)["embed"]
    assert_equal(actual[:, 6:], expected[:, 6:], F64)
    assert actual[0, 2:6].isnan().any(-1).all()


@with_every_state
def test_cell_primer_makes_the_states_that_the_module_reads(cell):
    module = make(cell, state_key="memory")
    primers = module.make_tensordict_primer().primers
    shapes = {str(key): tuple(spec.shape) for key, spec in primers.items(True, True)}
    sizes = zip(module.state_keys, module.state_sizes, strict=True)
    assert shapes == {key: (2, size) for key, size in sizes}
    assert all(key.startswith("memory") for key in shapes)
    assert module.out_keys[1:] == [("next", key) for key in shapes]


@with_every_state
@pytest.mark.parametrize("state_grad", [False, True])
def test_cell_states_carry_gradients_only_if_asked_for(cell, state_grad):
    module = make(cell, state_grad=state_grad)
    out = recurrently(module, batch(module))
    assert out["embed"].requires_grad
    assert all(out.get(key).requires_grad == state_grad for key in module.out_keys[1:])


@with_every_cell
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_cell_output_and_states_have_the_parameters_dtype(cell, dtype):
    module = make(cell, dtype=dtype)
    for out in (recurrently(module, batch(module)), by_hand(module, batch(module))):
        assert all(value.dtype == dtype for value in outputs(module, out).values())
        assert out["embed"].isfinite().all()


@with_every_cell
def test_cell_under_autocast_keeps_states_in_the_parameters_dtype(cell):
    module = make(cell, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = recurrently(module, batch(module))
    assert out["embed"].dtype == torch.bfloat16
    assert all(out.get(key).dtype == torch.float32 for key in module.out_keys[1:])


@with_every_cell
def test_cell_dropout_acts_between_layers_in_training_only(cell):
    module = make(cell, dropout=0.5)
    data = batch(module)
    first, second = recurrently(module, data)["embed"], recurrently(module, data)["embed"]
    assert not torch.equal(first, second)
    module.eval()
    assert torch.equal(recurrently(module, data)["embed"], recurrently(module, data)["embed"])


@with_every_cell
def test_cell_maps_over_parameters_of_an_ensemble(cell):
    module = make(cell)
    data = batch(module)
    values = {k: torch.stack([v.detach(), v.detach() / 2]) for k, v in module.named_parameters()}

    def call(parameters: dict[str, Tensor]) -> Tensor:
        return recurrently(lambda td: torch.func.functional_call(module, parameters, (td,)), data)[
            "embed"
        ]

    expected = torch.stack([call({k: v[i] for k, v in values.items()}) for i in range(2)])
    assert_equal(torch.vmap(call)(values), expected, F64)


@with_every_cell
def test_cell_checkpoints_restore_the_module(cell):
    module, other = make(cell), make(cell)
    data = batch(module)
    expected = recurrently(module, data)["embed"]
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for same in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(recurrently(same, data)["embed"], expected)


@with_every_state
def test_cell_in_an_activation_checkpoint_has_the_gradients_without(cell):
    module = make(cell, dtype=torch.float32)
    data = batch(module, (3, 12), flag_rate=0.3).exclude(*module.state_keys)

    @set_recurrent_mode(True)
    def run(x: Tensor) -> Tensor:
        return module(data.clone().set("observation", x))["embed"].square().sum()

    leaves = [data["observation"].requires_grad_(), *module.parameters()]
    kept: Any = checkpoint(run, leaves[0], use_reentrant=False)
    pairs = (torch.autograd.grad(loss, leaves) for loss in (kept, run(leaves[0])))
    for actual, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(actual, expected)


@with_every_state
def test_cell_burn_in_remaining_steps_equal_the_whole_sequence(cell):
    module = make(cell)
    data = batch(module, (3, 9))
    rest = recurrently(module, BurnIn(module, 4)(data.clone()))
    assert_equal(rest["embed"], by_hand(module, data)["embed"][:, 4:], F64)


@with_every_state
def test_cell_refreshed_states_are_those_of_the_whole_sequence(cell):
    module = make(cell)
    data = batch(module, (3, 9), flag_rate=0.0)
    expected = by_hand(module, data)
    fresh: Any = RefreshStates(module)(data.clone())
    for key in module.state_keys:
        assert_equal(fresh.get(key)[:, 1:], expected.get(("next", key))[:, :-1], F64)


@with_every_state
def test_cell_policy_has_no_problem_with_environment_batch_and_loss(cell):
    policy = make_policy(cell)
    loss = recurrent_loss(DQNLoss(policy, action_space="one-hot", delay_value=True))
    SoftUpdate(loss, eps=0.9)
    report = check_recurrent_policy(policy, make_env(policy), play(policy)[None], loss)
    assert not report, str(report)


@with_every_cell
def test_cell_stateful_policy_plays_as_sequences_compute(cell):
    policy = make_policy(cell)
    played = play(policy)
    player = StatefulPolicy(policy, action_key="action_value", env=False)
    values = []
    for observation, is_init in zip(played["observation"], played["is_init"], strict=True):
        if is_init and values:
            player.episode_over(torch.ones((), dtype=torch.bool))
        values.append(torch.as_tensor(player(observation)))
    torch.testing.assert_close(torch.stack(values), played["action_value"], **CLOSE)


@with_every_state
@pytest.mark.parametrize("kind", ["dqn", "r2d2"])
def test_cell_losses_reach_every_parameter_of_the_recurrent_layers(cell, kind):
    policy = make_policy(cell)
    data = play(policy)[None]
    if kind == "dqn":
        loss: Any = recurrent_loss(DQNLoss(policy, action_space="one-hot", delay_value=True))
    else:
        loss = R2D2Loss(policy, burn_in=4, n_steps=2)
    SoftUpdate(loss, eps=0.9)
    loss(data)["loss"].backward()
    gradients = [p.grad for p in loss.parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in gradients)
    assert sum(bool(grad.any()) for grad in gradients) >= len(gradients) - 1


def make_chain() -> Any:
    """Return layers of all cells, one after the other: to export each alone takes long."""
    layers, key = [], "observation"
    for cell in CELLS:
        keys: dict[str, Any] = {
            "in_key": key,
            "out_key": f"{cell}_output",
            "state_key": f"{cell}_state",
        }
        layers.append(recurrent_module(cell, 6, 6, **keys))
        key = keys["out_key"]
    return chain(*layers), key


def step_by_step(policy: Any, output: str, observations: Tensor, flags: Tensor) -> list[Tensor]:
    """Run ``[T, N, I]`` one step at a time, and return the outputs."""
    state_keys = RecurrentNetwork(policy).state_keys
    step = TensorDict(batch_size=observations.shape[1:2])
    outs = []
    for observation, is_init in zip(observations, flags, strict=True):
        out = policy(step.update({"observation": observation, "is_init": is_init}))
        step = out["next"].select(*state_keys)
        outs.append(out[output])
    return outs


def test_cell_exported_plays_as_the_module(tmp_path: Path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    policy, output = make_chain()
    example = TensorDict(observation=torch.zeros(3, 6), batch_size=[3])
    program = export_step(policy, example, outputs=[output], onnx=tmp_path / "step.onnx").module()
    session = runtime.InferenceSession(tmp_path / "step.onnx")
    names = [one.name for one in session.get_inputs()]

    def run_onnx(*tensors: Tensor) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    sizes = [size for layer in policy for size in layer.state_sizes]
    observations, flags = torch.randn(8, 3, 6), torch.rand(8, 3, 1) < 0.3
    flags[0] = True
    with torch.no_grad():
        expected = step_by_step(policy, output, observations, flags)
        for run in (program, run_onnx):
            states = [torch.full((3, 1, size), torch.nan) for size in sizes]
            for t, out in enumerate(expected):
                actual, *states = run(observations[t], flags[t], *states)
                torch.testing.assert_close(actual, out, **CLOSE)


@pytest.mark.parametrize("cell", ["rnn", "mingru", "minlstm", "lru", "s5", "s6", "ffm"])
def test_module_signature_lists_every_argument_by_name(cell: str) -> None:
    kind: Any = type(make(cell))
    arguments = inspect.signature(kind).parameters
    assert {*inspect.signature(kind.cell_class).parameters, "in_key", "state_key"} <= {*arguments}
    assert ("block" in arguments) == (cell != "rnn")
    defaults = {k: v.default for k, v in arguments.items() if v.default is not v.empty}
    keys = {"in_key": "observation", "out_key": "embed"}
    assert isinstance(kind(3, 6, **{**defaults, **keys}), kind)
