"""Environments of Gymnasium with any spaces, in vectors that TorchRL's collectors step at once."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Composite
from torchrl.envs import (
    ActionMask,
    DeviceCastTransform,
    DTypeCastTransform,
    EnvBase,
    GymWrapper,
    TransformedEnv,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type

try:
    import gymnasium as gym
    from gymnasium import spaces
    from gymnasium.envs.registration import EnvSpec
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
except ImportError as error:
    raise ImportError(
        "rnnkeys.environments needs gymnasium: pip install 'rnnkeys[tutorials]'."
    ) from error

from .gym_masks import (
    MASK_NAME,
    DictActionMask,
    EnvError,
    ShowActionMask,
    count_choices,
    has_mask_entry,
    offers_mask,
)

MIN_IMAGE_SIDE = 36
"""Smallest height and width of an image; smaller ones are flattened to vectors."""


def make_gym_env(
    name: str,
    num_envs: int = 1,
    *,
    vectorization: Literal["sync", "async"] = "sync",
    device: torch.device | str = "cpu",
    **options: Any,
) -> TransformedEnv:
    """Make a vector of environments of Gymnasium that a collector steps at once.

    For environments that take microseconds per step, one process that steps them in turn collects
    fastest. Gymnasium's automatic resets are disabled: TorchRL resets, and keeps the last
    observation of an episode apart from the first one of the next.

    Args:
        name: as for :func:`make_simple_env`.
        num_envs: number of environments, the batch size ``[num_envs]``.
        vectorization: ``"sync"`` steps them in this process, ``"async"`` in one process each.
        device: device of the data.
        **options: as for :func:`make_simple_env`.

    Returns:
        The environments. ``"observation"`` is float32 ``[num_envs, F]`` or uint8
        ``[num_envs, C, Y, X]``; ``"action"`` is float32 ``[num_envs, A]`` or int64
        ``[num_envs, A]``. Each part of a Dict or Tuple of actions is such an entry below
        ``"action"``, named by its key or its number: ``("action", "move")``, ``("action", "0")``.
        ``"action_mask"``, of an environment that has one, is bool ``[num_envs, choices]``, True at
        allowed choices.

    Raises:
        EnvError: as in :func:`make_simple_env`.

    Examples:
        >>> env = make_gym_env("CartPole-v1", 3, hide=(1, 3))
        >>> env.reset()["observation"].shape
        torch.Size([3, 2])
    """
    make = partial(make_simple_env, name, **options)
    vectors = {"sync": SyncVectorEnv, "async": AsyncVectorEnv}
    vector = vectors[vectorization]([make] * num_envs, autoreset_mode=AutoresetMode.DISABLED)
    several = isinstance(vector.single_action_space, spaces.Dict)
    env = TransformedEnv(_SeveralActionsWrapper(vector) if several else GymWrapper(vector))
    if MASK_NAME in env.observation_spec.keys():
        env.append_transform(DTypeCastTransform(torch.int8, torch.bool, in_keys=[MASK_NAME]))
        if isinstance(env.action_spec, ActionMask.ACCEPTED_SPECS):
            env.append_transform(ActionMask(mask_key=MASK_NAME))  # for random actions
    if torch.device(device).type != "cpu":
        env.append_transform(DeviceCastTransform(device, orig_device="cpu"))
    return env


def make_simple_env(
    name: str,
    *,
    wrappers: Sequence[str] = (),
    pixels: bool = False,
    hide: Sequence[int] = (),
    scale: float | Sequence[float] = 1.0,
    frame_stack: int = 1,
    discrete_actions: bool = False,
) -> gym.Env:
    """Make one environment of Gymnasium whose spaces are of the few kinds that networks use.

    Observations become images (uint8, channels first) or vectors (float32): the parts of a Dict or
    Tuple are concatenated, discrete parts become one-hot vectors, and integers are scaled to
    [0, 1]. Actions become vectors, too: a Box without further dimensions, or a MultiDiscrete in
    place of Discrete, MultiDiscrete and MultiBinary, which lets all of their actions be played. A
    Dict or Tuple of them becomes a Dict of such parts.

    An environment with a mask of actions shows ``{"observation": ..., "action_mask": ...}``. It
    comes from an entry ``"action_mask"`` of its observation, or from a method ``action_masks()``;
    for one in ``info`` add ``"rnnkeys.gym_masks:InfoActionMask"`` to ``wrappers``.

    Args:
        name: id of the environment, ``"module:id"`` or ``"module:Class"``; with arguments,
            ``"id(name=value)"``.
        wrappers: wrappers to apply, each ``"module:Class"`` or ``"module:Class(name=value)"``.
        pixels: observe rendered frames, uint8 ``[1, 84, 84]``, in place of the state.
        hide: indices of entries that are left out of a vector, such as velocities.
        scale: factor of a vector's entries, or one factor for each that is left. An environment
            whose bounds are far from its values, such as one-hot vectors of bytes, needs one.
        frame_stack: number of last observations that are concatenated.
        discrete_actions: keep the actions of a Discrete space, from 0, for networks with a value
            for each action; raise if the space is another one.

    Raises:
        EnvError: if the environment or a wrapper cannot be made, if a space cannot be
            converted, or if ``hide`` or ``scale`` do not fit the observation. The environment
            raises it at an observation or reward that is not finite.

    Examples:
        >>> env = make_simple_env("FrozenLake-v1")
        >>> print(env.observation_space.shape, env.action_space)
        (16,) MultiDiscrete([4])
    """
    env = _make_env(name, {"render_mode": "rgb_array"} if pixels else {})
    for wrapper in wrappers:
        env = _apply_wrapper(env, wrapper)
    if pixels:
        env = gym.wrappers.GrayscaleObservation(gym.wrappers.AddRenderObservation(env))
        env = gym.wrappers.ResizeObservation(env, (84, 84))
    env = DictActionMask(env) if has_mask_entry(env) else env
    env = _number_actions(env, name) if discrete_actions else _simplify_actions(env, name)
    if _is_image(env.observation_space):
        if hide:
            raise EnvError(f"hide is {tuple(hide)}, but {name} shows images: expected ()")
        convert = _channels_first
        simple = _image_space(env.observation_space)
    else:
        env = _flatten(env, name)
        flat: Any = env.observation_space
        convert = _Vector(flat, name, hide, scale)
        simple = spaces.Box(-np.inf, np.inf, convert.kept.shape, np.float32)
    env = gym.wrappers.TransformObservation(env, convert, simple)
    env = gym.wrappers.TransformReward(env, partial(_check_reward, name))
    if frame_stack > 1:
        env = gym.wrappers.FrameStackObservation(env, frame_stack)
        stacked: Any = env.observation_space
        count, first, *rest = stacked.shape
        env = gym.wrappers.ReshapeObservation(env, (count * first, *rest))
    return ShowActionMask(env, count_choices(env.action_space)) if offers_mask(env) else env


@torch.no_grad()
@set_exploration_type(ExplorationType.DETERMINISTIC)
def evaluate_policy(env: EnvBase, policy: TensorDictModuleBase, seed: int) -> Tensor:
    """Play one episode in each environment of a vector, without exploration.

    Args:
        env: of :func:`make_gym_env`, with the transforms that the policy needs.
        policy: policy to play.
        seed: the same seed starts the same episodes.

    Returns:
        Sum of the rewards of each episode, float32 ``[num_envs]``.
    """
    with torch.random.fork_rng():  # set_seed sets torch's generator, too
        env.set_seed(seed)
        step = env.reset()
        returns = torch.zeros(step.shape, device=step.device)
        running = torch.ones(step.shape, dtype=torch.bool, device=step.device)
        while running.any():
            step, following = env.step_and_maybe_reset(policy(step))
            returns += step["next", "reward"].squeeze(-1) * running
            running &= ~step["next", "done"].squeeze(-1)
            step = following
    return returns.cpu()


class _SeveralActionsWrapper(GymWrapper):
    """Environments whose actions are a Dict, as nested entries ``("action", name)``."""

    @property
    def action_spec(self) -> Any:
        return super().action_spec

    @action_spec.setter
    def action_spec(self, spec: Any) -> None:
        # TorchRL makes a spec without the batch size, with the parts beside other entries.
        shape = self.batch_size
        parts = Composite(dict(spec.items()), shape=shape)
        setter: Any = GymWrapper.action_spec
        setter.fset(self, Composite({"action": parts}, shape=shape))

    def read_action(self, action: Any) -> Any:
        named: Any = super().read_action(action)
        return named["action"]


def _make_env(name: str, arguments: dict[str, Any]) -> gym.Env:
    try:
        path, more = _parse_call(name)
        return gym.make(_find_env(path), **arguments, **more)
    except Exception as error:  # of the environment's constructor: of any type
        raise EnvError(f"environment {name} cannot be made: {_one_line(error)}") from error


def _find_env(path: str) -> str | EnvSpec:
    """Return the id of an environment, or the spec of a class, which needs no id."""
    module, _, name = path.rpartition(":")
    if module and isinstance(getattr(import_module(module), name, None), type):
        return EnvSpec(f"{name}-v0", entry_point=path)
    return path


def _apply_wrapper(env: gym.Env, text: str) -> gym.Env:
    try:
        path, arguments = _parse_call(text)
        module, _, name = path.partition(":")
        return getattr(import_module(module), name)(env, **arguments)
    except Exception as error:  # of the wrapper's constructor: of any type
        raise EnvError(
            f"wrapper {text} cannot be applied: {_one_line(error)}. Expected 'module:Class' or "
            "'module:Class(name=value)'"
        ) from error


def _parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``"path(name=value)"`` into path and keyword arguments, which are literals."""
    path, _, arguments = text.partition("(")
    call: Any = ast.parse(f"f({arguments or ')'}", mode="eval").body
    return path, {item.arg: ast.literal_eval(item.value) for item in call.keywords}


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _check_reward(name: str, reward: Any) -> float:
    if not math.isfinite(reward):
        raise EnvError(f"a reward of {name} is {reward}: expected a finite number")
    return float(reward)


