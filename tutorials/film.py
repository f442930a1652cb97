"""A film of a policy that plays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from rnnkeys import get_env_transforms_from_module


@torch.no_grad()
@set_exploration_type(ExplorationType.DETERMINISTIC)
def film(env: TransformedEnv, policy: TensorDictModuleBase, path: Path, seed: int) -> int:
    """Play an episode without exploration, film it, and return the number of its frames."""
    env.append_transform(get_env_transforms_from_module(policy))
    env.set_seed(seed)
    step, frames = env.reset(), []
    done = False
    while not done:
        frames.append(Image.fromarray(np.asarray(env.render()[0])))
        step, ahead = env.step_and_maybe_reset(policy(step))
        done = bool(step["next", "done"].all())
        step = ahead
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=33, loop=0)
    env.close()
    return len(frames)
