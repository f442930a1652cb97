"""Layers that change after construction: hooks, parametrizations, swapped and quantized layers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from rnnkeys import recurrent_module, set_recurrent_mode
from tests.support.recurrent import batch, make, recurrently
from tests.support.tolerances import assert_equal

in_both_kinds = pytest.mark.parametrize("kind", ["lstm", "gru"])
HOOKS: dict[str, Any] = {
    "forward pre-hook": lambda layers: layers.register_forward_pre_hook(lambda *_: None),
    "forward hook": lambda layers: layers.register_forward_hook(lambda *_: None),
    "backward pre-hook": lambda layers: layers.register_full_backward_pre_hook(lambda *_: None),
    "backward hook": lambda layers: layers.register_full_backward_hook(lambda *_: None),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", ["lstm", "gru", "lstm_ln"])
def test_module_with_a_hook_on_its_layers_warns_that_it_does_not_run(kind, hook):
    module = recurrent_module(kind, 3, 5, in_key="observation", out_key="embed")
    HOOKS[hook](module.layers)
    with pytest.warns(UserWarning, match="Hooks on .* do not run"):
        recurrently(module, batch(module))


@in_both_kinds
def test_module_with_pruned_weights_does_not_warn_and_uses_them(kind):
    module = make(kind)
    prune.random_unstructured(module.layers, "weight_hh_l0", amount=0.5)
    other = make(kind)
    copied = {k: v for k, v in module.layers.named_parameters() if "_orig" not in k}
    copied["weight_hh_l0"] = module.layers.weight_hh_l0.detach()
    other.layers.load_state_dict(copied)
    data = batch(module)
    actual, expected = recurrently(module, data)["embed"], recurrently(other, data)["embed"]
    assert_equal(actual, expected, torch.float32)


class _Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight + 0.3 * torch.randn_like(weight)


@in_both_kinds
@pytest.mark.parametrize("sequences", [True, False])
def test_parametrization_is_evaluated_once_per_call_and_never_inside_cached(kind, sequences):
    module, noise = make(kind), _Noise()
    parametrize.register_parametrization(module.layers, "weight_hh_l0", noise)
    data = batch(module)
    noise.calls = 0
    with set_recurrent_mode(sequences):
        module(data.clone())
        assert noise.calls == 1
        with parametrize.cached():
            assert module.layers.weight_hh_l0 is not None
            module(data.clone())
            module(data.clone())
    assert noise.calls == 2


@in_both_kinds
def test_module_with_layers_added_by_add_module_uses_them_in_compiled_code(kind):
    module = make(kind)
    other = copy.deepcopy(module.layers)
    other.reset_parameters()
    module.add_module(module.layers_name, other)
    data = batch(module)
    expected = recurrently(module, data)["embed"]
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with set_recurrent_mode(True):
        assert_equal(compiled(data.clone())["embed"], expected, torch.float32)
    loop = make(kind, recurrent_backend="loop")
    loop.layers.load_state_dict(other.state_dict())
    assert_equal(expected, recurrently(loop, data)["embed"], torch.float32)


def test_module_with_quantized_layers_raises_and_names_them():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of this way to quantize
        policy = nn.Sequential(make("lstm"))
        quantized = torch.ao.quantization.quantize_dynamic(policy, {nn.LSTM}, dtype=torch.qint8)
    module = quantized[0]
    with pytest.raises(ValueError, match="quantized.*LSTM; leave 'lstm' out of a quantization"):
        module(batch(make("lstm"))[:, 0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_module_in_checkpoint_without_its_mode_raises_and_names_the_remedy(reentrant):
    module = make("gru")
    data = batch(module)

    def run(x: Tensor) -> Tensor:
        return module(data.clone().set("observation", x))["embed"]

    x = data["observation"].requires_grad_()
    with set_recurrent_mode(True):
        y = checkpoint(run, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="checkpoint does not restore the mode"):
        y.sum().backward()
    y = checkpoint(set_recurrent_mode(True)(run), x, use_reentrant=reentrant)
    y.sum().backward()
    assert x.grad is not None and x.grad.any()


@pytest.mark.parametrize("kind", ["gru", "lstm", "lstm_ln"])
@pytest.mark.parametrize("wrong", [True, 2.0, 0])
def test_num_layers_that_is_no_positive_int_raises(kind, wrong):
    with pytest.raises(ValueError, match="num_layers must be an int of at least 1"):
        recurrent_module(kind, 3, 5, num_layers=wrong, in_key="observation", out_key="embed")
