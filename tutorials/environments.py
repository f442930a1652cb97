"""Any environment of Gymnasium, many at once, with what a policy may not see hidden."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import AddRenderObservation, GrayscaleObservation, ResizeObservation
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Composite, TensorSpec, Unbounded
from torchrl.envs import (
    DeviceCastTransform,
    GymWrapper,
    ObservationTransform,
    ParallelEnv,
    TransformedEnv,
    UnsqueezeTransform,
)

FRAME_SIZE = 84
"""Height and width of a frame that the policy sees, in pixels."""

POSITIONS: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    # Which entries of the observation are positions, and what to divide them by.
    "CartPole-v1": ((0, 2), (2.4, 0.2095)),
    "Pendulum-v1": ((0, 1), (1.0, 1.0)),
    "MountainCarContinuous-v0": ((0,), (0.6,)),
    "Acrobot-v1": ((0, 1, 2, 3), (1.0, 1.0, 1.0, 1.0)),
}


class KeepPositions(ObservationTransform):
    """Keep the positions in an observation, each divided by its scale; hide the velocities.

    Args:
        kept: indices of the entries to keep.
        scales: what they are divided by.
    """

    def __init__(self, kept: tuple[int, ...], scales: tuple[float, ...]) -> None:
        super().__init__(in_keys=["observation"], out_keys=["observation"])
        self.kept = list(kept)
        self.register_buffer("scales", torch.tensor(scales))

    def _apply_transform(self, obs: Tensor) -> Tensor:
        return obs[..., self.kept].float() / self.scales

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: TensorSpec) -> TensorSpec:
        """Announce fewer entries, unbounded: the scales say nothing about the ends."""
        assert isinstance(observation_spec, Composite)
        shape = (*observation_spec["observation"].shape[:-1], len(self.kept))
        observation_spec["observation"] = Unbounded(shape=torch.Size(shape))
        return observation_spec


def make_env(
    name: str,
    observation: str,
    num_envs: int,
    *,
    magnify: float = 1.0,
    processes: int = 1,
    device: str = "cpu",
    film: bool = False,
) -> TransformedEnv:
    """Make ``num_envs`` environments that are stepped together.

    Args:
        name: id of the environment in Gymnasium.
        observation: ``"positions"`` hides velocities, ``"all"`` hides nothing, ``"pixels"`` shows a
            rendered frame in shades of grey, uint8 ``[num_envs, 1, 84, 84]``.
        num_envs: how many.
        magnify: what positions are multiplied by. A memory learns faster what velocities are where
            positions change by tenths in a step, and not by hundredths.
        processes: over how many processes they are spread, ``[processes, num_envs / processes]``.
            Environments that take microseconds per step are faster in one.
        device: where the data goes.
        film: whether ``env.render()`` gives frames, one for each environment.

    Raises:
        ValueError: if nobody has said which entries of this observation are positions.
    """
    if observation == "positions" and name not in POSITIONS:
        raise ValueError(
            f"--observation is positions, and {name} is none of those whose positions are known: "
            f"{', '.join(POSITIONS)}. Use --observation all, or add it to POSITIONS."
        )
    if processes > 1:
        each = partial(_make_vector, name, observation, num_envs // processes)
        env = TransformedEnv(ParallelEnv(processes, each))
    else:
        env = TransformedEnv(_make_vector(name, observation, num_envs, film))
    if observation == "positions":
        kept, scales = POSITIONS[name]
        env.append_transform(KeepPositions(kept, tuple(scale / magnify for scale in scales)))
    if observation == "pixels":
        channel = UnsqueezeTransform(dim=-3, in_keys=["observation"], out_keys=["observation"])
        env.append_transform(channel)
    if device != "cpu":
        env.append_transform(DeviceCastTransform(device, orig_device="cpu"))
    return env


def _make_vector(name: str, observation: str, num_envs: int, film: bool = False) -> GymWrapper:
    """Step environments one after another in this process.

    With its automatic resets disabled Gymnasium leaves them to TorchRL, which keeps the last
    observation of an episode and the first of the next apart.
    """
    wrappers: tuple[Callable, ...] = ()
    options = {}
    if observation == "pixels":
        size = (FRAME_SIZE, FRAME_SIZE)
        wrappers = (
            AddRenderObservation,
            GrayscaleObservation,
            partial(ResizeObservation, shape=size),
        )
    if film or observation == "pixels":
        options["render_mode"] = "rgb_array"
    envs = gym.make_vec(
        name,
        num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.DISABLED},
        wrappers=wrappers,
        **options,
    )
    return GymWrapper(envs)
