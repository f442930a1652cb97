"""An exported single step plays episodes as the policy does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import GymEnv, TransformedEnv
from torchrl.envs.transforms import ObservationNorm
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import OneHotCategorical, ProbabilisticActor, QValueModule, TanhNormal

import rnnkeys
from rnnkeys import (
    GRUModule,
    LSTMModule,
    export_step,
    get_env_transforms_from_module,
    recurrent_module,
)
from rnnkeys.deploy.export import Step
from rnnkeys.modules.network import RecurrentNetwork
from tests.support.target_cases import Mod, Seq

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
KINDS: dict[str, Any] = {"lstm": LSTMModule, "gru": GRUModule}


def make(cell: str, kind: str, layers: int = 2) -> tuple[Any, Any]:
    """Return a policy with weights that do not always choose the same, and its environment."""
    name, size, actions = ("Pendulum-v1", 3, 1) if kind == "normal" else ("CartPole-v1", 4, 2)
    env = GymEnv(name, max_episode_steps=25)
    recurrent = KINDS[cell](size, 8, num_layers=layers, in_key="observation", out_key="embed")
    if kind == "normal":
        head = torch.nn.Linear(8, 2 * actions)
        bell = Mod(Spread(head), ["embed"], ["loc", "scale"])
        policy: Any = ProbabilisticActor(
            Seq(recurrent, bell), in_keys=["loc", "scale"], distribution_class=TanhNormal
        )
    else:
        key = "action_value" if kind == "values" else "logits"
        body = Seq(recurrent, Mod(torch.nn.Linear(8, actions, bias=False), ["embed"], [key]))
        policy = (
            Seq(body, QValueModule(spec=env.action_spec))
            if kind == "values"
            else ProbabilisticActor(body, in_keys=["logits"], distribution_class=OneHotCategorical)
        )
    with torch.no_grad():
        for key, value in policy.named_parameters():
            # Without biases the observation decides; with this sign the opposite action follows,
            # so that actions differ.
            value.mul_(0.0 if "bias" in key else -3.0 if value.shape == (actions, 8) else 3.0)
    transforms: Any = get_env_transforms_from_module(policy)
    return policy, TransformedEnv(env, transforms)


class Spread(torch.nn.Module):
    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, embed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loc, scale = self.head(embed).chunk(2, -1)
        return loc, scale.exp()


def play(env: Any, policy: Any) -> Any:
    """Play 60 steps of several episodes, one after the other."""
    env.set_seed(3)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return env.rollout(60, policy, break_when_any_done=False)


def replay(step: Callable[..., Any], played: Any, cell: str, layers: int = 2) -> torch.Tensor:
    """Let an exported step act on observations, carrying its states by hand past every reset."""
    states = [torch.full((1, layers, 8), torch.nan) for _ in range(2 if cell == "lstm" else 1)]
    actions = []
    for one in played.split(1):
        action, *states = step(one["observation"], one["is_init"], *states)
        actions.append(torch.as_tensor(action)[0])
    return torch.stack(actions)


def make_and_play(cell: str, kind: str) -> tuple[Any, Any]:
    """Draw policies until one is found that does not always act the same."""
    while True:
        policy, env = make(cell, kind)
        played = play(env, policy)
        assert played["is_init"].sum() > 1
        if len(played["action"].unique(dim=0)) > 1:
            return policy, played


def read_description(session: Any) -> dict[str, Any]:
    return json.loads(session.get_modelmeta().custom_metadata_map["rnnkeys"])


in_all_kinds = pytest.mark.parametrize("kind", ["categories", "values", "normal"])


@in_all_kinds
@pytest.mark.parametrize("cell", KINDS)
def test_exported_program_plays_as_the_policy(cell: str, kind: str) -> None:
    policy, played = make_and_play(cell, kind)
    program = export_step(policy, played[:1].select("observation", "is_init"))
    assert policy.training
    with torch.no_grad():
        again = replay(program.module(), played, cell)
    torch.testing.assert_close(again.to(played["action"].dtype), played["action"], **CLOSE)


@in_all_kinds
@pytest.mark.parametrize("cell", KINDS)
def test_exported_onnx_plays_as_the_policy(cell: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    policy, played = make_and_play(cell, kind)
    export_step(policy, played[:1], onnx=tmp_path / "step.onnx")
    session = runtime.InferenceSession(tmp_path / "step.onnx")
    names = [one.name for one in session.get_inputs()]
    assert names[:2] == ["observation", "is_init"] and len(names) == (4 if cell == "lstm" else 3)

    def step(*tensors: Any) -> Any:
        feed = {n: np.asarray(t) for n, t in zip(names, tensors, strict=True)}
        return session.run(None, feed)

    again = replay(step, played, cell)
    torch.testing.assert_close(again.to(played["action"].dtype), played["action"], **CLOSE)


def test_exported_files_describe_what_a_runtime_needs(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    lstm = LSTMModule(3, 5, in_key="observation", out_key="embed", dtype=torch.float64)
    example = TensorDict(observation=torch.zeros(2, 3, dtype=torch.float64), batch_size=[2])
    files = {"onnx": tmp_path / "step.onnx", "pt2": tmp_path / "step.pt2"}
    export_step(lstm, example, outputs=["embed"], **files)
    session = runtime.InferenceSession(files["onnx"])
    description = read_description(session)
    assert description["inputs"] == [
        {"name": "observation", "shape": ["batch", 3], "dtype": "float64"}
    ]
    assert description["is_init"] == [{"name": "is_init", "shape": ["batch", 1], "dtype": "bool"}]
    assert description["states"] == [
        {
            "input": f"recurrent_state_{name}",
            "output": f"next.recurrent_state_{name}",
            "shape": ["batch", 1, 5],
            "dtype": "float64",
            "initial": 0.0,
        }
        for name in "hc"
    ]
    assert description["outputs"] == [{"name": "embed", "shape": ["batch", 5], "dtype": "float64"}]
    assert description["versions"]["rnnkeys"] == rnnkeys.__version__
    assert description["versions"]["torch"] == torch.__version__
    parts = ("inputs", "is_init", "states")
    described = [one.get("name", one.get("input")) for part in parts for one in description[part]]
    assert [one.name for one in session.get_inputs()] == described
    assert all(one.shape[0] == "batch" for one in [*session.get_inputs(), *session.get_outputs()])
    del description["opset"]
    extra = {"rnnkeys.json": ""}
    torch.export.load(files["pt2"], extra_files=extra)
    assert json.loads(extra["rnnkeys.json"]) == description


def test_exported_feed_forward_policy_takes_neither_flags_nor_states() -> None:
    layer = recurrent_module("feed_forward", 3, 5, in_key="observation", out_key="embed")
    example = TensorDict(observation=torch.zeros(2, 3), batch_size=[2])
    program = export_step(layer, example, outputs=["embed"])
    x = torch.randn(4, 3)
    (embed,) = program.module()(x)
    torch.testing.assert_close(embed, layer(TensorDict(observation=x, batch_size=[4]))["embed"])


def test_exported_program_takes_flags_if_the_example_has_them_or_a_file_is_written(
    tmp_path: Path,
) -> None:
    gru = GRUModule(3, 5, in_key="observation", out_key="embed")
    example = TensorDict(observation=torch.zeros(2, 3), batch_size=[2])
    x, h = torch.randn(4, 3), torch.randn(4, 1, 5)
    is_init = torch.tensor([True, False, False, True]).unsqueeze(-1)
    data = TensorDict(observation=x, recurrent_state=h, batch_size=[4])
    inside, starts = (gru(data.copy().set("is_init", f)) for f in (is_init & False, is_init))
    run = export_step(gru, example, outputs=["embed"]).module()
    torch.testing.assert_close(run(x, h), (inside["embed"], inside["next", "recurrent_state"]))
    with_flags = example.copy().set("is_init", torch.zeros(2, 1, dtype=torch.bool))
    of_example = export_step(gru, with_flags, outputs=["embed"])
    of_file = export_step(gru, example, outputs=["embed"], pt2=tmp_path / "step.pt2")
    for program in (of_example, of_file):
        truth = (starts["embed"], starts["next", "recurrent_state"])
        torch.testing.assert_close(program.module()(x, is_init, h), truth)


def test_exported_program_with_another_batch_size_returns_outputs_and_states() -> None:
    gru = GRUModule(3, 5, in_key="observation", out_key="embed")
    is_init = torch.zeros(1, 1, dtype=torch.bool)
    example = TensorDict(observation=torch.zeros(1, 3), is_init=is_init, batch_size=[1])
    program = export_step(gru, example, outputs=["embed"]).module()
    x, h = torch.randn(7, 3), torch.randn(7, 1, 5)
    is_init = torch.arange(7).unsqueeze(-1) == 3
    data = TensorDict(observation=x, recurrent_state=h, is_init=is_init, batch_size=[7])
    truth = gru(data)
    embed, state = program(x, is_init, h)
    torch.testing.assert_close(embed, truth["embed"])
    torch.testing.assert_close(state, truth["next", "recurrent_state"])


def test_export_of_a_wrong_example_is_rejected_by_name() -> None:
    gru = GRUModule(3, 5, in_key="observation", out_key="embed")
    with pytest.raises(ValueError, match=r"one batch dimension, \[N\]. Got batch size \[\]"):
        export_step(gru, TensorDict(observation=torch.zeros(3)))
    example = TensorDict(observation=torch.zeros(2, 3), batch_size=[2])
    with pytest.raises(KeyError, match="writes no .*action.*Pass outputs=.*embed"):
        export_step(gru, example)
    with pytest.raises(TypeError, match=r"list of keys. Got 'embed': pass \['embed'\]"):
        export_step(gru, example, outputs="embed")
    with pytest.raises(KeyError, match=r"The example misses \['observation'\]"):
        export_step(gru, TensorDict(seen=torch.zeros(1, 3), batch_size=[1]))


def test_export_of_agents_without_states_in_the_example_runs_agents() -> None:
    keys: Any = {
        "in_keys": [("agents", "observation"), ("agents", "h")],
        "out_keys": [("agents", "embed"), ("next", "agents", "h")],
    }
    gru = GRUModule(3, 5, **keys)
    example = TensorDict({("agents", "observation"): torch.zeros(1, 4, 3)}, [1])
    example["is_init"] = torch.zeros(1, 1, dtype=torch.bool)
    program = export_step(gru, example, outputs=[("agents", "embed")]).module()
    x, h = torch.randn(6, 4, 3), torch.randn(6, 4, 1, 5)
    step = TensorDict({("agents", "observation"): x, ("agents", "h"): h}, [6])
    step["is_init"] = torch.zeros(6, 1, dtype=torch.bool)
    truth = gru(step)
    embed, state = program(x, step["is_init"], h)
    torch.testing.assert_close(embed, truth["agents", "embed"])
    torch.testing.assert_close(state, truth["next", "agents", "h"])


def test_export_of_a_normalizer_before_the_policy_normalizes() -> None:
    gru = GRUModule(3, 5, in_key="observation", out_key="embed")
    loc, scale = torch.randn(3), torch.rand(3) + 0.5
    normalizer = ObservationNorm(
        loc=loc, scale=scale, in_keys=["observation"], standard_normal=True
    )
    example = TensorDict(observation=torch.zeros(1, 3), batch_size=[1])
    x, h = torch.randn(6, 3), torch.randn(6, 1, 5)
    program = export_step(Seq(normalizer, gru), example, outputs=["embed"]).module()
    plain = export_step(gru, example, outputs=["embed"]).module()
    torch.testing.assert_close(program(x, h), plain((x - loc) / scale, h))
    assert isinstance(normalizer.standard_normal, torch.Tensor)
    assert "standard_normal" in normalizer.state_dict()


def test_export_of_statistics_by_environment_warns_and_keeps_the_batch_size() -> None:
    gru = GRUModule(3, 5, in_key="observation", out_key="embed")
    loc, scale = torch.randn(2, 3), torch.rand(2, 3) + 0.5
    normalizer = ObservationNorm(
        loc=loc, scale=scale, in_keys=["observation"], standard_normal=True
    )
    example = TensorDict(observation=torch.zeros(2, 3), batch_size=[2])
    with pytest.warns(UserWarning, match="batches of 2 only.*reduce_batch_dims=True"):
        program = export_step(Seq(normalizer, gru), example, outputs=["embed"]).module()
    x, h = torch.randn(2, 3), torch.randn(2, 1, 5)
    plain = export_step(gru, example, outputs=["embed"]).module()
    torch.testing.assert_close(program(x, h), plain((x - loc) / scale, h))


# torch.jit is deprecated, and still what robots run.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit[.a-z_]*` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("cell", KINDS)
def test_step_that_is_traced_by_torch_jit_equals_the_step(cell: str) -> None:
    module = KINDS[cell](3, 5, num_layers=2, in_key="observation", out_key="embed")
    step = Step(RecurrentNetwork(module), ["embed"]).eval()

    def inputs(number: int) -> tuple[torch.Tensor, ...]:
        flags = torch.zeros(number, 1, dtype=torch.bool)
        return (
            torch.randn(number, 3),
            flags,
            *(torch.randn(number, 2, 5) for _ in step.state_keys),
        )

    traced: Any = torch.jit.trace(step, inputs(2))
    given = inputs(6)
    torch.testing.assert_close(traced(*given), step(*given))
