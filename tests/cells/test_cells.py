"""Pure-PyTorch recurrent classes equal torch's, and run in vmap and second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import rnnkeys
from rnnkeys.cells import GRU_CELL, LSTM_CELL
from tests.support.tolerances import assert_equal

B, T, I, H = 3, 6, 5, 4
F64 = torch.float64
SIZES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "three layers": {"num_layers": 3},
}
CASES = [(name, kwargs) for name in ("LSTM", "GRU") for kwargs in SIZES.values()]
CASES += [("LSTM", {"proj_size": 2}), ("LSTM", {"proj_size": 2, "num_layers": 2})]
of_both_cells = pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
of_both_stacks = pytest.mark.parametrize("name", ["LSTM", "GRU"])
of_every_stack = pytest.mark.parametrize(("name", "kwargs"), CASES)


def _pair(name: str, *sizes: int, **kwargs: Any) -> tuple[Any, Any]:
    """Return our module and torch's, which has our parameters, loaded strictly."""
    ours = getattr(rnnkeys, name)(*sizes, dtype=F64, **kwargs)
    if not name.endswith("Cell"):
        kwargs = {"batch_first": True, **kwargs}
    theirs = getattr(nn, name)(*sizes, dtype=F64, **kwargs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def _state(name: str, *shape: int, first: int = H) -> Any:
    """Return a state as torch's classes take it: ``(h, c)`` or ``h``."""
    h = _leaf(*shape, first)
    return (h, _leaf(*shape, H)) if name.startswith("LSTM") else h


def _flat(*outputs: Any) -> list[Tensor]:
    """Return all tensors in nested tuples."""
    flat: list[Tensor] = []
    for output in outputs:
        flat += [output] if isinstance(output, Tensor) else _flat(*output)
    return flat


def _assert_same(ours: Any, theirs: Any, arguments: Any, actual: Any, expected: Any) -> None:
    """Compare outputs, and gradients of arguments and parameters, of which both have all."""
    outputs = list(zip(_flat(actual), _flat(expected), strict=True))
    for i, (a, b) in enumerate(outputs):
        assert_equal(a, b, F64, f"output {i}")
    cotangents = [torch.randn_like(b) for _, b in outputs]
    leaves = _flat(arguments)
    grads = [
        torch.autograd.grad(_flat(out), [*leaves, *module.parameters()], cotangents)
        for module, out in ((ours, actual), (theirs, expected))
    ]
    for i, (a, b) in enumerate(zip(*grads, strict=True)):
        assert_equal(a, b, F64, f"gradient {i}")


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("batch", [(), (B,)], ids=["1-D", "2-D"])
@pytest.mark.parametrize("bias", [True, False])
@of_both_cells
def test_step_equals_torchs(name, bias, batch, given):
    ours, theirs = _pair(name, I, H, bias=bias)
    arguments = [_leaf(*batch, I)] + ([_state(name, *batch)] if given else [])
    actual, expected = ours(*arguments), theirs(*arguments)
    if not given:  # zeros give the recurrent weights no gradient
        ours.weight_hh.requires_grad_(False)
        theirs.weight_hh.requires_grad_(False)
        for a, b in zip(_flat(actual), _flat(expected), strict=True):
            assert_equal(a, b, F64)
        return
    _assert_same(ours, theirs, arguments, actual, expected)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("batch_first", [True, False])
@of_every_stack
def test_sequences_equal_torchs(name, kwargs, batch_first, given):
    ours, theirs = _pair(name, I, H, batch_first=batch_first, **kwargs)
    first, layers = kwargs.get("proj_size", H), kwargs.get("num_layers", 1)
    x = _leaf(*((B, T, I) if batch_first else (T, B, I)))
    arguments = [x] + ([_state(name, layers, B, first=first)] if given else [])
    _assert_same(ours, theirs, arguments, ours(*arguments), theirs(*arguments))


@of_every_stack
def test_parameters_are_torchs_by_name_shape_order_and_draw(name, kwargs):
    """A checkpoint loads both ways, and a seed means the same network."""
    torch.manual_seed(3)
    theirs = getattr(nn, name)(I, H, **kwargs)
    torch.manual_seed(3)
    ours = getattr(rnnkeys, name)(I, H, **kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    getattr(rnnkeys, name)(I, H, **kwargs).load_state_dict(theirs.state_dict(), strict=True)


@of_both_cells
def test_parameters_of_a_step_are_torchs(name):
    torch.manual_seed(3)
    theirs = getattr(nn, name)(I, H)
    torch.manual_seed(3)
    ours = getattr(rnnkeys, name)(I, H)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    getattr(rnnkeys, name)(I, H).load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_parameters_have_the_device_and_dtype_asked_for(name, device):
    module = getattr(rnnkeys, name)(I, H, device=device, dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


def test_constructor_takes_arguments_in_torchrls_order():
    """``LSTM`` has ``batch_first`` before ``bias``, and ``GRU`` after it."""
    assert rnnkeys.LSTM(I, H, 2, False, False).state_dict().keys().isdisjoint({"bias_ih_l0"})
    lstm, gru = rnnkeys.LSTM(I, H, 2, False), rnnkeys.GRU(I, H, 2, True, False)
    assert lstm.bias and gru.bias and not lstm.batch_first and not gru.batch_first
    assert rnnkeys.LSTM(I, H).batch_first and rnnkeys.GRU(I, H).batch_first


LENGTHS = (T, 2, 4)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
@of_both_stacks
def test_mask_stops_the_state_at_the_end(name, num_layers, batch_first):
    """As torch's packed sequences do; outputs hold their last value after the end."""
    ours, theirs = _pair(name, I, H, num_layers=num_layers, batch_first=batch_first)
    x, state = _leaf(B, T, I), _state(name, num_layers, B)
    mask = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)
    shown = (x, mask) if batch_first else (x.transpose(0, 1), mask.t())
    y, last = ours(shown[0], state, shown[1])
    packed = nn.utils.rnn.pack_padded_sequence(
        shown[0], torch.tensor(LENGTHS), batch_first, enforce_sorted=False
    )
    packed_y, expected_last = theirs(packed, state)
    expected_y, _ = nn.utils.rnn.pad_packed_sequence(packed_y, batch_first)
    rows = y if batch_first else y.transpose(0, 1)
    for row, length in zip(rows, LENGTHS, strict=True):
        assert torch.equal(row[length:], row[length - 1].expand_as(row[length:]))
    active = shown[1].unsqueeze(-1)
    _assert_same(ours, theirs, [x, state], [y * active, last], [expected_y, expected_last])


@of_both_stacks
def test_steps_after_the_mask_are_not_read(name):
    ours, _ = _pair(name, I, H, num_layers=2)
    x, mask = _leaf(B, T, I), torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)
    runs = []
    for _ in range(2):
        y, last = ours(x, None, mask)
        loss = torch.stack([t.sin().sum() for t in _flat(y, last)]).sum()
        grads = torch.autograd.grad(loss, list(ours.parameters()))
        runs.append([y, *_flat(last), *grads])
        with torch.no_grad():
            x[~mask] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@of_both_stacks
def test_dropout_acts_between_layers_in_training_only(name):
    """All is dropped with probability one, so that the second layer sees zeros."""
    ours, theirs = _pair(name, I, H, num_layers=2, dropout=1.0)
    x = _leaf(B, T, I)
    y, last = ours(x)
    expected_y, expected_last = theirs(x)
    for a, b in zip(_flat(y, last), _flat(expected_y, expected_last), strict=True):
        assert_equal(a, b, F64)
    second = getattr(nn, name)(H, H, batch_first=True, dtype=F64)
    second.load_state_dict(
        {k.replace("l1", "l0"): v for k, v in ours.state_dict().items() if "l1" in k}
    )
    assert_equal(y, second(torch.zeros(B, T, H, dtype=F64))[0], F64)
    ours.eval()
    theirs.eval()
    assert_equal(ours(x)[0], theirs(x)[0], F64)


@of_both_stacks
def test_dropout_differs_between_calls_and_rescales(name):
    ours, _ = _pair(name, I, H, num_layers=2, dropout=0.5)
    x = _leaf(B, T, I)
    torch.manual_seed(1)
    y = ours(x)[0]
    torch.manual_seed(2)
    assert not torch.equal(y, ours(x)[0])
    torch.manual_seed(1)
    assert torch.equal(y, ours(x)[0])
    # Small weights make the second layer nearly linear, so that its mean is that of its inputs.
    ours.weight_ih_l1.data.mul_(0.05)
    mean = torch.stack([ours(x)[0].detach() for _ in range(400)]).mean(0)
    whole = ours.eval()(x)[0]
    assert (mean - whole).norm() < 0.02 * whole.norm()


@of_both_cells
def test_step_in_vmap_over_data_and_parameters_is_right(name):
    family = [getattr(rnnkeys, name)(I, H, dtype=F64) for _ in range(3)]
    parameters, _ = stack_module_state(family)
    x, state = _leaf(3, B, I), _state(name, 3, B)

    def call(parameters: dict[str, Tensor], x: Tensor, state: Any) -> Any:
        return functional_call(family[0], parameters, (x, state))

    actual = _flat(vmap(call)(parameters, x, state))
    for i, cell in enumerate(family):
        alone = tuple(s[i] for s in state) if isinstance(state, tuple) else state[i]
        for a, b in zip(actual, _flat(cell(x[i], alone)), strict=True):
            assert_equal(a[i], b, F64)


@of_both_stacks
def test_sequence_in_vmap_over_data_and_parameters_is_right(name):
    family = [getattr(rnnkeys, name)(I, H, num_layers=2, dtype=F64) for _ in range(3)]
    parameters, _ = stack_module_state(family)
    x, mask = _leaf(3, B, T, I), torch.rand(3, B, T) < 0.7

    def call(parameters: dict[str, Tensor], x: Tensor, mask: Tensor) -> Any:
        return functional_call(family[0], parameters, (x, None, mask))

    actual = _flat(vmap(call)(parameters, x, mask))
    for i, module in enumerate(family):
        for a, b in zip(actual, _flat(module(x[i], None, mask[i])), strict=True):
            assert_equal(a[i], b, F64)


@of_both_stacks
def test_sequences_have_second_derivatives(name):
    module = getattr(rnnkeys, name)(2, 2, num_layers=2, dtype=F64)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], _leaf(2, 3, 2))


