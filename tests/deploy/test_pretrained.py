"""Policies that are saved to a folder and loaded again; damaged and foreign folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrl.data import Bounded, OneHot

import rnnkeys
from rnnkeys import StatefulPolicy, drqn_policy, load_pretrained, save_pretrained
from rnnkeys.deploy import PretrainedError, read_arguments
from tests.support.tutorials import load_tutorial

safetensors: Any = pytest.importorskip("safetensors")
ARGUMENTS: dict[str, Any] = {
    "action_spec": OneHot(2),
    "observation_shape": (4,),
    "cell": "gru",
    "hidden_size": 8,
    "encoder_sizes": (16,),
}
RESULT = {"environment": "CartPole-v1", "mean return": 500.0, "episodes": 20}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    policy = drqn_policy(**ARGUMENTS)
    save_pretrained(
        policy, tmp_path / "pole", builder=drqn_policy, arguments=ARGUMENTS, result=RESULT
    )
    return tmp_path / "pole"


def change_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def test_load_pretrained_policy_plays_as_the_saved_one(tmp_path: Path) -> None:
    policy = drqn_policy(**ARGUMENTS)
    save_pretrained(policy, tmp_path, builder=drqn_policy, arguments=ARGUMENTS)
    loaded = load_pretrained(tmp_path)
    assert not loaded.training
    spec = read_arguments(tmp_path)["action_spec"]
    players = [
        StatefulPolicy(one, 3, action_key="action_value", autoreset="disabled")
        for one in (policy, loaded)
    ]
    for observation in np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32):
        values = [player(observation) for player in players]
        np.testing.assert_array_equal(*values)
    assert spec == OneHot(2)


def test_save_pretrained_folder_has_no_pickle_and_a_card_with_the_result(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    with safetensors.safe_open(folder / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: rnnkeys\n")
    assert "| environment | mean return | episodes |" in card
    assert "| CartPole-v1 | 500.0 | 20 |" in card
    assert "load_pretrained('pole')" in card
    config = json.loads((folder / "config.json").read_text())
    assert config["builder"] == "drqn_policy"
    assert config["versions"]["rnnkeys"] == rnnkeys.__version__


def test_save_pretrained_policy_of_a_tutorial_loads_with_its_builder(tmp_path: Path) -> None:
    dqn = load_tutorial("recurrent_dqn")

    def make_policy(**arguments: Any) -> Any:
        args = dqn.Args(**arguments)
        return dqn.make_policy(args, dqn.make_env(args, 1))

    arguments = vars(dqn.Args(hidden_size=8, hide=(1, 3)))
    policy = make_policy(**arguments)
    save_pretrained(policy, tmp_path, builder=make_policy, arguments=arguments)
    assert "builder=make_policy" in (tmp_path / "README.md").read_text()
    loaded = load_pretrained(tmp_path, builder=make_policy)
    for key, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    with pytest.raises(PretrainedError, match=r"'make_policy', which is not part.*builder=make_po"):
        load_pretrained(tmp_path)


def test_save_pretrained_with_other_arguments_raises_and_writes_nothing(tmp_path: Path) -> None:
    policy = drqn_policy(**ARGUMENTS)
    other = {**ARGUMENTS, "hidden_size": 16}
    with pytest.raises(ValueError, match="weights differ .*in number or shape: module.1.gru"):
        save_pretrained(policy, tmp_path / "new", builder=drqn_policy, arguments=other)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder", torch.nn.ReLU()),
        ("action_spec", Bounded(-1, 1, torch.Size([1]))),
        ("action_spec", OneHot(2, shape=torch.Size([3, 2]))),
    ],
)
def test_save_pretrained_argument_that_json_cannot_hold_raises(
    tmp_path: Path, name: str, value: Any
) -> None:
    with pytest.raises(TypeError, match=f"'{name}' is a {type(value).__name__}.*as builder"):
        save_pretrained(
            drqn_policy(**ARGUMENTS),
            tmp_path,
            builder=drqn_policy,
            arguments={**ARGUMENTS, name: value},
        )


def test_load_pretrained_without_files_names_the_missing_one(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(PretrainedError, match="config.json cannot be read .*save_pretrained"):
        load_pretrained(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(PretrainedError, match="model.safetensors cannot be read"):
        load_pretrained(folder)


@pytest.mark.parametrize("change", ["cut", "flipped", "of another policy"])
def test_load_pretrained_damaged_weights_raise(tmp_path: Path, folder: Path, change: str) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    if change == "cut":
        del data[-10:]
    elif change == "flipped":
        data[-1] ^= 1
    else:
        other = tmp_path / "other"
        policy = drqn_policy(**ARGUMENTS)
        save_pretrained(policy, other, builder=drqn_policy, arguments=ARGUMENTS)
        data[:] = (other / "model.safetensors").read_bytes()
    file.write_bytes(data)
    with pytest.raises(PretrainedError, match="model.safetensors is damaged, or belongs"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"library": "rnn', "is damaged: it is not JSON"),
        ('{"architectures": ["LlamaForCausalLM"]}', "of another library"),
        ("[1]", "of another library"),
        ('{"library": "rnnkeys", "format": 2, "versions": {"rnnkeys": "9"}}', "newer rnnkeys"),
        ('{"library": "rnnkeys", "format": 1}', "damaged: the entries .*'builder'"),
    ],
)
def test_load_pretrained_foreign_config_raises(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(PretrainedError, match=message):
        load_pretrained(folder)


def test_load_pretrained_arguments_of_another_version_raise(folder: Path) -> None:
    arguments = json.loads((folder / "config.json").read_text())["arguments"]
    change_config(folder, arguments={**arguments, "memory_size": 3})
    with pytest.raises(PretrainedError, match="drqn_policy does not make the policy.*memory_size"):
        load_pretrained(folder)
    change_config(folder, arguments={**arguments, "hidden_size": 4})
    with pytest.raises(
        PretrainedError, match="(?s)drqn_policy does not make the policy.*size mism"
    ):
        load_pretrained(folder)


def test_load_pretrained_weights_that_are_not_safetensors_raise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")
    change_config(folder, weights_sha256=hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(PretrainedError, match="is damaged: it is not a file of safetensors"):
        load_pretrained(folder)


@pytest.mark.parametrize("size", ["x", -1, None, 2.5, 2**70])
def test_read_arguments_spec_of_no_size_raises(folder: Path, size: Any) -> None:
    change_config(folder, arguments={"action_spec": {"spec": "OneHot", "n": size}})
    for read in (read_arguments, load_pretrained):
        with pytest.raises(PretrainedError, match="n must be "):
            read(folder)


def test_read_arguments_of_a_dict_that_is_not_a_spec_returns_it(folder: Path) -> None:
    arguments = {"action_spec": {"spec": ["OneHot"], "n": 2}}
    change_config(folder, arguments=arguments)
    assert read_arguments(folder) == arguments


def test_load_pretrained_builder_named_by_the_file_is_not_imported(folder: Path) -> None:
    change_config(folder, builder="os:system")
    with pytest.raises(PretrainedError, match="'os:system', which is not part of rnnkeys"):
        load_pretrained(folder)
