"""CartPole with part of its state hidden, so that one observation is not enough to act on.

A pole that stands upright may be about to fall to the left, to the right, or not at all: its
velocity tells. With the velocities hidden only what was seen before can tell, and a policy needs
memory. The same holds for a single rendered frame.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import AddRenderObservation, GrayscaleObservation, ResizeObservation
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, TensorSpec
from torchrl.envs import (
    Compose,
    DeviceCastTransform,
    EnvBase,
    GymEnv,
    GymWrapper,
    ObservationTransform,
    TransformedEnv,
    UnsqueezeTransform,
)

EPISODE_LIMIT = 500
"""CartPole-v1 ends an episode after this many steps, each worth a reward of 1."""

FRAME_SIZE = 84
"""Height and width of a frame that the policy sees, in pixels."""


class HideVelocities(ObservationTransform):
    """Keep the cart's position and the pole's angle; hide how fast they change.

    Both are divided by the value at which CartPole ends the episode, so that they fill [-1, 1].

    Examples:
        >>> env = TransformedEnv(GymEnv("CartPole-v1"), HideVelocities())
        >>> env.reset()["observation"].shape
        torch.Size([2])
    """

    KEPT = (0, 2)  # of: cart position, cart velocity, pole angle, pole angular velocity
    LIMITS = (2.4, 0.2095)  # metres, radians

    def __init__(self) -> None:
        super().__init__(in_keys=["observation"], out_keys=["observation"])
        self.register_buffer("limits", torch.tensor(self.LIMITS))

    def _apply_transform(self, obs: Tensor) -> Tensor:
        return obs[..., self.KEPT] / self.limits

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: TensorSpec) -> TensorSpec:
        """Announce two entries; Gymnasium bounds each at twice the value that ends an episode."""
        spec = observation_spec["observation"]
        shape = (*spec.shape[:-1], len(self.KEPT))
        observation_spec["observation"] = Bounded(-2.0, 2.0, shape=shape, dtype=spec.dtype)
        return observation_spec


def make_env(observation: str, num_envs: int, device: str) -> TransformedEnv:
    """Make CartPole as the policy sees it, several at once.

    Args:
        observation: ``"positions"``: float32 ``[num_envs, 2]``; ``"pixels"``: uint8 ``[num_envs, 1,
            84, 84]``; or ``"all"``, velocities too: float32 ``[num_envs, 4]``.
        num_envs: how many; without that dimension if there is one.
        device: where the data goes. The environments themselves run on the CPU.
    """
    make = {"positions": _make_positions_env, "pixels": _make_pixels_env, "all": _make_full_env}
    env = make[observation](num_envs)
    if device != "cpu":
        env.append_transform(DeviceCastTransform(device, orig_device="cpu"))
    return env


def _make_positions_env(num_envs: int) -> TransformedEnv:
    return TransformedEnv(_make_gym_env(num_envs), HideVelocities())


def _make_full_env(num_envs: int) -> TransformedEnv:
    return TransformedEnv(_make_gym_env(num_envs), Compose())


def _make_pixels_env(num_envs: int) -> TransformedEnv:
    """Render in shades of grey.

    Frames stay bytes until the network reads them: as floats they would take four times the memory.
    """
    wrappers = (
        AddRenderObservation,
        GrayscaleObservation,
        partial(ResizeObservation, shape=(FRAME_SIZE, FRAME_SIZE)),
    )
    env = _make_gym_env(num_envs, wrappers, render_mode="rgb_array")
    channel = UnsqueezeTransform(dim=-3, in_keys=["observation"], out_keys=["observation"])
    return TransformedEnv(env, channel)


def _make_gym_env(num_envs: int, wrappers: tuple[Callable, ...] = (), **kwargs) -> EnvBase:
    """Make one environment, or many that are stepped together and share each call of the policy.

    With its automatic resets disabled Gymnasium leaves them to TorchRL, which keeps the last
    observation of an episode and the first of the next apart.
    """
    if num_envs == 1 and not wrappers:
        return GymEnv("CartPole-v1", **kwargs)
    if num_envs == 1:
        env = gym.make("CartPole-v1", **kwargs)
        for wrapper in wrappers:
            env = wrapper(env)
        return GymWrapper(env)
    envs = gym.make_vec(
        "CartPole-v1",
        num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.DISABLED},
        wrappers=wrappers,
        **kwargs,
    )
    return GymWrapper(envs)