def test_cells_equal_numbers_computed_by_hand():
    """Gates of the LSTM: i, f, g, o; of the GRU: r, z, n, with r applied after the product."""
    big = 100.0  # a sigmoid of it is 1, of its negative 0
    gates = torch.tensor([[-big, big, 0.3, big]])
    h, c = LSTM_CELL.pointwise(gates, torch.zeros(1, 4), (torch.zeros(1, 1), torch.ones(1, 1)))
    assert c.item() == 1 and h.item() == pytest.approx(torch.ones(1).tanh().item())
    gates = torch.tensor([[big, -big, 0.3, -big]])
    h, c = LSTM_CELL.pointwise(gates, torch.zeros(1, 4), (torch.zeros(1, 1), torch.ones(1, 1)))
    assert c.item() == pytest.approx(torch.tensor(0.3).tanh().item()) and h.item() == 0
    ones = (torch.ones(1, 1),)
    (h,) = GRU_CELL.pointwise(torch.tensor([[0.0, big, 5.0]]), torch.zeros(1, 3), ones)
    assert h.item() == 1
    open_z = torch.tensor([[-big, -big, 0.2]])
    (h,) = GRU_CELL.pointwise(open_z, torch.tensor([[0.0, 0.0, 7.0]]), ones)
    assert h.item() == pytest.approx(torch.tensor(0.2).tanh().item())
    open_r = torch.tensor([[big, -big, 0.2]])
    (h,) = GRU_CELL.pointwise(open_r, torch.tensor([[0.0, 0.0, 0.5]]), ones)
    assert h.item() == pytest.approx(torch.tensor(0.7).tanh().item())


