"""Bad input raises: the error names it and the remedy, and the data is unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn import RNNBase

import rnnkeys
from rnnkeys import set_recurrent_mode
from rnnkeys.cells import LAYER_NORM_LSTM_CELL
from tests.support.recurrent import KINDS, batch, make

in_both_kinds = pytest.mark.parametrize("kind", KINDS)
in_both_modes = pytest.mark.parametrize("recurrent", [True, False], ids=["sequences", "step"])


def _check_raises(
    module: Any,
    data: TensorDictBase,
    error: type[Exception],
    *words: str,
    recurrent: bool,
    named: bool = True,
) -> None:
    """Check that a call raises an error with these words and changes nothing."""
    # What a module would overwrite is there already.
    for key in module.out_keys:
        data.set(key, torch.full((*data.batch_size, 1), 7.0))
    before, objects = data.clone(), {key: data.get(key) for key in data.keys(True, True)}
    with set_recurrent_mode(recurrent), pytest.raises(error) as caught:
        module(data)
    message = str(caught.value)
    for word in (*words, *([type(module).__name__] if named else [])):
        assert word in message, message
    assert set(data.keys(True, True)) == set(objects)
    for key, value in objects.items():
        assert data.get(key) is value
        assert torch.equal(value, before.get(key))


@in_both_kinds
@in_both_modes
def test_module_without_input_raises(kind, recurrent):
    module = make(kind)
    data = batch(module).exclude("observation")
    _check_raises(
        module, data, KeyError, "'observation'", "in_keys", "is_init", recurrent=recurrent
    )


@in_both_kinds
@in_both_modes
def test_module_without_is_init_raises(kind, recurrent):
    module = make(kind)
    data = batch(module).exclude("is_init")
    remedies = ("'is_init'", "InitTracker", "get_env_transforms_from_module", "[init-key]")
    _check_raises(module, data, KeyError, *remedies, recurrent=recurrent, named=False)


@in_both_kinds
@in_both_modes
def test_module_with_is_init_elsewhere_raises(kind, recurrent):
    module = make(kind, init_key=("agents", "is_init"))
    data = batch(make(kind))
    expected = ("('agents', 'is_init')", "init_key='is_init'")
    _check_raises(module, data, KeyError, *expected, recurrent=recurrent, named=False)


@in_both_modes
@pytest.mark.parametrize("missing", ["h", "c"])
def test_lstm_with_one_state_only_raises(missing, recurrent):
    module = make("lstm")
    data = batch(module).exclude(f"recurrent_state_{missing}")
    there = "c" if missing == "h" else "h"
    words = (f"recurrent_state_{there}", f"not ['recurrent_state_{missing}']")
    _check_raises(
        module, data, RuntimeError, *words, "get_primers_from_module", recurrent=recurrent
    )


@in_both_kinds
def test_module_with_lost_states_warns_once(kind, recwarn):
    module = make(kind)
    step = batch(module, (2,), states=False, flag_rate=1.0)
    module(step.clone())
    assert not recwarn.list, "an episode starts from zeros, state or no state"
    step["is_init"][0] = False
    with pytest.warns(UserWarning, match="get_primers_from_module") as caught:
        module(step.clone())
    assert module.state_keys[0] in str(caught[0].message)
    module(step.clone())
    assert not recwarn.list


@in_both_kinds
@in_both_modes
@pytest.mark.parametrize("shape", [(2, 7, 4), (2, 7), (2, 7, 3, 1)])
def test_input_of_wrong_shape_raises(kind, recurrent, shape):
    module = make(kind)
    data = batch(module, states=False).set("observation", torch.zeros(shape))
    words = ("'observation'", str(shape), "input_size=3")
    _check_raises(module, data, RuntimeError, *words, recurrent=recurrent)


@in_both_kinds
@in_both_modes
@pytest.mark.parametrize("shape", [(2, 7, 5), (2, 7, 1, 4), (2, 7, 2, 5), (2, 7, 3, 1, 5)])
def test_state_of_wrong_shape_raises(kind, recurrent, shape):
    module = make(kind)
    key = module.state_keys[-1]
    data = batch(module).set(key, torch.zeros(shape))
    words = (repr(key), str(shape), "(2, 7, 1, 5)", "num_layers=1", "get_primers_from_module")
    _check_raises(module, data, RuntimeError, *words, recurrent=recurrent)


@in_both_kinds
@in_both_modes
def test_flags_of_a_wrong_number_of_agents_are_rejected(kind, recurrent):
    module = make(kind)
    data = batch(module).set("is_init", torch.zeros(2, 7, 3, 1).bool())
    words = ("'is_init'", "(2, 7, 3, 1)", "(2, 7, 1) (shared)", "InitTracker")
    _check_raises(module, data, RuntimeError, *words, recurrent=recurrent)


@in_both_kinds
@in_both_modes
def test_flags_with_a_last_dimension_of_two_are_rejected(kind, recurrent):
    module = make(kind)
    data = batch(module).set("is_init", torch.zeros(2, 7, 2).bool())
    words = ("'is_init'", "[2, 7, 2]", ".unsqueeze(-1)", "[init-shape]")
    _check_raises(module, data, ValueError, *words, recurrent=recurrent, named=False)


@in_both_kinds
@in_both_modes
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_flags_of_another_dtype_than_bool_are_rejected(kind, recurrent, dtype):
    module = make(kind)
    data = batch(module)
    data.set("is_init", data.get("is_init").to(dtype))
    words = ("'is_init'", str(dtype), ".bool()", "[init-dtype]")
    _check_raises(module, data, TypeError, *words, recurrent=recurrent, named=False)


@in_both_kinds
def test_sequences_without_time_dimension_raise(kind):
    module = make(kind)
    words = ("time dimension", "batch size []", "set_recurrent_mode(False)")
    _check_raises(module, batch(module, ()), ValueError, *words, recurrent=True)


@in_both_kinds
def test_sequences_with_time_not_last_raise(kind):
    module = make(kind)
    data = batch(module)
    data.names = ["time", None]
    with set_recurrent_mode(True), pytest.raises(ValueError) as caught:
        module(data.clone())
    for word in ("[2, 7]", "['time', None]", "transpose(0, -1)"):
        assert word in str(caught.value)
    turned = data.transpose(0, -1)
    with set_recurrent_mode(True):
        assert module(turned.clone())["embed"].shape == (7, 2, 5)
    assert module(data.clone())["embed"].shape == (2, 7, 5), "a step has no time"


@in_both_kinds
@pytest.mark.parametrize("masked", [True, False])
def test_single_transitions_as_sequences_are_rejected(kind, masked):
    module = make(kind)
    data = batch(module, flag_rate=0.0)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2, 3]])
    data["collector", "traj_ids"] = ids
    if masked:
        mask = torch.ones(2, 7, dtype=torch.bool)
        mask[0, 3] = False
        data["collector", "mask"] = mask
    with set_recurrent_mode(True), pytest.raises(ValueError) as caught:
        module(data.clone())
    where = "1 of 12 steps.*the first at [1, 6]" if masked else "2 of 12 steps.*the first at [0, 3]"
    for word in (*where.split(".*"), "'is_init'", "SliceSampler", "[continuity]"):
        assert word in str(caught.value)
    data["is_init"][0, 3] = data["is_init"][1, 6] = True
    with set_recurrent_mode(True):
        module(data)


@in_both_kinds
@in_both_modes
def test_input_of_float64_raises(kind, recurrent):
    module = make(kind)
    data = batch(module)
    data["observation"] = data["observation"].double()
    kept = data.clone()
    with set_recurrent_mode(recurrent), pytest.raises(RuntimeError, match="float64.*float32"):
        module(data)
    assert set(data.keys(True, True)) == set(kept.keys(True, True))


_BAD: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "no input size": ({"input_size": None}, ValueError, ("input_size=None", "positive int")),
    "no hidden size": ({"hidden_size": None}, ValueError, ("hidden_size must be passed",)),
    "a size that is no number": ({"input_size": "3"}, ValueError, ("input_size='3'",)),
    "a size of zero": ({"hidden_size": 0}, ValueError, ("hidden_size=0",)),
    "time first": ({"batch_first": False}, ValueError, ("batch_first=False", "leave it True")),
    "the future": ({"bidirectional": True}, ValueError, ("bidirectional=True", "future")),
    "a backend": (
        {"recurrent_backend": "cudnn"},
        ValueError,
        ("recurrent_backend", "'loop'", "Got 'cudnn'"),
    ),
    "a recompute": ({"recurrent_recompute": "half"}, ValueError, ("recurrent_recompute", "'full'")),
    "a precision": (
        {"recurrent_matmul_precision": "fp8"},
        ValueError,
        ("recurrent_matmul_precision='fp8'", "'tf32x3'"),
    ),
    "a compute dtype": (
        {"recurrent_compute_dtype": torch.int8},
        ValueError,
        ("recurrent_compute_dtype", "torch.int8", "torch.bfloat16"),
    ),
    "a default mode": (
        {"default_recurrent_mode": "parallel"},
        ValueError,
        ("default_recurrent_mode='parallel'", "'recurrent'"),
    ),
    "recompute of pad": (
        {"recurrent_recompute": "full", "recurrent_backend": "pad"},
        ValueError,
        ("recurrent_recompute='full'", "recurrent_backend='scan'"),
    ),
    "both kinds of in keys": (
        {"in_key": "observation", "in_keys": ["observation", "h"]},
        ValueError,
        ("Either in_keys or in_key", "in_key=observation"),
    ),
    "neither kind of out keys": (
        {"out_key": None, "out_keys": None},
        ValueError,
        ("Either out_keys or out_key", "out_key=None"),
    ),
    "in keys that are no list": (
        {"in_keys": "observation", "in_key": None},
        TypeError,
        ("incompatible function arguments", "in_keys", "'observation'", "in_key='observation'"),
    ),
    "too few in keys": (
        {"in_keys": ["observation"], "in_key": None},
        ValueError,
        ("in_keys", "['observation']", "init_key="),
    ),
    "too few out keys": (
        {"out_keys": ["embed"], "out_key": None},
        ValueError,
        ("out_keys", "['embed']"),
    ),
    "an input that is the state": (
        {"in_key": "recurrent_state", "init_key": "recurrent_state"},
        ValueError,
        ("in_keys name recurrent_state more than once",),
    ),
}


@pytest.mark.parametrize("name", _BAD)
def test_module_invalid_argument_raises(name):
    arguments, error, words = _BAD[name]
    with pytest.raises(error) as caught:
        make("gru", **arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for it")
@in_both_kinds
def test_module_with_triton_without_a_gpu_raises(kind):
    with pytest.raises(RuntimeError, match="triton"):
        make(kind, recurrent_backend="triton")


@in_both_kinds
def test_sizes_may_be_numpys(kind):
    module = make(kind, input_size=np.int64(3), hidden_size=np.int32(5))
    assert module.layers.input_size == 3


def _layers(kind: str, **arguments: Any) -> RNNBase:
    arguments = {"batch_first": True, "num_layers": 2, **arguments}
    return getattr(nn, kind.upper())(3, 5, **arguments)


_CONTRADICTIONS: dict[str, tuple[Any, str]] = {
    "num_layers": (3, "num_layers=2"),
    "bias": (False, "bias=True"),
    "dropout": (0.5, "dropout=0.0"),
    "bidirectional": (True, "bidirectional=False"),
    "dtype": (torch.float64, "dtype=torch.float32"),
    "device": ("meta", "device='cpu'"),
    "python_based": (True, "make_python_based()"),
    "input_size": (3, "the instance has its sizes"),
    "hidden_size": (5, "the instance has its sizes"),
}


@in_both_kinds
@pytest.mark.parametrize("argument", _CONTRADICTIONS)
def test_layers_that_contradict_an_argument_raise(kind, argument):
    value, has = _CONTRADICTIONS[argument]
    with pytest.raises(ValueError) as caught:
        make(kind, **{kind: _layers(kind), argument: value})
    for word in (argument, f"{kind}=", has):
        assert word in str(caught.value), str(caught.value)


@in_both_kinds
def test_layers_that_agree_with_arguments_are_used(kind):
    layers = _layers(kind, dropout=0.5)
    more = {"num_layers": 2, "dropout": 0.5, "bias": True, "dtype": torch.float32, "device": "cpu"}
    assert make(kind, **{kind: layers}, **more).layers is layers
    own = getattr(rnnkeys, kind.upper())(3, 5)
    assert make(kind, **{kind: own}, python_based=True).layers is own


def _doubled(kind: str) -> RNNBase:
    """Layers that compute something else."""
    base: Any = getattr(nn, kind.upper())

    class Doubled(base):
        def forward(self, *arguments: Any) -> Any:
            y, state = super().forward(*arguments)
            return 2 * y, state

    return Doubled(3, 5, batch_first=True)


@in_both_kinds
@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (lambda kind: nn.Linear(3, 5), ("Linear",)),
        (lambda kind: nn.RNN(3, 5, batch_first=True), ("RNN", "rnnkeys.")),
        (lambda kind: _layers(kind, batch_first=False), ("batch_first=True",)),
        (lambda kind: _layers(kind, bidirectional=True), ("bidirectional=False", "future")),
        (lambda kind: _doubled(kind), ("forward", "Doubled", "CellModule")),
    ],
)
def test_layers_that_cannot_run_raise(kind, layers, words):
    with pytest.raises(ValueError) as caught:
        make(kind, **{kind: layers(kind)})
    for word in (*words, kind):
        assert word in str(caught.value), str(caught.value)


@in_both_kinds
@pytest.mark.parametrize("way", ["assigned", "added", "swapped"])
def test_layers_that_cannot_run_raise_when_assigned(kind, way):
    module = make(kind)
    data, other = batch(module), nn.Linear(3, 5)
    with pytest.raises(ValueError, match=f"{kind}= must be an nn.{kind.upper()}"):
        if way == "assigned":
            setattr(module, kind, other)
        elif way == "added":
            module.add_module(kind, other)
        else:
            module._modules[kind] = other
        module(data)


def test_layers_of_a_cell_replaced_raise():
    module = rnnkeys.CellModule(LAYER_NORM_LSTM_CELL, 3, 5, in_key="observation", out_key="y")
    with pytest.raises(ValueError, match="rnn must be layers as CellModule makes them. Got L"):
        module.rnn = nn.Linear(3, 5)
    module.rnn = copy.deepcopy(module.rnn)


@in_both_kinds
def test_backend_that_is_assigned_later_is_checked(kind):
    module = make(kind)
    with pytest.raises(ValueError, match="'auto', 'loop', 'pad', 'scan', 'triton'. Got 'bogus'"):
        module.recurrent_backend = "bogus"
    assert module.recurrent_backend == "auto"


@in_both_kinds
@in_both_modes
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_on_layers_that_are_never_called_warn(kind, recurrent, hook):
    module = make(kind)
    getattr(module.layers, hook)(lambda *_: None)
    with set_recurrent_mode(recurrent):
        with pytest.warns(UserWarning, match=f"{kind} of {type(module).__name__} do not run") as w:
            module(batch(module))
            module(batch(module))
    assert len(w) == 1


@in_both_kinds
def test_keys_may_be_changed_in_their_lists(kind):
    module = make(kind)
    step = batch(module, (2,))
    expected = module(step.clone())
    state = module.state_keys[0]
    for keys, i, key in (
        (module.in_keys, 0, "x"),
        (module.in_keys, 1, "memory"),
        (module.in_keys, -1, "start"),
        (module.out_keys, 0, "y"),
        (module.out_keys, 1, ("next", "memory")),
    ):
        keys[i] = key
    assert (module.state_keys[0], module.init_key) == ("memory", "start")
    renamed = step.rename_key_("observation", "x").rename_key_(state, "memory")
    out = module(renamed.rename_key_("is_init", "start"))
    assert torch.equal(out["y"], expected["embed"])
    assert torch.equal(out["next", "memory"], expected["next", state])
    assert "memory" in module.make_tensordict_primer().primers.keys()


@in_both_kinds
def test_keys_may_be_assigned_later(kind):
    module = make(kind)
    states = [f"s{i}" for i in range(len(module.state_keys))]
    step = batch(module, (2,))
    expected = module(step.clone())["embed"]
    pairs = list(zip(module.in_keys[1:-1], states, strict=True))
    module.in_keys = ["x", *states, ("a", "start")]
    module.out_keys = ["y", *(("next", s) for s in states)]
    assert module.init_key == ("a", "start")
    assert module.state_keys == tuple(states)
    renamed = TensorDict(x=step["observation"], batch_size=[2])
    renamed["a", "start"] = step["is_init"]
    for old, new in pairs:
        renamed[new] = step[old]
    out = module(renamed)
    assert torch.equal(out["y"], expected)
    assert {("next", s) for s in states} <= set(out.keys(True))


@in_both_kinds
def test_keys_assigned_later_are_checked(kind):
    module = make(kind)
    before = module.in_keys, module.out_keys
    for name, value in [("in_keys", ["x"]), ("out_keys", ["y"]), ("out_keys", ["y", "y", "y"][:3])]:
        with pytest.raises(ValueError, match=name):
            setattr(module, name, value)
    assert (module.in_keys, module.out_keys) == before
    step: Any = batch(module, (2,))
    assert isinstance(module(step)["embed"], Tensor)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"state_key": 3}, "state_key must be a key"),
        ({"init_key": 3}, "init_key must be a key"),
        ({"in_key": 3}, "in_key must be a key"),
        ({"in_key": None, "in_keys": ["x", 3, "c"]}, "in_keys must be a key"),
    ],
)
def test_module_key_of_a_wrong_type_is_named(arguments, text):
    with pytest.raises(TypeError, match=text):
        rnnkeys.LSTMModule(3, 5, **{"in_key": "x", "out_key": "y", **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"dropout": 2.0}, ValueError, "dropout must be a number from 0.0 to 1.0. Got dropout=2.0"),
        ({"min_radius": "a"}, ValueError, "min_radius must be a number"),
        ({"max_phase": "a"}, ValueError, "max_phase must be above 0. Got max_phase='a'"),
    ],
)
def test_number_of_a_cell_out_of_range_is_named(arguments, error, text):
    with pytest.raises(error, match=text):
        rnnkeys.LRUModule(3, 5, in_key="x", out_key="y", **arguments)


def test_dropout_of_step_modules_out_of_range_is_named():
    step = rnnkeys.GRUCell(3, 5)
    sizes = {"input_size": 3, "state_sizes": {"h": 5}}
    with pytest.raises(ValueError, match="dropout must be a number"):
        rnnkeys.CellModule(_Pair(step), **sizes, dropout=-1.0, in_key="x", out_key="y")


class _Pair(nn.Module):
    """A step module whose output is its state, unless it is changed."""

    def __init__(self, step: nn.Module, change: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.step = step
        self.change = change

    def forward(self, x: Tensor, h: Tensor) -> Any:
        h = self.step(x, h)
        return (h, h) if self.change is None else self.change(h)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h,
        lambda h: (h,),
        lambda h: (h, h, h),
        lambda h: (h.unsqueeze(1), h),
        lambda h: (h[:1], h),
        lambda h: (h, h.unsqueeze(1)),
        lambda h: (h, None),
        lambda h: [h, h],
    ],
)
def test_step_module_of_another_output_is_named(change: Callable[[Tensor], Any]) -> None:
    step = _Pair(rnnkeys.GRUCell(3, 5), change)
    sizes = {"input_size": 3, "state_sizes": {"h": 5}}
    with pytest.raises(ValueError, match=r"must map \(input, h\) to the tuple .* it returned \["):
        rnnkeys.CellModule(step, **sizes, in_key="x", out_key="y")


@pytest.mark.parametrize("wrong", [-1, "3", 1.5])
def test_time_distributed_number_of_dimensions_of_a_wrong_kind_is_named(wrong):
    with pytest.raises(ValueError, match="observation_ndim must be an int of at least 0"):
        rnnkeys.TimeDistributed(nn.Identity(), wrong)
