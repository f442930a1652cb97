"""The Elman network, against ``torch.nn.RNN``."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from rnnkeys import RNNModule, set_recurrent_mode
from tests.support.tolerances import assert_equal


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rnn_module_with_weights_of_nn_rnn_equals_it(nonlinearity: str, bias: bool):
    sizes = {"num_layers": 2, "nonlinearity": nonlinearity, "bias": bias, "dtype": torch.float64}
    theirs = nn.RNN(3, 5, batch_first=True, **sizes)
    ours = RNNModule(3, 5, in_key="x", out_key="y", state_grad=True, **sizes)
    ours.layers.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 9, 3, dtype=torch.float64)
    h = torch.randn(4, 9, 2, 5, dtype=torch.float64)
    is_init = torch.zeros(4, 9, 1, dtype=torch.bool)
    batch = TensorDict({"x": x, "is_init": is_init, "recurrent_state": h}, [4, 9])
    with set_recurrent_mode(True):
        out = ours(batch)
    y, last = theirs(x, h[:, 0].transpose(0, 1).contiguous())
    assert_equal(out["y"], y, torch.float64)
    assert_equal(out["next", "recurrent_state"][:, -1].transpose(0, 1), last, torch.float64)
    mine = torch.autograd.grad(out["y"].square().sum(), list(ours.parameters()))
    expected = torch.autograd.grad(y.square().sum(), list(theirs.parameters()))
    for actual, reference in zip(mine, expected, strict=True):
        assert_equal(actual, reference, torch.float64)


def test_rnn_module_starts_from_the_parameters_of_nn_rnn():
    torch.manual_seed(0)
    ours = RNNModule(3, 5, 2, in_key="x", out_key="y")
    torch.manual_seed(0)
    theirs = nn.RNN(3, 5, 2)
    for (name, actual), (other, expected) in zip(
        ours.layers.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(actual, expected)
