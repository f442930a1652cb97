"""Checks of the keys that recurrent modules keep their states under."""

from __future__ import annotations

from rnnkeys import LSTMModule
from rnnkeys.checks.state_keys import RecurrentLayer, find_shared_key_problems


def make_layer(prefix: str) -> tuple[RecurrentLayer, frozenset[int]]:
    states = [f"{prefix}_h", f"{prefix}_c"]
    after = [("next", key) for key in states]
    module = LSTMModule(3, 5, in_keys=["x", *states], out_keys=["y", *after])
    layer = RecurrentLayer(module, module.init_key, module.state_keys, True)
    return layer, frozenset(map(id, module.parameters()))


def test_find_shared_key_problems_of_two_modules_yields_one_for_all_their_keys() -> None:
    one, other = make_layer("actor"), make_layer("actor")
    [problem] = find_shared_key_problems("SACLoss", [one, other])
    assert problem.check == "shared-key" and "'actor_h'" in problem.message
    assert not list(find_shared_key_problems("SACLoss", [one, one, make_layer("critic")]))
