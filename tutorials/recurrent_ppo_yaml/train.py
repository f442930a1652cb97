"""Recurrent PPO from a YAML file, by TorchRL's PPOTrainer; it needs rnnkeys[tutorials,hydra].

python train.py                                      # CartPole without velocities, config.yaml
python train.py model@layers.actor=gru               # another layer for the actor
python train.py trainer.total_frames=20000 layers.actor.hidden_size=32
"""

from __future__ import annotations

import warnings
from typing import Any

import hydra
import torch
from omegaconf import DictConfig

from rnnkeys.environments import evaluate_policy
from rnnkeys.modules import get_env_transforms_from_module
from rnnkeys.trainers import configs as configs  # adds the configs to Hydra's store

EVAL_SEED = 200_000_000


def run(config: DictConfig) -> float:
    """Train, and return the mean return of new episodes."""
    warnings.filterwarnings("ignore", ".*experimental/prototype", UserWarning)
    warnings.filterwarnings("ignore", ".*hook stage will be replaced", FutureWarning)
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    trainer: Any = hydra.utils.instantiate(config.trainer)
    policy = trainer.collector.policy
    trainer.train()
    env = configs.make_env(**{**_plain(config.trainer.env), "num_envs": config.eval_episodes})
    env.append_transform(get_env_transforms_from_module(policy))
    return evaluate_policy(env, policy[0], EVAL_SEED + config.seed).mean().item()


def _plain(config: DictConfig) -> dict[str, Any]:
    return {str(key): value for key, value in config.items() if not str(key).startswith("_")}


@hydra.main(version_base=None, config_path=".", config_name="config")
def main(config: DictConfig) -> None:
    print(f"mean return of {config.eval_episodes} new episodes: {run(config):.1f}")


if __name__ == "__main__":
    main()
