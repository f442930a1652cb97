"""Action masks of Gymnasium's environments, as an entry of the observation."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

MASK_NAME = "action_mask"


class EnvError(ValueError):
    """An environment that cannot be made or used, or that returned a NaN; one line of text."""


class InfoActionMask(gym.Wrapper):
    """Offer the mask that an environment returns in ``info``, such as Taxi, by ``action_masks()``.

    Args:
        env: its ``reset`` and ``step`` return ``info["action_mask"]``.

    Examples:
        >>> env = InfoActionMask(gym.make("Taxi-v4"))
        >>> _, info = env.reset(seed=0)
        >>> (env.action_masks() == info["action_mask"]).all()
        np.True_
    """

    def reset(self, **kwargs: Any) -> Any:
        """Reset the environment."""
        observation, info = self.env.reset(**kwargs)
        self._mask = info[MASK_NAME]
        return observation, info

    def step(self, action: Any) -> Any:
        """Step the environment."""
        step = self.env.step(action)
        self._mask = step[-1][MASK_NAME]
        return step

    def action_masks(self) -> np.ndarray:
        """Return the mask of the current step."""
        return np.asarray(self._mask)


class DictActionMask(gym.ObservationWrapper):
    """Take the entry ``"action_mask"`` out of an observation, and offer it by ``action_masks()``.

    The rest is the observation. If it is a single entry, such as ``"observation"``, the observation
    is that entry, not a mapping.

    Args:
        env: its observations are mappings with an entry ``"action_mask"``.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        whole: Any = env.observation_space
        rest = {name: space for name, space in whole.items() if name != MASK_NAME}
        self._only = next(iter(rest)) if len(rest) == 1 else None
        self.observation_space = rest[self._only] if self._only else spaces.Dict(rest)

    def observation(self, observation: Any) -> Any:
        """Return the observation without the mask."""
        self._mask = observation[MASK_NAME]
        if self._only:
            return observation[self._only]
        return {name: value for name, value in observation.items() if name != MASK_NAME}

    def action_masks(self) -> np.ndarray:
        """Return the mask of the current step."""
        return np.asarray(self._mask)


class ShowActionMask(gym.ObservationWrapper):
    """Show an observation and the mask of ``action_masks()`` side by side.

    Observations become ``{"observation": ..., "action_mask": int8 [A]}``, 1 at allowed actions.

    Args:
        env: has a method ``action_masks()``, which returns as many flags as there are choices.
        size: ``A``, the number of choices of all entries of the action.
    """

    def __init__(self, env: gym.Env, size: int) -> None:
        super().__init__(env)
        self._size = size
        self._read_mask = env.get_wrapper_attr("action_masks")
        self.observation_space = spaces.Dict(
            {"observation": env.observation_space, MASK_NAME: spaces.MultiBinary(size)}
        )

    def observation(self, observation: Any) -> dict[str, Any]:
        """Return the observation and the mask."""
        mask = np.asarray(self._read_mask()).ravel()
        if mask.size != self._size:
            raise EnvError(
                f"action_masks() must return one flag for each of the {self._size} choices of "
                f"{self.unwrapped}. Got {mask.size}."
            )
        return {"observation": observation, MASK_NAME: mask.astype(np.int8)}


def offers_mask(env: gym.Env) -> bool:
    """Return whether an environment has the method ``action_masks``."""
    return env.has_wrapper_attr("action_masks")


def has_mask_entry(env: gym.Env) -> bool:
    """Return whether the observations of an environment have an entry ``"action_mask"``."""
    space = env.observation_space
    return isinstance(space, spaces.Dict) and MASK_NAME in space.spaces and len(space) > 1


def count_choices(space: Any) -> int:
    """Return the number of choices of a discrete space, of all its entries together.

    Raises:
        EnvError: if the space is not Discrete or MultiDiscrete.

    Examples:
        >>> count_choices(spaces.MultiDiscrete([2, 3]))
        5
    """
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    raise EnvError(f"An action mask needs discrete actions. Got the action space {space}.")