def _is_image(space: Any) -> bool:
    box = isinstance(space, spaces.Box) and space.dtype == np.uint8
    return box and len(space.shape) in (2, 3) and sorted(space.shape)[-2] >= MIN_IMAGE_SIDE


def _image_space(space: Any) -> gym.Space:
    return spaces.Box(0, 255, _channels_first(space.sample()).shape, np.uint8)


def _channels_first(image: np.ndarray) -> np.ndarray:
    """Return an image ``[Y, X]``, ``[Y, X, C]`` or ``[C, Y, X]`` as ``[C, Y, X]``."""
    image = image[..., None] if image.ndim == 2 else image
    return image if image.shape[0] < image.shape[-1] else np.moveaxis(image, -1, 0)


def _flatten(env: gym.Env, name: str) -> gym.Env:
    space = env.observation_space
    try:
        flat = gym.wrappers.FlattenObservation(env)
    except NotImplementedError:
        flat = env
    if isinstance(flat.observation_space, spaces.Box):
        return flat
    raise EnvError(
        f"{name} has the observation space {space}: expected Box, Discrete, MultiDiscrete, "
        "MultiBinary, or a Dict or Tuple of them. Convert it, or leave parts out, in a wrapper"
    )


class _Vector:
    """Select, scale and check the entries of a flat observation.

    Args:
        space: of the flat observation.
        name: name of the environment, for errors.
        hide: as for :func:`make_simple_env`.
        scale: as for :func:`make_simple_env`.
    """

    def __init__(
        self, space: spaces.Box, name: str, hide: Sequence[int], scale: float | Sequence[float]
    ) -> None:
        self.name = name
        size = space.shape[0]
        self.kept = np.array([index for index in range(size) if index not in hide], int)
        if not self.kept.size or not set(hide) <= set(range(size)):
            raise EnvError(
                f"hide is {tuple(hide)}: expected some of the entries 0 to {size - 1} of {name}, "
                "and not all"
            )
        factor = np.asarray(scale, float)
        if factor.shape not in ((), (1,), self.kept.shape):
            raise EnvError(
                f"scale is {scale}: expected one number, or one for each of the "
                f"{len(self.kept)} entries that {name} shows"
            )
        self.low = np.zeros(1)
        self.factor = factor
        if np.issubdtype(space.dtype, np.integer):
            self.low = space.low[self.kept].astype(float)
            self.factor = factor / (space.high[self.kept] - self.low)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        vector = ((observation[self.kept] - self.low) * self.factor).astype(np.float32)
        if not np.isfinite(vector).all():
            index = self.kept[np.isfinite(vector).argmin()]
            raise EnvError(
                f"entry {index} of an observation of {self.name} is {observation[index]}: expected "
                "a finite number. Correct the environment, or replace the value in a wrapper"
            )
        return vector


