"""The modules as their callers see them: arguments, keys, attributes, shapes and both modes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchrl.modules
import torchrl.modules.utils
from tensordict import TensorDict, unravel_key
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune

import rnnkeys
from rnnkeys import set_recurrent_mode
from tests.support.recurrent import (
    BACKENDS,
    F64,
    KINDS,
    THEIRS,
    batch,
    by_hand,
    make,
    make_theirs,
    outputs,
    recurrently,
)
from tests.support.tolerances import assert_equal

in_both_kinds = pytest.mark.parametrize("kind", KINDS)
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)

_PURE_PYTORCH = ("LSTM", "GRU", "LSTMCell", "GRUCell")
_MODULES = ("LSTMModule", "GRUModule")
_FUNCTIONS = ("set_recurrent_mode", "recurrent_mode", "canonicalize_rnn_subset")
_IN_UTILS = ("get_primers_from_module", "get_env_transforms_from_module")
_OWN_DEFAULTS = {"recurrent_backend": "auto", "init_key": None}
_OWN_ARGUMENTS = {"dtype", "init_key", "state_grad", "state_key"}


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _positional(parameters: dict[str, inspect.Parameter]) -> list[str]:
    return [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]


def _theirs(name: str) -> Any:
    return getattr(torchrl.modules.utils if name in _IN_UTILS else torchrl.modules, name)


@pytest.mark.parametrize("name", [*_PURE_PYTORCH, *_MODULES, *_FUNCTIONS, *_IN_UTILS])
def test_module_takes_the_arguments_of_torchrl_in_its_order(name):
    ours, theirs = _parameters(getattr(rnnkeys, name)), _parameters(_theirs(name))
    assert _positional(ours) == _positional(theirs)
    for argument, parameter in theirs.items():
        assert ours[argument].kind == parameter.kind, argument
        if ours[argument].default != parameter.default:
            assert ours[argument].default == _OWN_DEFAULTS[argument], argument
    assert set(ours) - set(theirs) <= (_OWN_ARGUMENTS if name in _MODULES else set())


@pytest.mark.parametrize("name", [*_PURE_PYTORCH, *_MODULES])
def test_module_has_the_public_attributes_of_torchrl(name):
    arguments: dict[str, Any] = {"input_size": 3, "hidden_size": 5}
    if name in _MODULES:
        arguments |= {"in_key": "observation", "out_key": "embed"}
    pair = [cls(**arguments) for cls in (getattr(rnnkeys, name), _theirs(name))]
    ours, theirs = ({a for a in dir(m) if not a.startswith("_")} for m in pair)
    # Equations and shape checks that are methods of theirs only because torch's LSTM has them, and
    # a removed property whose error stops torch.jit.trace.
    inner = {"lstm_cell", "gru_cell", "get_expected_cell_size", "temporal_mode"}
    assert theirs - ours <= inner


@in_both_kinds
def test_attributes_hold_what_the_constructor_was_given(kind):
    module = make(kind, recurrent_backend="scan", recurrent_recompute="full", init_key="start")
    theirs = make_theirs(kind)
    assert module.recurrent_backend == "scan"
    assert module.recurrent_recompute == "full"
    assert module.recurrent_compute_dtype == theirs.recurrent_compute_dtype == torch.float32
    assert module.recurrent_matmul_precision == theirs.recurrent_matmul_precision == "auto"
    assert module.init_key == "start"
    assert type(module).DEFAULT_IN_KEYS == THEIRS[kind].DEFAULT_IN_KEYS
    assert type(module).DEFAULT_OUT_KEYS == THEIRS[kind].DEFAULT_OUT_KEYS


@in_both_kinds
@pytest.mark.parametrize("state_key", ["actor", ("agents", "state")])
def test_state_key_names_every_state(kind, state_key):
    module = make(kind, state_key=state_key)
    names = {"lstm": ("_h", "_c"), "gru": ("",)}[kind]
    *groups, last = (state_key,) if isinstance(state_key, str) else state_key
    keys = [unravel_key((*groups, last + name)) for name in names]
    assert list(module.state_keys) == keys
    assert module.out_keys[1:] == [unravel_key(("next", key)) for key in keys]


@in_both_kinds
def test_state_key_beside_the_keys_of_all_states_raises(kind):
    keys = {"in_keys": ["observation", "a", "b"], "out_keys": ["embed", "c", "d"]}
    keys = {name: value[: 2 + (kind == "lstm")] for name, value in keys.items()}
    with pytest.raises(ValueError, match="state_key='actor' contradicts in_keys="):
        KINDS[kind](3, 5, state_key="actor", **keys)


@in_both_kinds
def test_sizes_may_be_given_by_position(kind):
    more = {"in_key": "observation", "out_key": "embed"}
    projection = (2, False, True) if kind == "lstm" else (False, True)
    module = KINDS[kind](3, 5, 2, False, True, 0.25, *projection, "scan", **more)  # pyright: ignore[reportCallIssue]
    layers = module.layers
    assert (layers.input_size, layers.hidden_size, layers.num_layers) == (3, 5, 2)
    assert (layers.bias, layers.dropout, layers.proj_size) == (False, 0.25, projection[0] * 1)
    assert isinstance(layers, getattr(rnnkeys, kind.upper()))
    assert module.recurrent_backend == "scan"


@in_both_kinds
@pytest.mark.parametrize("python_based", [False, True])
def test_layers_are_torchs_or_the_pure_pytorch_class(kind, python_based):
    module = make(kind, python_based=python_based, num_layers=2, bias=False)
    expected = getattr(rnnkeys if python_based else nn, kind.upper())
    assert type(getattr(module, kind)) is expected
    assert {n.split(".")[0] for n in module.state_dict()} == {kind}


@in_both_kinds
def test_layers_that_are_given_are_used(kind):
    layers = getattr(nn, kind.upper())(3, 5, num_layers=2, batch_first=True)
    module = make(kind, **{kind: layers})
    assert module.layers is layers
    data = batch(module)
    assert_equal(recurrently(module, data)["embed"], by_hand(module, data)["embed"], torch.float32)


@in_both_kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_device_are_those_of_parameters_outputs_and_primer(kind, dtype):
    module = make(kind, dtype=dtype, device="cpu")
    data = batch(module)
    assert {p.dtype for p in module.parameters()} == {dtype}
    for out in (recurrently(module, data), by_hand(module, data)):
        assert {out.get(key).dtype for key in module.out_keys} == {dtype}
    primers = module.make_tensordict_primer().primers
    assert {spec.dtype for spec in primers.values(True, True)} == {dtype}
    meta = make(kind, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@in_both_kinds
@on_every_backend
def test_dropout_is_drawn_between_layers_in_training_only(kind, backend):
    module = make(kind, num_layers=2, dropout=0.5, recurrent_backend=backend)
    data = batch(module)
    first, second = (recurrently(module, data)["embed"] for _ in range(2))
    assert not torch.equal(first, second)
    module.eval()
    first, second = (recurrently(module, data)["embed"] for _ in range(2))
    assert torch.equal(first, second)
    assert_equal(first, by_hand(module, data)["embed"], torch.float32)


def test_dropout_may_be_changed_on_the_layers():
    module = make("lstm", num_layers=2, dropout=0.0)
    module.layers.dropout = 0.5
    data = batch(module)
    first, second = (recurrently(module, data)["embed"] for _ in range(2))
    assert not torch.equal(first, second)


@in_both_kinds
@pytest.mark.parametrize("recurrent", [True, False])
def test_dropout_follows_the_mode_of_the_layers(kind, recurrent):
    """So that it may be drawn while all else evaluates."""
    module = make(kind, num_layers=2, dropout=0.5)
    data = batch(module)

    def is_drawn() -> bool:
        with set_recurrent_mode(recurrent):
            first, second = (module(data.clone())["embed"] for _ in range(2))
        return not torch.equal(first, second)

    module.layers.eval()
    assert not is_drawn()
    module.eval().layers.train()
    assert is_drawn()


@in_both_kinds
@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("way", ["add_module", "register_module", "set_submodule"])
def test_layers_that_are_replaced_do_not_run(kind, recurrent, way):
    module, other = make(kind), make(kind)
    data = batch(module)
    with set_recurrent_mode(recurrent):
        module(data.clone())
        getattr(module, way)(kind, other.layers)
        out, expected = module(data.clone())["embed"], other(data.clone())["embed"]
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


# torch's own, when it first looks for rules.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@in_both_kinds
@on_every_backend
@pytest.mark.parametrize("recurrent", [True, False])
def test_forward_derivatives_equal_backward_ones(kind, backend, recurrent):
    """Also where no parameter has a gradient, and kernels are called without autograd."""
    module = make(kind, recurrent_backend=backend, dtype=F64).requires_grad_(False)
    data = batch(module)
    x = data["observation"]

    def loss(x: Tensor) -> Tensor:
        with set_recurrent_mode(recurrent):
            return module(data.clone().set("observation", x))["embed"].square().sum()

    leaf, direction = x.clone().requires_grad_(), torch.randn_like(x)
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, direction))).tangent
    assert tangent is not None
    assert_equal(tangent, (grad * direction).sum(), F64)


@in_both_kinds
@on_every_backend
@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("with_states", [True, False])
def test_shapes_are_known_without_data(kind, backend, recurrent, with_states):
    module = make(kind, recurrent_backend=backend)
    data = batch(module)
    data = data if with_states else data.exclude(*module.state_keys)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, set_recurrent_mode(recurrent):
        fake = data.apply(mode.from_tensor)
        out = module(fake)
    assert out["embed"].shape == (*data.shape, 5)


@in_both_kinds
@pytest.mark.parametrize("backend", ["loop", "scan"])
def test_recompute_gives_way_to_transforms(kind, backend):
    """Which allow no checkpoint."""
    module = make(kind, recurrent_backend=backend, recurrent_recompute="full", dtype=F64)
    data = batch(module)

    def loss(x: Tensor) -> Tensor:
        return recurrently(module, data.clone().set("observation", x))["embed"].square().sum()

    x = data["observation"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    assert_equal(torch.func.grad(loss)(x.detach()), expected, F64)


@in_both_kinds
@pytest.mark.parametrize("backend", ["loop", "scan"])
def test_recompute_changes_no_number(kind, backend):
    plain = make(kind, recurrent_backend=backend, num_layers=2, dtype=F64)
    again = make(
        kind, recurrent_backend=backend, num_layers=2, dtype=F64, recurrent_recompute="full"
    )
    again.load_state_dict(plain.state_dict())
    data = batch(plain)
    for module in (plain, again):
        recurrently(module, data)["embed"].square().sum().backward()
    for a, b in zip(again.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert_equal(a.grad, b.grad, F64)


@in_both_kinds
@pytest.mark.parametrize("precision", ["auto", "fast", "high-prec", "ieee", "tf32", "tf32x3"])
def test_matmul_precisions_are_accepted(kind, precision):
    module = make(
        kind, recurrent_matmul_precision=precision, recurrent_compute_dtype=torch.bfloat16
    )
    data = batch(module)
    assert_equal(recurrently(module, data)["embed"], by_hand(module, data)["embed"], torch.float32)


@in_both_kinds
def test_one_key_means_the_default_state_keys(kind):
    module, theirs = make(kind), make_theirs(kind)
    assert module.in_keys == theirs.in_keys
    assert module.out_keys == theirs.out_keys


@in_both_kinds
def test_keys_may_be_lists_or_tuples_with_the_init_key_last(kind):
    states = ["h", "c"][: len(KINDS[kind].DEFAULT_IN_KEYS)]
    ins = ["observation", *states, "is_init"]
    outs = ["embed", *(("next", s) for s in states)]
    for given_ins, given_outs in [(ins, outs), (ins[:-1], outs), (tuple(ins), tuple(outs))]:
        module = make(kind, in_keys=given_ins, out_keys=given_outs)
        assert module.in_keys == ins
        assert module.out_keys == outs
        assert module.init_key == "is_init"
    assert ins == ["observation", *states, "is_init"], "the caller's list was changed"


@in_both_kinds
def test_module_reads_and_writes_nested_keys(kind):
    states = [("agent", "memory", name) for name in ("h", "c")]
    states = states[: len(KINDS[kind].DEFAULT_IN_KEYS)]
    module = make(
        kind,
        in_keys=[("agent", "observation"), *states],
        out_keys=[("agent", "embed"), *(("next", *s) for s in states)],
        init_key=("agent", "first", "is_init"),
    )
    data = batch(module)
    out, expected = recurrently(module, data), by_hand(module, data)
    for key in module.out_keys:
        assert_equal(out.get(key), expected.get(key), torch.float32)


@in_both_kinds
@pytest.mark.parametrize("init_key", ["start", ("agents", "is_init"), ("a", "b", "start")])
@pytest.mark.parametrize("shared_flags", [True, False])
def test_init_key_has_any_name_and_is_shared_or_per_agent(kind, init_key, shared_flags):
    module = make(kind, init_key=init_key, dtype=F64)
    assert module.in_keys[-1] == module.init_key == init_key
    data = batch(module, (2, 6), agents=(3,), shared_flags=shared_flags)
    assert_equal(recurrently(module, data)["embed"], by_hand(module, data)["embed"], F64)
    step = module(data[:, 0].clone())
    fresh = data.get(init_key)[:, 0].view(2, -1).expand(2, 3)
    without = data[:, 0].clone().exclude(*module.state_keys).set(init_key, torch.ones(2, 1).bool())  # pyright: ignore[reportAttributeAccessIssue]
    zeros = module(without)["embed"]
    assert torch.equal(step["embed"][fresh], zeros[fresh])
    assert not torch.isclose(step["embed"][~fresh], zeros[~fresh]).all(-1).any()


@in_both_kinds
def test_selected_out_keys_leave_the_state_readable(kind):
    module = make(kind)
    step = batch(module, (2,))
    expected = module(step.clone())["embed"]
    module.select_out_keys("embed")
    out = module(step.clone())
    assert torch.equal(out["embed"], expected)
    assert "next" not in out.keys()


@in_both_kinds
@pytest.mark.parametrize("recurrent", [True, False])
def test_call_with_plain_tensors_returns_the_out_keys(kind, recurrent):
    module = make(kind)
    data = batch(module)
    with set_recurrent_mode(recurrent):
        by_name = module(**{str(key): data.get(key) for key in module.in_keys})
        by_order = module(*(data.get(key) for key in module.in_keys))
        expected = module(data.clone())
    for got in (by_name, by_order):
        for value, key in zip(got, module.out_keys, strict=True):
            assert torch.equal(value, expected.get(key))


@in_both_kinds
def test_call_with_plain_tensors_of_nested_keys_returns_the_out_keys(kind):
    module = make(kind, in_key=("agent", "observation"))
    data = batch(module)
    given = {"_".join(k) if isinstance(k, tuple) else k: data.get(k) for k in module.in_keys}
    with set_recurrent_mode(True):
        out = module(**given)
    assert torch.equal(out[0], recurrently(module, data)["embed"])


@in_both_kinds
@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("agents", [(), (1,), (3,)])
def test_call_with_tensors_of_one_feature_takes_it_for_a_feature(kind, recurrent, agents):
    module = make(kind, input_size=1, hidden_size=1)
    data = batch(module, agents=agents)
    with set_recurrent_mode(recurrent):
        out = module(*(data.get(key) for key in module.in_keys))
        expected = module(data.clone())
    for value, key in zip(out, module.out_keys, strict=True):
        assert torch.equal(value, expected.get(key))


@in_both_kinds
@pytest.mark.parametrize("recurrent", [True, False])
def test_flags_without_a_last_dimension_equal_those_with_one(kind, recurrent):
    module = make(kind)
    data = batch(module)
    flat = data.clone().set("is_init", data["is_init"].squeeze(-1))
    with set_recurrent_mode(recurrent):
        expected = module(data.clone())["embed"]
        by_tensordict = module(flat.clone())["embed"]
        by_name = module(**{str(key): flat.get(key) for key in module.in_keys})[0]
    assert torch.equal(by_tensordict, expected)
    assert torch.equal(by_name, expected)


@in_both_kinds
def test_call_with_unknown_or_too_many_tensors_is_rejected(kind):
    module = make(kind)
    tensors = [batch(module).get(key) for key in module.in_keys]
    for arguments, names in ((tensors + tensors[:1], {}), (tensors, {"state": tensors[0]})):
        with pytest.raises(TypeError, match="'observation', 'recurrent_state"):
            module(*arguments, **names)
    with pytest.raises(TypeError, match="each once"):
        module(*tensors, observation=tensors[0])


@in_both_kinds
def test_missing_state_counts_as_zeros(kind):
    module = make(kind)
    data = batch(module)
    zeros = data.clone()
    for key in module.state_keys:
        zeros.set(key, torch.zeros_like(data.get(key)))
    without = data.exclude(*module.state_keys)
    expected = recurrently(module, zeros)
    for key, value in outputs(module, recurrently(module, without)).items():
        assert_equal(value, outputs(module, expected)[key], torch.float32)
    first = without[:, 0].set("is_init", torch.ones(2, 1).bool())
    assert torch.equal(module(first.clone())["embed"], module(zeros[:, 0].clone())["embed"])


@in_both_kinds
@pytest.mark.parametrize("agents", [(), (3,)])
@pytest.mark.parametrize("shared_flags", [True, False])
def test_sequences_with_done_and_no_flag_start_a_segment(kind, agents, shared_flags):
    module = make(kind, dtype=F64)
    data = batch(module, agents=agents, flag_rate=0.0, shared_flags=shared_flags)
    done = torch.zeros(2, 7, 1, dtype=torch.bool)
    done[0, 2] = done[1, 4] = done[1, 6] = True
    flagged = data.clone()
    flagged["is_init"][:, 1:] = done[:, :-1].view(2, 6, *[1] * (data["is_init"].ndim - 2))
    data["next", "done"] = done
    out, expected = recurrently(module, data), recurrently(module, flagged)
    for key in module.out_keys:
        assert torch.equal(out.get(key), expected.get(key))


_SHAPES = {
    "[T]": ((7,), ()),
    "[B, T]": ((2, 7), ()),
    "[B1, B2, T]": ((2, 3, 7), ()),
    "[B, T, A]": ((2, 7), (3,)),
    "[T, A1, A2]": ((7,), (3, 2)),
    "[B, 1]": ((4, 1), ()),
}


@in_both_kinds
@on_every_backend
@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_sequences_equal_steps(kind, backend, shape, dtype):
    module = make(kind, num_layers=2, recurrent_backend=backend, dtype=dtype)
    lead, agents = _SHAPES[shape]
    data = batch(module, lead, agents)
    actual, expected = (
        outputs(module, recurrently(module, data)),
        outputs(module, by_hand(module, data)),
    )
    for key, value in actual.items():
        assert value.shape[:-1] == expected[key].shape[:-1]
        assert_equal(value, expected[key], dtype, key)


@in_both_kinds
def test_step_of_environments_of_which_one_ends_continues_the_others(kind):
    """The last dimension of a single step is that of environments, not time."""
    module = make(kind)
    step = batch(module, (3,), flag_rate=0.0)
    expected = outputs(module, module(step.clone()))
    step["next", "done"] = torch.tensor([[True], [False], [False]])
    for key, value in outputs(module, module(step)).items():
        assert torch.equal(value, expected[key]), key


@in_both_kinds
@on_every_backend
@pytest.mark.parametrize("python_based", [True, False])
def test_gradients_of_sequences_equal_those_of_steps(kind, backend, python_based):
    module = make(
        kind, num_layers=2, recurrent_backend=backend, dtype=F64, python_based=python_based
    )
    data = batch(module, (2, 6), (3,))

    def gradients(run: Callable[..., Any]) -> list[Tensor]:
        module.zero_grad()
        inputs = data.clone()
        leaves = [inputs.get(key).requires_grad_() for key in ("observation", *module.state_keys)]
        (run(module, inputs)["embed"] * weights).sum().backward()
        return [g.grad.clone() for g in [*leaves, *module.parameters()]]

    weights = torch.randn(2, 6, 3, 5, dtype=F64)
    for actual, expected in zip(gradients(recurrently), gradients(by_hand), strict=True):
        assert_equal(actual, expected, F64)


@in_both_kinds
@on_every_backend
def test_written_states_are_detached_unless_asked_for(kind, backend):
    for state_grad in (False, True):
        module = make(kind, recurrent_backend=backend, state_grad=state_grad)
        out = recurrently(module, batch(module))
        assert out["embed"].requires_grad
        assert all(
            v.requires_grad is state_grad for k, v in outputs(module, out).items() if "next" in k
        )


@in_both_kinds
@pytest.mark.parametrize("recurrent", [True, False])
def test_stored_nan_that_is_not_read_has_no_effect(kind, recurrent):
    module = make(kind)
    data = batch(module, flag_rate=0.0)
    data["is_init"][:, 0] = True
    for key in module.state_keys:
        data.get(key)[:, 1:] = float("nan")
        data.get(key)[:, 0] = float("nan") if not recurrent else 0.5
    if recurrent:
        out = recurrently(module, data)
    else:
        out = module(data[:, 0].clone())
    for value in outputs(module, out).values():
        assert value.isfinite().all()


@on_every_backend
@pytest.mark.parametrize("python_based", [True, False])
def test_projection_works_in_both_modes_on_every_backend(backend, python_based):
    module = make(
        "lstm",
        proj_size=2,
        num_layers=2,
        recurrent_backend=backend,
        dtype=F64,
        python_based=python_based,
    )
    data = batch(module)
    actual, expected = recurrently(module, data), by_hand(module, data)
    assert actual["embed"].shape == (2, 7, 2)
    for key in module.out_keys:
        assert_equal(actual.get(key), expected.get(key), F64)
    primers = module.make_tensordict_primer().primers
    assert primers["recurrent_state_h"].shape == (2, 2)
    assert primers["recurrent_state_c"].shape == (2, 5)


@in_both_kinds
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recurrent", [True, False])
def test_layers_change_class_and_nothing_else(kind, training, recurrent):
    module = make(kind, num_layers=2, dropout=0.0, bias=True, dtype=F64).train(training)
    parameters = dict(module.named_parameters())
    data = batch(module)

    def run() -> tuple[Tensor, list[Tensor]]:
        module.zero_grad()
        with set_recurrent_mode(recurrent):
            out = module(data.clone())["embed"]
        out.square().sum().backward()
        return out, [p.grad.clone() for p in module.parameters()]

    native_out, native_grads = run()
    assert module.make_python_based() is module
    assert type(module.layers) is getattr(rnnkeys, kind.upper())
    plain_out, plain_grads = run()
    assert module.make_cudnn_based() is module
    assert type(module.layers) is getattr(nn, kind.upper())
    back_out, back_grads = run()
    assert module.layers.training is training
    assert all(p is parameters[name] for name, p in module.named_parameters())
    for out, grads in ((plain_out, plain_grads), (back_out, back_grads)):
        assert_equal(out, native_out, F64)
        for a, b in zip(grads, native_grads, strict=True):
            assert_equal(a, b, F64)


@in_both_kinds
@pytest.mark.parametrize("method", ["make_python_based", "make_cudnn_based"])
def test_layers_of_another_class_keep_every_setting(kind, method):
    sizes: dict[str, Any] = {"proj_size": 2} if kind == "lstm" else {}
    module = make(
        kind,
        num_layers=3,
        bias=False,
        dropout=0.5,
        python_based=method == "make_cudnn_based",
        **sizes,
    )
    before = {k: getattr(module.layers, k) for k in ("num_layers", "bias", "dropout", "proj_size")}
    shapes = {k: v.shape for k, v in module.state_dict().items()}
    getattr(module, method)()
    assert before == {k: getattr(module.layers, k) for k in before}
    assert shapes == {k: v.shape for k, v in module.state_dict().items()}
    assert module.layers.batch_first


@in_both_kinds
def test_pure_pytorch_class_equals_torchs_and_has_second_derivatives(kind):
    module = make(kind, python_based=True, dtype=F64)
    data = batch(module)
    observation = data["observation"].requires_grad_()
    out = recurrently(module, data)["embed"].square().sum()
    (grad,) = torch.autograd.grad(out, observation, create_graph=True)
    grad.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@in_both_kinds
def test_canonical_keys_are_those_read_and_written(kind):
    module, theirs = make(kind), make_theirs(kind)
    assert module.canonical_keys == theirs.canonical_keys


def _scattered(shape: tuple[int, ...]) -> Tensor:
    value = torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    assert not value.is_contiguous()
    return value


@in_both_kinds
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("in_key", ["observation", ("nested", "observation")])
def test_canonicalize_lays_out_the_modules_entries_only(kind, inplace, in_key):
    module = make(kind, in_key=in_key)
    data = batch(module)
    observation, reward = _scattered((2, 7, 3)), _scattered((2, 7, 4))
    data.set(in_key, observation).set("reward", reward)
    out = module.canonicalize(data, inplace=inplace)
    assert (out is data) is inplace
    assert out.get(in_key).is_contiguous()
    assert torch.equal(out.get(in_key), observation)
    assert out["reward"] is reward
    assert (data.get(in_key) is observation) is not inplace


def test_canonicalize_lays_out_dimensions_of_size_one_too():
    module = make("gru")
    odd = torch.empty_strided((1, 4, 3), (3, 3, 1)).normal_()
    assert odd.is_contiguous()
    data = TensorDict(observation=odd, batch_size=[1, 4])
    assert module.canonicalize(data)["observation"].stride() == (12, 3, 1)


def test_several_modules_are_canonicalized_at_once():
    modules = [make("lstm"), make("gru", in_key="other")]
    data = TensorDict(
        observation=_scattered((2, 7, 3)), other=_scattered((2, 7, 3)), batch_size=[2, 7]
    )
    out = rnnkeys.canonicalize_rnn_subset(data, modules)
    assert out["observation"].is_contiguous() and out["other"].is_contiguous()
    assert not data["other"].is_contiguous()
    nothing = TensorDict(batch_size=[2, 7])
    assert rnnkeys.canonicalize_rnn_subset(nothing, modules) is nothing


@in_both_kinds
@on_every_backend
def test_module_reads_any_memory_layout(kind, backend):
    module = make(kind, recurrent_backend=backend)
    data = batch(module)
    scattered = data.transpose(0, 1).contiguous().transpose(0, 1)
    assert not scattered["observation"].is_contiguous()
    for key, value in outputs(module, recurrently(module, scattered)).items():
        assert_equal(value, outputs(module, recurrently(module, data))[key], torch.float32)


@in_both_kinds
@on_every_backend
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("resets", [True, False])
def test_activation_in_place_changes_no_state(kind, backend, num_layers, recurrent, resets):
    module = make(kind, recurrent_backend=backend, num_layers=num_layers)
    data = batch(module)
    data["is_init"] &= resets
    with set_recurrent_mode(recurrent):
        out = module(data.clone())
    states = {k: v.clone() for k, v in outputs(module, out).items() if "next" in k}
    out["embed"].relu_()
    out["embed"].sum().backward()
    for key, value in states.items():
        assert torch.equal(outputs(module, out)[key], value)


@in_both_kinds
def test_module_leaves_the_data_that_it_reads(kind):
    module = make(kind)
    data = batch(module)
    before = data.clone()
    for recurrent in (True, False):
        with set_recurrent_mode(recurrent):
            module(data)
    for key in before.keys(True, True):
        assert torch.equal(data.get(key), before.get(key))


@in_both_kinds
def test_removed_ways_to_set_the_mode_say_how(kind):
    module = make(kind)
    with pytest.raises(RuntimeError, match="context manager rnnkeys.set_recurrent_mode"):
        module.set_recurrent_mode(True)
    with pytest.raises(RuntimeError, match="recurrent_mode cannot be changed in-place"):
        module.recurrent_mode = True


@in_both_kinds
@pytest.mark.parametrize("recurrent", [True, False])
def test_autocast_computes_in_its_dtype_and_keeps_states_in_the_parameters(kind, recurrent):
    module = make(kind)
    data = batch(module)
    with set_recurrent_mode(recurrent):
        expected = module(data.clone())
        with torch.autocast("cpu", torch.bfloat16):
            out = module(data.clone())
    assert out["embed"].dtype == torch.bfloat16
    assert_equal(out["embed"], expected["embed"], torch.bfloat16)
    for key in module.out_keys[1:]:
        assert out.get(key).dtype == torch.float32
        assert_equal(out.get(key), expected.get(key), torch.bfloat16)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
@pytest.mark.parametrize("shape", [(3,), (4, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_pure_pytorch_steps_equal_torchs(name, shape, bias):
    ours, torchs = (getattr(m, name)(3, 5, bias, dtype=F64) for m in (rnnkeys, nn))
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(shape, dtype=F64)
    h = torch.randn(*shape[:-1], 5, dtype=F64)
    state: Any = (h, torch.randn_like(h)) if name == "LSTMCell" else h
    for given in (state, None):
        for a, b in zip(_flat(ours(x, given)), _flat(torchs(x, given)), strict=True):
            assert_equal(a, b, F64)
    with pytest.raises(ValueError, match="1D or 2D, got 4D"):
        ours(torch.zeros(2, 2, 2, 3, dtype=F64))


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in _flat(v)]


@in_both_kinds
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_pure_pytorch_sequences_equal_torchs(kind, batch_first, num_layers):
    sizes = {"num_layers": num_layers, "batch_first": batch_first, "dtype": F64}
    ours, torchs = (getattr(m, kind.upper())(3, 5, **sizes) for m in (rnnkeys, nn))
    ours.load_state_dict(torchs.state_dict(), strict=True)
    x = torch.randn(2, 7, 3, dtype=F64)
    x = x if batch_first else x.transpose(0, 1)
    h = torch.randn(num_layers, 2, 5, dtype=F64)
    state: Any = (h, torch.randn_like(h)) if kind == "lstm" else h
    for given in (state, None):
        for a, b in zip(_flat(ours(x, given)), _flat(torchs(x, given)), strict=True):
            assert_equal(a, b, F64)


@in_both_kinds
@pytest.mark.parametrize("batch_first", [True, False])
def test_pure_pytorch_sequences_stop_where_the_mask_ends(kind, batch_first):
    ours = getattr(rnnkeys, kind.upper())(3, 5, batch_first=batch_first, dtype=F64)
    x, mask = torch.randn(2, 7, 3, dtype=F64), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    whole = ours(x if batch_first else x.transpose(0, 1), mask=mask if batch_first else mask.T)
    short = ours(x[1:, :4] if batch_first else x[1:, :4].transpose(0, 1))
    for a, b in zip(_flat(whole[1]), _flat(short[1]), strict=True):
        assert_equal(a[:, 1:], b, F64)


def test_pure_pytorch_bidirectional_raises():
    for name in ("LSTM", "GRU"):
        with pytest.raises(NotImplementedError, match="bidirectional=True is not supported"):
            getattr(rnnkeys, name)(3, 5, bidirectional=True)


@in_both_kinds
def test_copied_module_reads_its_own_parameters(kind):
    module = make(kind)
    data = batch(module, states=False)
    before = recurrently(module, data)["embed"]
    for duplicate in (copy.deepcopy(module), copy.copy(module)):
        assert torch.equal(recurrently(duplicate, data)["embed"], before)
    duplicate = copy.deepcopy(module)
    with torch.no_grad():
        for p in duplicate.parameters():
            p.zero_()
    assert torch.equal(recurrently(module, data)["embed"], before)
    assert not recurrently(duplicate, data)["embed"].any()


class _Halve(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@in_both_kinds
@pytest.mark.parametrize("recurrent", [True, False])
def test_parametrized_weights_are_used(kind, recurrent):
    module = make(kind)
    data = batch(module)
    halved = copy.deepcopy(module)
    with torch.no_grad():
        halved.layers.weight_hh_l0.div_(2)
    parametrize.register_parametrization(module.layers, "weight_hh_l0", _Halve())
    with set_recurrent_mode(recurrent):
        expected, actual = halved(data.clone())["embed"], module(data.clone())["embed"]
    assert torch.equal(actual, expected)
    actual.sum().backward()
    assert module.layers.parametrizations.weight_hh_l0.original.grad.any()


@in_both_kinds
@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("way", ["weight_norm", "prune"])
def test_weights_that_hooks_compute_follow_their_parameters(kind, recurrent, way):
    module = make(kind)
    data = batch(module)
    if way == "prune":
        prune.random_unstructured(module.layers, "weight_hh_l0", 0.5)
        parameter = module.layers.weight_hh_l0_orig
    else:
        with pytest.warns(FutureWarning, match="weight_norm` is deprecated"):
            nn.utils.weight_norm(module.layers, "weight_hh_l0")
        parameter = module.layers.weight_hh_l0_g
    with set_recurrent_mode(recurrent):
        before = module(data.clone())["embed"]
        with torch.no_grad():
            parameter.mul_(2)
        after = module(data.clone())["embed"]
    assert not torch.isclose(before, after).all()
    after.sum().backward()
    assert parameter.grad.any()


@in_both_kinds
@on_every_backend
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5)])
@pytest.mark.parametrize("agents", [(), (3,), (0,)])
@pytest.mark.parametrize("recurrent", [True, False])
def test_module_of_an_empty_batch_returns_an_empty_output(kind, backend, shape, agents, recurrent):
    module = make(kind, recurrent_backend=backend, num_layers=2)
    with set_recurrent_mode(recurrent):
        out = module(batch(module, shape, agents))
    assert out["embed"].shape == (*shape, *agents, 5)
    for key in module.out_keys[1:]:
        assert out.get(key).shape == (*shape, *agents, 2, 5)
    out["embed"].sum().backward()
