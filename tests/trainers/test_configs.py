"""Configs for Hydra make the objects that they name, and a YAML file trains recurrent PPO."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("hydra", reason="needs the extra rnnkeys[hydra]")

import hydra
from hydra.errors import InstantiationException
from torchrl.modules import QValueModule
from torchrl.objectives import DQNLoss
from torchrl.trainers.algorithms import PPOTrainer

from rnnkeys.cells import ResidualBlock
from rnnkeys.trainers import configs
from tests.support.absent import import_without
from tests.support.odd_environments import HYBRID_ID, masked_id
from tests.support.recurrent import chain

FOLDER = Path(__file__).parents[2] / "tutorials" / "recurrent_ppo_yaml"
SMALL = [
    *("trainer.total_frames=64", "trainer.frames_per_batch=32", "trainer.env.num_envs=2"),
    *("trainer.seq_len=8", "trainer.minibatch_steps=16", "trainer.num_epochs=2", "eval_episodes=2"),
    "trainer.progress_bar=false",
]


@pytest.fixture(autouse=True)
def trainers_are_experimental() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*experimental/prototype", UserWarning)
        warnings.filterwarnings("ignore", ".*hook stage will be replaced", FutureWarning)
        yield


def load_script() -> ModuleType:
    spec = spec_from_file_location("recurrent_ppo_yaml", FOLDER / "train.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compose(*overrides: str) -> Any:
    with hydra.initialize_config_dir(str(FOLDER), version_base=None):
        return hydra.compose("config", overrides=[*SMALL, *overrides])


@pytest.mark.parametrize(
    ("config", "name", "keys"),
    [
        (configs.LSTMModuleConfig, "LSTMModule", ("layer_h", "layer_c")),
        (configs.GRUModuleConfig, "GRUModule", ("layer",)),
        (configs.RecurrentModuleConfig, "LSTMModule", ("layer_h", "layer_c")),
    ],
)
def test_module_configs_make_the_module_with_its_keys(config: Any, name: str, keys: Any) -> None:
    made = hydra.utils.instantiate(
        config(
            input_size=3,
            hidden_size=5,
            num_layers=2,
            in_key=["agents", "observation"],
            out_key=["agents", "embed"],
            state_key=["agents", "layer"],
            recurrent_backend="loop",
        )
    )
    assert type(made).__name__ == name
    assert made.state_keys == tuple(("agents", key) for key in keys)
    assert made.in_keys[0] == ("agents", "observation")
    assert made.layers.num_layers == 2 and made.recurrent_backend == "loop"


def test_recurrent_module_config_makes_any_cell() -> None:
    config = configs.RecurrentModuleConfig(
        kind="mingru", input_size=3, hidden_size=5, in_key="x", out_key="y"
    )
    module = hydra.utils.instantiate(config)
    assert type(module).__name__ == "MinGRUModule" and isinstance(module.cell, ResidualBlock)


def make_loss(layer: Any) -> DQNLoss:
    return DQNLoss(chain(layer, QValueModule("one_hot")), action_space="one_hot")


@pytest.mark.parametrize("partial", [False, True])
def test_recurrent_loss_config_wires_the_loss_that_it_makes(partial: bool) -> None:
    layer = configs.GRUModuleConfig(
        input_size=3, hidden_size=8, in_key="observation", out_key="action_value"
    )
    loss = {"_target_": f"{__name__}.make_loss", "_partial_": partial, "layer": layer}
    made = hydra.utils.instantiate(configs.RecurrentLossConfig(loss=loss))
    made = made() if partial else made
    assert isinstance(made, DQNLoss) and type(made).__name__ == "RecurrentDQNLoss"


def test_recurrent_loss_config_takes_nested_keys_of_flags() -> None:
    layer = configs.GRUModuleConfig(
        input_size=3,
        hidden_size=8,
        in_key="observation",
        out_key="action_value",
        init_key=["agents", "is_init"],
    )
    loss = make_loss(hydra.utils.instantiate(layer))
    wired = configs.wire_loss(loss, ["agents", "is_init"])
    assert wired._wiring.init_keys == [("agents", "is_init")]


def test_transform_configs_make_transforms_of_an_environment() -> None:
    layer = configs.GRUModuleConfig(
        input_size=4, hidden_size=8, in_key="observation", out_key="embed"
    )
    layer.init_key = "starts"
    env = hydra.utils.instantiate(configs.GymVectorEnvConfig(name="CartPole-v1", num_envs=2))
    for config in (
        configs.PreviousActionRewardConfig(),
        configs.RecurrentTransformsConfig(module=layer, init_key="starts"),
    ):
        env = env.append_transform(hydra.utils.instantiate(config))
    assert {"starts", "recurrent_state", "previous_reward"} <= {str(k) for k in env.reset().keys()}


def test_yaml_trains_recurrent_ppo_and_evaluates_it() -> None:
    torch.manual_seed(0)
    assert 1 <= load_script().run(compose()) <= 500


def test_yaml_takes_another_layer_and_size_by_one_word_each() -> None:
    config = compose("model@layers.actor=gru", "layers.actor.hidden_size=32")
    trainer = hydra.utils.instantiate(config.trainer)
    policy = trainer.collector.policy
    assert [type(one).__name__ for one in _layers(policy)] == ["GRUModule", "LSTMModule"]
    step = policy(trainer.collector.env.reset())
    assert step["actor"].shape[-1] == 32 and step["logits"].shape[-1] == 2


def _layers(policy: Any) -> list[Any]:
    return [one for one in policy.modules() if hasattr(one, "make_tensordict_primer")]


def make_trainer(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[Any, dict[str, Any]]:
    """Make the trainer of the YAML file, and return the arguments that it got, too."""
    given: dict[str, Any] = {}

    def make(**arguments: Any) -> PPOTrainer:
        given.update(arguments)
        return PPOTrainer(**arguments)

    monkeypatch.setattr(configs, "PPOTrainer", make)
    return hydra.utils.instantiate(compose(*overrides).trainer), given


def test_yaml_arguments_reach_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    _, given = make_trainer(
        monkeypatch,
        *("trainer.gamma=0.5", "trainer.lmbda=0.25", "trainer.clip_norm=0.125"),
        *("trainer.lr_scheduler.start_factor=0.75", "+trainer.options.log_interval=7"),
    )
    assert type(given["loss_module"]).__name__ == "RecurrentClipPPOLoss"
    assert type(given["gae"]).__name__ == "RecurrentGAE"
    assert (given["gae"].gamma, given["gae"].lmbda) == (0.5, 0.25)
    assert (given["num_epochs"], given["clip_norm"], given["log_interval"]) == (2, 0.125, 7)
    assert isinstance(given["lr_scheduler"], torch.optim.lr_scheduler.LinearLR)
    assert given["optimizer"].param_groups[0]["lr"] == 0.00075


def test_yaml_minibatches_are_sequences_with_normalized_advantages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, given = make_trainer(monkeypatch)
    batches: list[Any] = []
    given["loss_module"].register_forward_pre_hook(lambda _, args: batches.append(args[0]))
    trainer.train()
    # Two batches of 32 steps, two epochs of two minibatches each.
    assert [batch.shape for batch in batches] == [torch.Size([2, 8])] * 8
    for batch in batches:
        torch.testing.assert_close(batch["advantage"].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_yaml_seed_and_transforms_reach_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    trainers = [make_trainer(monkeypatch, f"trainer.seed={seed}")[0] for seed in (3, 3, 4)]
    first, again, other = (trainer.collector.next() for trainer in trainers)
    assert torch.equal(first["observation"][:, 0], again["observation"][:, 0])
    assert not torch.equal(first["observation"][:, 0], other["observation"][:, 0])
    rewards = first["next", "reward"]
    torch.testing.assert_close(rewards, torch.full_like(rewards, 0.1))


def test_yaml_of_an_environment_with_action_masks_plays_allowed_actions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, _ = make_trainer(
        monkeypatch,
        f"trainer.env.name={masked_id('entry', 'Choice')}",
        *("trainer.env.hide=[]", "trainer.env.scale=1.0", "networks.actor.out_features=4"),
        *("layers.actor.input_size=3", "layers.critic.input_size=3"),
    )
    trainer.train()  # the environment raises at any other action
    assert trainer.collected_frames == 64


def test_yaml_of_an_environment_with_several_actions_raises() -> None:
    env = (f"trainer.env.name={HYBRID_ID}", "trainer.env.hide=[]", "trainer.env.scale=1.0")
    with pytest.raises(InstantiationException, match="plays several actions at a"):
        hydra.utils.instantiate(compose(*env).trainer)


def test_yaml_makes_every_network_once() -> None:
    trainer = hydra.utils.instantiate(compose().trainer)
    played = {id(parameter) for parameter in trainer.collector.policy.parameters()}
    assert played == {id(parameter) for parameter in trainer.loss_module.parameters()}


def test_configs_without_hydra_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"needs hydra-core: pip install 'rnnkeys\[hydra\]'"):
        import_without(monkeypatch, "hydra.core.config_store", "rnnkeys.trainers.configs")