@of_both_cells
def test_step_wrong_shape_raises_by_name(name):
    cell = getattr(rnnkeys, name)(I, H)

    def state(*shape: int) -> Any:
        h = torch.zeros(*shape)
        return (h, h) if name == "LSTMCell" else h

    with pytest.raises(ValueError, match=f"{name}: Expected input to be 1D or 2D, got 3D"):
        cell(torch.zeros(1, 1, I))
    with pytest.raises(ValueError, match=rf"{name}: .*input.*\(3, {I + 1}\).*input_size={I}"):
        cell(torch.zeros(3, I + 1))
    with pytest.raises(ValueError, match=rf"{name}: Expected hx\[0\] to be 1D or 2D, got 3D"):
        cell(torch.zeros(3, I), state(1, 3, H))
    for shape in ((H,), (1, H), (3, H + 1)):
        with pytest.raises(ValueError, match=rf"{name}: .*hx\[0\].*\(3, {H}\)"):
            cell(torch.zeros(3, I), state(*shape))


def test_step_with_a_wrong_state_names_it():
    with pytest.raises(ValueError, match=r"hx\[1\].*\(3, 9\).*\(3, 4\)"):
        rnnkeys.LSTMCell(I, H)(torch.zeros(3, I), (torch.zeros(3, H), torch.zeros(3, 9)))


@of_both_stacks
def test_sequence_wrong_shape_raises_by_name(name):
    module = getattr(rnnkeys, name)(I, H, num_layers=2)
    x = torch.zeros(B, T, I)

    def state(*shape: int) -> Any:
        h = torch.zeros(*shape)
        return (h, h) if name == "LSTM" else h

    with pytest.raises(ValueError, match=f"{name}: Expected input to be 3D, got 2D"):
        module(torch.zeros(T, I))
    with pytest.raises(ValueError, match=rf"{name}: .*input.*{I + 1}\).*input_size={I}"):
        module(torch.zeros(B, T, I + 1))
    for shape in ((3, B, H), (2, 1, H), (2, B, H + 1), (B, H)):
        with pytest.raises(ValueError, match=rf"{name}: .*hx\[0\].*\(2, {B}, {H}\)"):
            module(x, state(*shape))
    for shape in ((T, B), (B, 1), (B, T, 1)):
        with pytest.raises(ValueError, match=rf"{name}: .*mask.*\({B}, {T}\)"):
            module(x, None, torch.ones(shape).bool())


@of_both_stacks
def test_bidirectional_raises_with_the_reason(name):
    with pytest.raises(NotImplementedError, match=f"{name}: bidirectional=True.*future"):
        getattr(rnnkeys, name)(I, H, bidirectional=True)
