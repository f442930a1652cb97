"""Small environments with every kind of space; importing this module registers them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class SpacesEnv(gym.Env):
    """Returns samples of ``observation_space``; raises at an action outside ``action_space``.

    Args:
        observation: space of the observations.
        action: space of the actions.
        length: steps of an episode.
        bad_step: step at which ``bad`` is returned.
        bad: ``"observation"`` or ``"reward"``, which is NaN at ``bad_step``.
    """

    metadata = {"render_modes": []}

    def __init__(
        self,
        observation: gym.Space,
        action: gym.Space,
        length: int = 20,
        bad_step: int | None = None,
        bad: str = "observation",
    ) -> None:
        self.observation_space = observation
        self.action_space = action
        self.length = length
        self.bad_step = bad_step
        self.bad = bad
        self.played: set[tuple[int, ...]] = set()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is not in {self.action_space}")
        if not isinstance(self.action_space, spaces.Box | spaces.Dict | spaces.Tuple):
            self.played.add(tuple(np.ravel(action).tolist()))
        self.time += 1
        observation, reward = self.observation_space.sample(), 1.0
        if self.time == self.bad_step:
            reward = np.nan if self.bad == "reward" else reward
            if self.bad == "observation":
                observation[1] = np.nan
        return observation, reward, self.time >= self.length, False, {}


class MaskedEnv(SpacesEnv):
    """Raises at an action that the mask does not allow; one flag is True in each entry, or more.

    Args:
        action: space of the actions, Discrete or MultiDiscrete.
        where: ``"entry"`` of the observation, ``"method"`` or ``"info"``.
        length: steps of an episode, after which no action is allowed.
    """

    def __init__(self, action: Any, where: str, length: int = 20) -> None:
        super().__init__(VECTOR, action, length)
        self.where = where
        self.sizes = [int(action.n)] if isinstance(action, spaces.Discrete) else action.nvec
        if where == "entry":
            mask = spaces.MultiBinary(int(sum(self.sizes)))
            self.observation_space = spaces.Dict({"observation": VECTOR, "action_mask": mask})
        if where == "method":
            self.action_masks = lambda: self.mask

    def _draw_mask(self) -> None:
        parts = [self.np_random.integers(2, size=size) for size in self.sizes]
        for part in parts:
            part[self.np_random.integers(len(part))] = 1
        self.mask = np.concatenate(parts).astype(np.int8)
        if self.time >= self.length:
            self.mask[:] = 0

    def _add_mask(self, observation: Any, info: dict) -> tuple[Any, dict]:
        if self.where == "entry":
            observation = {**observation, "action_mask": self.mask}
        return observation, {"action_mask": self.mask} if self.where == "info" else info

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        observation, info = super().reset(seed=seed, options=options)
        self._draw_mask()
        return self._add_mask(observation, info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        choices = np.ravel(action) - getattr(self.action_space, "start", 0)
        offsets = np.cumsum([0, *self.sizes[:-1]])
        if not self.mask[choices + offsets].all():
            raise ValueError(f"{action} is not allowed by {self.mask}")
        observation, reward, *ends, info = super().step(action)
        self._draw_mask()
        observation, info = self._add_mask(observation, info)
        return observation, reward, *ends, info  # pyright: ignore[reportReturnType]


class AlwaysMasked(gym.Wrapper):
    """Offers a mask of three flags."""

    def action_masks(self) -> np.ndarray:
        return np.ones(3, np.int8)


def box(*shape: int, dtype: Any = np.float32) -> spaces.Box:
    return spaces.Box(-1, 1, shape, dtype)


VECTOR = box(3)
CHOICE = spaces.Discrete(2)

OBSERVATIONS: dict[str, tuple[gym.Space, tuple[int, ...]]] = {
    # The space of observations, and the shape of what the policy sees.
    "Vector": (VECTOR, (3,)),
    "Float64": (box(3, dtype=np.float64), (3,)),
    "Scalar": (box(), (1,)),
    "Matrix": (box(3, 4), (12,)),
    "Integers": (spaces.Box(0, 9, (3,), np.int64), (3,)),
    "Bytes": (spaces.Box(0, 255, (6,), np.uint8), (6,)),
    "SmallImage": (spaces.Box(0, 255, (7, 7, 3), np.uint8), (147,)),
    "Image": (spaces.Box(0, 255, (64, 48, 3), np.uint8), (3, 64, 48)),
    "ImageChannelsFirst": (spaces.Box(0, 255, (1, 84, 84), np.uint8), (1, 84, 84)),
    "GreyImage": (spaces.Box(0, 255, (36, 40), np.uint8), (1, 36, 40)),
    "Discrete": (spaces.Discrete(5), (5,)),
    "DiscreteFrom3": (spaces.Discrete(5, start=3), (5,)),
    "MultiDiscrete": (spaces.MultiDiscrete([3, 4]), (7,)),
    "MultiBinary": (spaces.MultiBinary([2, 3]), (6,)),
    "Dict": (spaces.Dict({"a": box(3), "b": spaces.Dict({"c": box(2, dtype=np.float64)})}), (5,)),
    "Tuple": (spaces.Tuple((box(3), spaces.Discrete(4))), (7,)),
}
ACTIONS: dict[str, tuple[gym.Space, tuple[int, ...]]] = {
    # The space of actions, and the shape of what the policy plays.
    "Choice": (CHOICE, (1,)),
    "ChoiceFromMinus1": (spaces.Discrete(3, start=-1), (1,)),
    "Choices": (spaces.MultiDiscrete([2, 3]), (2,)),
    "ChoicesFrom1": (spaces.MultiDiscrete([2, 3], start=[1, -1]), (2,)),
    "ChoicesMatrix": (spaces.MultiDiscrete(np.array([[2, 3], [1, 2]])), (4,)),
    "Binary": (spaces.MultiBinary(3), (3,)),
    "BinaryMatrix": (spaces.MultiBinary([2, 2]), (4,)),
    "Box": (box(2), (2,)),
    "BoxFloat64": (box(2, dtype=np.float64), (2,)),
    "BoxMatrix": (box(2, 2), (4,)),
    "BoxShifted": (spaces.Box(np.array([1, -3], np.float32), np.array([2, 7], np.float32)), (2,)),
    "BoxUnbounded": (spaces.Box(-np.inf, np.inf, (2,), np.float32), (2,)),
    "BoxBoundedBelow": (spaces.Box(0, np.inf, (2,), np.float32), (2,)),
}


def observation_id(name: str) -> str:
    return f"OddObservation{name}-v0"


def action_id(name: str) -> str:
    return f"OddAction{name}-v0"


def masked_id(where: str, name: str) -> str:
    return f"OddMasked{where.title()}{name}-v0"


def register(name: str, observation: gym.Space, action: gym.Space, **options: Any) -> None:
    gym.register(name, lambda **kwargs: SpacesEnv(observation, action, **options, **kwargs))


for _name, (_space, _) in OBSERVATIONS.items():
    register(observation_id(_name), _space, CHOICE)
for _name, (_space, _) in ACTIONS.items():
    register(action_id(_name), VECTOR, _space)
for _where in ("entry", "method", "info"):
    for _name, _space in (
        ("Choice", spaces.Discrete(4)),
        ("Choices", spaces.MultiDiscrete([2, 3])),
    ):
        gym.register(
            masked_id(_where, _name),
            lambda space=_space, where=_where, **kwargs: MaskedEnv(space, where, **kwargs),
        )
register("OddOneStep-v0", VECTOR, CHOICE, length=1)
register("OddSequence-v0", spaces.Sequence(VECTOR), CHOICE)
register("OddActionText-v0", VECTOR, spaces.Text(3))
HYBRID = spaces.Dict({"move": box(2), "tool": spaces.Discrete(3, start=1)})
HYBRID_ID = "OddActionDict-v0"
register(HYBRID_ID, VECTOR, HYBRID)
register("OddActionTuple-v0", VECTOR, spaces.Tuple(tuple(HYBRID.values())))
register("OddNaN-v0", VECTOR, CHOICE, bad_step=13)
register("OddNaNReward-v0", VECTOR, CHOICE, bad_step=13, bad="reward")
register("OddNaNBox-v0", VECTOR, box(2), bad_step=13)
