"""Cells that torch has no class for keep the contract of the others: the library's and users'."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torchrl.collectors import Collector
from torchrl.data import Binary, Bounded, MultiOneHot, OneHot
from torchrl.envs import GymEnv, TransformedEnv
from torchrl.modules import QValueModule
from torchrl.objectives import DQNLoss, SoftUpdate

from rnnkeys import (
    CellModule,
    GatedCell,
    drqn_policy,
    get_env_transforms_from_module,
    recurrent_module,
    set_recurrent_mode,
)
from rnnkeys.cells import LAYER_NORM_LSTM_CELL
from rnnkeys.objectives import recurrent_loss
from tests.support.recurrent import BACKENDS, F64, batch, by_hand, chain, recurrently
from tests.support.tolerances import assert_equal

State = tuple[Tensor, ...]


class MinimalGatedUnit(GatedCell):
    name = "mgu"
    num_gates = 2
    state_names = ("h",)

    def pointwise(self, gates_x: Tensor, gates_h: Tensor, state: State) -> State:
        x_f, x_n = gates_x.chunk(2, -1)
        h_f, h_n = gates_h.chunk(2, -1)
        f = (x_f + h_f).sigmoid()
        return ((1 - f) * state[0] + f * (x_n + f * h_n).tanh(),)


class TwoStates(nn.Module):
    """A step whose output is no state, and whose states differ in size."""

    state_sizes = {"slow": 4, "clock": 1}

    def __init__(self, input_size: int = 3, output_size: int = 5) -> None:
        super().__init__()
        self.input_size = input_size
        self.see = nn.Linear(input_size + 4, 4)
        self.out = nn.Linear(5, output_size)

    def forward(self, x: Tensor, slow: Tensor, clock: Tensor) -> State:
        slow = torch.lerp(slow, self.see(torch.cat([x, slow], -1)).tanh(), 0.3)
        clock = 0.9 * clock + 0.1 * x.mean(-1, keepdim=True)
        return self.out(torch.cat([slow, clock], -1)), slow, clock


KEYS: Any = {"in_key": "observation", "out_key": "embed"}
KINDS: dict[str, Any] = {
    "lstm_ln": lambda **k: recurrent_module("lstm_ln", 3, 5, num_layers=2, **KEYS, **k),
    "cell": lambda **k: CellModule(MinimalGatedUnit(), 3, 5, 2, **KEYS, **k),
    "step": lambda **k: CellModule(TwoStates(), **KEYS, **k),
    "steps": lambda **k: CellModule([TwoStates(), TwoStates(5)], **KEYS, **k),
}
of_every_kind = pytest.mark.parametrize("kind", KINDS)
in_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def _run(module: Any, data: TensorDict, how: Any, cotangent: Tensor) -> dict[str, Tensor]:
    """Outputs, states, and the gradients of inputs, stored states and parameters."""
    module.zero_grad()
    keys = (module.in_keys[0], *module.state_keys)
    data = data.clone()
    leaves = {str(k): data.get(k).requires_grad_() for k in keys}
    out = how(module, data)
    (out["embed"] * cotangent).sum().backward()
    results = {str(k): out.get(k).detach() for k in module.out_keys}
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    grads.update((name, p.grad) for name, p in module.named_parameters())
    return {**results, **{f"gradient of {k}": g for k, g in grads.items() if g is not None}}


class Trace(nn.Module):
    """Changes its state in place, and returns it as the output."""

    input_size, state_sizes = 2, {"trace": 2}

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, trace: Tensor) -> State:
        trace *= self.decay
        trace += x
        return trace, trace


@in_every_backend
def test_step_module_may_change_its_state_in_place(backend):
    module = CellModule(Trace(), **KEYS, recurrent_backend=backend)
    data = batch(module, shape=(3, 7))
    before = data.clone()
    with torch.no_grad():
        actual, expected = recurrently(module, data), by_hand(module, data)
    for key in module.out_keys:
        assert_equal(actual.get(key), expected.get(key), torch.float32, str(key))
    assert (data == before).all()


@pytest.mark.parametrize("agents", [(), (2,)])
@in_every_backend
@of_every_kind
def test_sequences_equal_steps_with_every_gradient(kind, backend, agents):
    module = KINDS[kind](recurrent_backend=backend).double()
    data = batch(module, shape=(3, 7), agents=agents)
    cotangent = torch.randn(3, 7, *agents, 5, dtype=F64)
    actual = _run(module, data, recurrently, cotangent)
    expected = _run(module, data, by_hand, cotangent)
    assert actual.keys() == expected.keys() and len(actual) > 6
    for name in actual:
        assert_equal(actual[name], expected[name], F64, name)


@in_every_backend
@of_every_kind
def test_custom_cell_segment_start_blocks_earlier_steps_and_nan(kind, backend):
    module = KINDS[kind](recurrent_backend=backend)
    data = batch(module, flag_rate=0.0)
    data["is_init"][:, 4] = True
    clean = recurrently(module, data)
    data["observation"][:, :4] = float("nan")
    dirty = recurrently(module, data)
    for key in module.out_keys:
        assert torch.equal(dirty.get(key)[:, 4:], clean.get(key)[:, 4:])
        assert dirty.get(key)[:, :4].isnan().any()


@in_every_backend
@of_every_kind
def test_custom_cell_of_an_empty_batch_returns_empty_outputs(kind, backend):
    module = KINDS[kind](recurrent_backend=backend)
    out = recurrently(module, batch(module, shape=(0, 4)))
    assert out["embed"].shape == (0, 4, 5)
    out["embed"].sum().backward()


@of_every_kind
def test_custom_cell_sequences_equal_collected_steps(kind):
    module = KINDS[kind]()
    head = TensorDictModule(nn.Linear(5, 2), ["embed"], ["action_value"])
    see = TensorDictModule(nn.Linear(4, 3), ["observation"], ["observation_"])
    policy = chain(see, _renamed(module), head, QValueModule(action_space="one-hot"))
    env = TransformedEnv(GymEnv("CartPole-v1"), get_env_transforms_from_module(policy))
    env.set_seed(0)
    data = next(iter(Collector(env, policy, frames_per_batch=200, total_frames=200)))
    assert data["next", "done"].any()
    again = recurrently(policy, data)
    for key in ("action_value", *module.out_keys[1:]):
        assert_equal(again.get(key), data.get(key), torch.float32, str(key))


def _renamed(module: Any) -> Any:
    module.in_keys[0] = "observation_"
    return module


@of_every_kind
def test_copies_and_pickles_read_their_own_parameters(kind):
    module = KINDS[kind]()
    data = batch(module)
    before = recurrently(module, data)["embed"]
    for duplicate in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for parameter in duplicate.parameters():
            nn.init.zeros_(parameter)
        assert not torch.equal(recurrently(duplicate, data)["embed"], before)
        assert torch.equal(recurrently(module, data)["embed"], before)
        duplicate.load_state_dict(module.state_dict(), strict=True)
        assert torch.equal(recurrently(duplicate, data)["embed"], before)


@of_every_kind
def test_vmap_over_parameters_equals_one_at_a_time(kind):
    modules = [KINDS[kind]() for _ in range(2)]
    data = batch(modules[0])
    stacked = stack_module_state(modules)

    def run(parameters: Any, buffers: Any) -> Tensor:
        with set_recurrent_mode(True):
            return functional_call(modules[0], (parameters, buffers), (data.clone(),))["embed"]

    together = vmap(run)(*stacked)
    for one, module in zip(together, modules, strict=True):
        assert_equal(one, recurrently(module, data)["embed"], torch.float32)


@of_every_kind
def test_loss_trains_the_module_with_a_target_network(kind):
    module = KINDS[kind]()
    head = TensorDictModule(nn.Linear(5, 2), ["embed"], ["action_value"])
    policy = chain(module, head, QValueModule(action_space="categorical"))
    loss = recurrent_loss(DQNLoss(policy, action_space="categorical", delay_value=True))
    SoftUpdate(loss, tau=0.5)
    data = recurrently(policy, batch(module, states=False))
    data["next", "observation"] = torch.randn(2, 7, 3)
    data["next", "reward"] = torch.randn(2, 7, 1)
    data["next", "done"] = data["next", "terminated"] = torch.zeros(2, 7, 1, dtype=torch.bool)
    data["next", "is_init"] = torch.zeros(2, 7, 1, dtype=torch.bool)
    loss(data)["loss"].backward()
    grads = [p.grad for p in loss.parameters() if p.requires_grad]
    assert all(g is not None and g.any() for g in grads)


@of_every_kind
def test_autocast_computes_in_its_dtype_and_keeps_states_in_the_parameters(kind):
    module = KINDS[kind]()
    data = batch(module)
    with torch.autocast("cpu", torch.bfloat16):
        out = recurrently(module, data)
    assert out["embed"].dtype == torch.bfloat16
    assert all(out.get(key).dtype == torch.float32 for key in module.out_keys[1:])
    expected = recurrently(module, data)["embed"]
    assert_equal(out["embed"].float(), expected, torch.bfloat16)


def test_norms_start_as_the_identity_and_weights_within_their_bound():
    parameters = dict(recurrent_module("lstm_ln", 3, 16, **KEYS).named_parameters())
    for name, p in parameters.items():
        if "norm" in name:
            assert (p == float("weight" in name)).all()
        else:
            assert 0.2 < p.abs().max() <= 0.25 and p.min() < -0.15


def test_dropout_runs_between_layers_in_training_and_never_on_states():
    torch.manual_seed(1)
    module = recurrent_module("lstm_ln", 3, 64, num_layers=2, dropout=0.5, **KEYS)
    data = batch(module)
    run = [recurrently(module, data) for _ in range(2)]
    key = module.out_keys[1]
    assert torch.equal(run[0].get(key)[..., 0, :], run[1].get(key)[..., 0, :])
    assert not torch.equal(run[0]["embed"], run[1]["embed"])
    module.eval()
    assert torch.equal(recurrently(module, data)["embed"], recurrently(module, data)["embed"])


def test_step_module_trial_call_leaves_no_trace():
    class Noisy(TwoStates):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor, slow: Tensor, clock: Tensor) -> State:
            self.calls += 1
            return super().forward(x + torch.rand_like(x), slow, clock)

    step = Noisy()
    before = torch.get_rng_state()
    CellModule(step, **KEYS)
    assert step.calls == 0 and step.training
    assert torch.equal(torch.get_rng_state(), before)


class Wrong(nn.Module):
    """Return what the test passes."""

    input_size, state_sizes = 3, {"h": 5}

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor, h: Tensor) -> Any:
        return self.result(x, h)


class Taken(MinimalGatedUnit):
    name = "gru"


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a lone tensor": (
        lambda: Wrong(lambda x, h: h),
        ValueError,
        r"\(output \[2, O\], h \[2, 5\]\)",
    ),
    "no state": (lambda: Wrong(lambda x, h: (h,)), ValueError, r"returned \[\(2, 5\)\]"),
    "a state of another size": (
        lambda: Wrong(lambda x, h: (h, h[:, :4])),
        ValueError,
        r"returned \[\(2, 5\), \(2, 4\)\]",
    ),
    "no sizes": (lambda: nn.Linear(3, 5), ValueError, "input_size must be passed"),
    "torch's cell": (lambda: nn.GRUCell(3, 5), TypeError, "GRUModule"),
    "torch's layer": (lambda: nn.LSTM(3, 5), TypeError, "LSTMModule"),
    "no module": (lambda: "lstm", TypeError, "rnnkeys.cells.Cell"),
    "an empty list": (list, TypeError, "one for each layer"),
    "the name of another cell": (lambda: Taken(), ValueError, "name='gru'"),
    "outputs that differ": (
        lambda: [TwoStates(), TwoStates(5, 6)],
        ValueError,
        "layer 1 has 6, those before 5",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_cell_module_that_cannot_run_raises_at_construction(case):
    make, error, text = BAD[case]
    sizes: Any = (3, 5) if case == "the name of another cell" else ()
    with pytest.raises(error, match=text):
        CellModule(make(), *sizes, **KEYS)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"hidden_size": 5}, "hidden_size=5 is for cells"),
        ({"num_layers": 2}, "a list of modules"),
        ({"state_sizes": {}}, "at least one state"),
        ({"state_sizes": {"h": 0}}, r"state_sizes\['h'\]"),
        ({"recurrent_recompute": "full", "recurrent_backend": "scan"}, "not for a step module"),
    ],
)
def test_step_module_invalid_argument_raises(arguments, text):
    with pytest.raises(ValueError, match=text):
        CellModule(TwoStates(), **KEYS, **arguments)


def test_cell_module_invalid_argument_raises():
    with pytest.raises(ValueError, match="state_sizes is for step modules"):
        CellModule(LAYER_NORM_LSTM_CELL, 3, 5, state_sizes={"h": 5}, **KEYS)
    with pytest.raises(ValueError, match="hidden_size must be passed"):
        CellModule(LAYER_NORM_LSTM_CELL, 3, **KEYS)
    with pytest.raises(RuntimeError, match="runs LSTM and GRU, got 'lstm_ln'"):
        recurrent_module("lstm_ln", 3, 5, recurrent_backend="triton", **KEYS)


@pytest.mark.parametrize("kind", ["lstm", "gru", "lstm_ln"])
def test_recurrent_module_makes_the_named_class(kind):
    module = recurrent_module(kind, 3, 5, num_layers=2, dropout=0.1, dtype=F64, **KEYS)
    assert module.cell.name == kind
    assert module.layers.num_layers == 2 and module.layers.dropout == 0.1
    assert next(module.parameters()).dtype == F64
    with pytest.raises(ValueError, match="kind must be one of 'lstm', 'gru', 'rnn', 'lstm_ln'"):
        recurrent_module("esn", 3, 5, **KEYS)


@pytest.mark.parametrize("cell", ["lstm", "gru", "lstm_ln", "feed_forward"])
@pytest.mark.parametrize("shape", [(4,), (1, 40, 44)])
def test_drqn_policy_acts_and_runs_sequences(cell, shape):
    policy = drqn_policy(OneHot(3), shape, cell=cell, hidden_size=8, encoder_sizes=(16,))
    frames = len(shape) == 3
    seen = torch.randint(256, (2, 5, *shape)).byte() if frames else torch.randn(2, 5, *shape)
    data = TensorDict({"observation": seen, "is_init": torch.zeros(2, 5, 1).bool()}, [2, 5])
    out = recurrently(policy, data)
    assert out["action_value"].shape == (2, 5, 3)
    assert (out["action"].argmax(-1) == out["action_value"].argmax(-1)).all()
    first = TensorDict({"observation": seen[:, 0], "is_init": torch.ones(2, 1).bool()}, [2])
    assert_equal(policy(first)["action_value"], out["action_value"][:, 0], torch.float32)


def test_dueling_head_splits_values_from_advantages():
    head: Any = drqn_policy(OneHot(3), (4,), hidden_size=8)[2].module
    x = torch.randn(5, 8)
    assert_equal(head(x).mean(-1, keepdim=True), head.value(x), torch.float32)
    plain = drqn_policy(OneHot(3), (4,), hidden_size=8, dueling=False)
    assert not hasattr(plain[2].module, "advantage")


def test_drqn_policy_with_wrong_arguments_is_rejected_by_name():
    for arguments, text in (
        ((Bounded(-1, 1, torch.Size([1])), (4,)), "Got Bounded"),
        ((Binary(3), (4,)), "one of several discrete actions.*Got Binary"),
        ((MultiOneHot([2, 3]), (4,)), "list all their combinations"),
        ((OneHot(2), (4, 4)), r"Got \(4, 4\)"),
        ((OneHot(2), (1, 20, 84)), "at least 36"),
    ):
        with pytest.raises(ValueError, match=text):
            drqn_policy(*arguments)
    with pytest.raises(ValueError, match=r"encoder_sizes must end"):
        drqn_policy(OneHot(2), (4,), encoder=nn.Linear(4, 7), encoder_sizes=())