def _number_actions(env: gym.Env, name: str) -> gym.Env:
    space: Any = env.action_space
    if not isinstance(space, spaces.Discrete):
        raise EnvError(
            f"{name} has the action space {' '.join(str(space).split())}: expected Discrete, for a "
            "network has one value for each action. Convert it in a wrapper"
        )
    shift = partial(np.add, space.start, dtype=space.dtype)
    return gym.wrappers.TransformAction(env, shift, spaces.Discrete(int(space.n)))


def _simplify_actions(env: gym.Env, name: str) -> gym.Env:
    space: Any = env.action_space
    if isinstance(space, spaces.Dict | spaces.Tuple):
        named = isinstance(space, spaces.Dict)
        parts = dict(space.items()) if named else {str(i): x for i, x in enumerate(space)}
        simple = {key: _simplify_action(part, name) for key, part in parts.items()}
        restore = {key: one for key, (_, one) in simple.items()}
        whole = spaces.Dict({key: one for key, (one, _) in simple.items()})
        return gym.wrappers.TransformAction(env, partial(_restore_parts, restore, named), whole)
    one, restore = _simplify_action(space, name)
    return gym.wrappers.TransformAction(env, restore, one)


def _simplify_action(space: Any, name: str) -> tuple[gym.Space, Any]:
    """Return a Box or MultiDiscrete for a space, and a function that restores its actions."""
    if isinstance(space, spaces.Box):
        low, high = space.low.astype(np.float32).ravel(), space.high.astype(np.float32).ravel()
        return spaces.Box(low, high, dtype=np.float32), partial(_restore_box, space)
    if isinstance(space, spaces.Discrete):
        counts = np.array([space.n])
    elif isinstance(space, spaces.MultiDiscrete):
        counts = space.nvec.ravel()
    elif isinstance(space, spaces.MultiBinary):
        counts = np.full(math.prod(space.shape), 2)
    else:
        raise EnvError(
            f"{name} has the action space {space}: expected Box, Discrete, MultiDiscrete or "
            "MultiBinary, or a Dict or Tuple of them. Convert it in a wrapper"
        )
    return spaces.MultiDiscrete(counts), partial(_restore_choices, space)


def _restore_parts(restore: dict[str, Any], named: bool, action: dict[str, Any]) -> Any:
    """Restore the parts of an action, as a dict if they are named, else as a tuple."""
    parts = {key: one(action[key]) for key, one in restore.items()}
    return parts if named else tuple(parts.values())


def _restore_box(space: spaces.Box, action: np.ndarray) -> np.ndarray:
    """Return the action of ``space`` that is nearest to a flat float32 one."""
    return np.clip(action.reshape(space.shape), space.low, space.high).astype(space.dtype)


def _restore_choices(space: Any, action: np.ndarray) -> Any:
    """Return the action of ``space`` for choices that count from 0."""
    action = action.reshape(space.shape) + getattr(space, "start", 0)
    return action.astype(space.dtype)[()]  # a number, not an array, where the space is Discrete
