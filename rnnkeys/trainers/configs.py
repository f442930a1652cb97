"""Configs of recurrent policies for Hydra, in the manner of TorchRL's own.

Importing this module adds them to the ``ConfigStore``, in the groups of
``torchrl.trainers.algorithms.configs``: ``env/gym_vector``, ``model/lstm``, ``model/gru``,
``model/recurrent``, ``transform/recurrent``, ``transform/previous_action_reward``,
``loss/recurrent`` and ``trainer/recurrent_ppo``. It needs ``pip install 'rnnkeys[hydra]'``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tensordict.nn import CompositeDistribution, TensorDictSequential
from torch import nn
from torchrl.modules import ProbabilisticActor
from torchrl.objectives.value import GAE
from torchrl.trainers.algorithms import PPOTrainer

try:
    from hydra.core.config_store import ConfigStore
    from omegaconf import MISSING, ListConfig
    from torchrl.trainers.algorithms.configs.envs import EnvConfig
    from torchrl.trainers.algorithms.configs.modules import ModelConfig
    from torchrl.trainers.algorithms.configs.objectives import LossConfig
    from torchrl.trainers.algorithms.configs.transforms import TransformConfig
except ImportError as error:
    raise ImportError(
        "rnnkeys.trainers.configs needs hydra-core: pip install 'rnnkeys[hydra]'."
    ) from error

from ..environments import make_gym_env
from ..modules.primers import get_env_transforms_from_module
from ..objectives import SequenceMinibatches, recurrent_loss
from ..policies import recurrent_module
from ..spaces import action_distribution
from ..transforms import PreviousActionReward
from .collector import ActorCriticCollector
from .hooks import SequenceMinibatchesHook

_HERE = __name__
_KEYS = ("in_key", "out_key", "state_key", "init_key")


@dataclass
class _LayersConfig(ModelConfig):
    """Fields that the configs of recurrent modules share; abstract."""

    kind: str = "lstm"
    input_size: int = MISSING
    hidden_size: int = MISSING
    num_layers: int = 1
    dropout: float = 0.0
    in_key: Any = None
    out_key: Any = None
    state_key: Any = None
    init_key: Any = None
    default_recurrent_mode: bool | None = None
    recurrent_backend: str = "auto"
    state_grad: bool = False
    device: Any = None
    _target_: str = f"{_HERE}.make_module"


@dataclass
class RecurrentModuleConfig(_LayersConfig):
    """Config of :func:`rnnkeys.recurrent_module`: any recurrent layer by the name of its cell.

    Nested keys are lists, as in TorchRL's configs: ``in_key: [agents, observation]``.

    Examples:
        >>> from hydra.utils import instantiate
        >>> config = RecurrentModuleConfig(
        ...     kind="mingru", input_size=3, hidden_size=5, in_key="x", out_key="y"
        ... )
        >>> type(instantiate(config)).__name__
        'MinGRUModule'
    """

    block: str | None = None


@dataclass
class LSTMModuleConfig(_LayersConfig):
    """Config of :class:`rnnkeys.LSTMModule`.

    Examples:
        >>> from hydra.utils import instantiate
        >>> config = LSTMModuleConfig(input_size=3, hidden_size=5, in_key="x", out_key="y")
        >>> type(instantiate(config)).__name__
        'LSTMModule'
    """

    bias: bool = True
    proj_size: int = 0
    python_based: bool = False


@dataclass
class GRUModuleConfig(_LayersConfig):
    """Config of :class:`rnnkeys.GRUModule`.

    Examples:
        >>> from hydra.utils import instantiate
        >>> config = GRUModuleConfig(input_size=3, hidden_size=5, in_key="x", out_key="y")
        >>> instantiate(config).state_keys
        ('recurrent_state',)
    """

    kind: str = "gru"
    bias: bool = True
    python_based: bool = False


@dataclass
class RecurrentLossConfig(LossConfig):
    """Config of :func:`rnnkeys.objectives.recurrent_loss`.

    ``loss`` is the config of a loss or of a value estimator. If that is partial, as TorchRL's
    trainers want it, the result is too: it wires the loss that it makes.
    """

    loss: Any = MISSING
    init_key: Any = None
    _target_: str = f"{_HERE}.wire_loss"


@dataclass
class RecurrentTransformsConfig(TransformConfig):
    """Config of :func:`rnnkeys.get_env_transforms_from_module` for the config of a policy."""

    module: Any = MISSING
    init_key: Any = None
    _target_: str = f"{_HERE}.make_transforms"


@dataclass
class PreviousActionRewardConfig(TransformConfig):
    """Config of :class:`rnnkeys.transforms.PreviousActionReward`."""

    action_key: Any = "action"
    reward_key: Any = "reward"
    _target_: str = f"{_HERE}.make_previous_action_reward"


@dataclass
class GymVectorEnvConfig(EnvConfig):
    """Config of :func:`rnnkeys.environments.make_gym_env`: environments of any spaces."""

    name: str = MISSING
    num_envs: int = 1
    vectorization: str = "sync"
    device: str = "cpu"
    wrappers: list[str] = field(default_factory=partial(list, ()))
    pixels: bool = False
    hide: list[int] = field(default_factory=partial(list, ()))
    scale: Any = 1.0
    frame_stack: int = 1
    discrete_actions: bool = False
    _target_: str = f"{_HERE}.make_env"


@dataclass
class RecurrentPPOTrainerConfig:
    """Config of :func:`make_recurrent_ppo_trainer`."""

    env: Any = MISSING
    actor: Any = MISSING
    critic: Any = MISSING
    loss: Any = MISSING
    optimizer: Any = MISSING
    transforms: Any = None
    lr_scheduler: Any = None
    total_frames: int = MISSING
    frames_per_batch: int = MISSING
    minibatch_steps: int | None = None
    seq_len: int | None = None
    num_epochs: int = 4
    gamma: float = 0.99
    lmbda: float = 0.95
    normalize_advantage: bool = True
    clip_norm: float | None = 0.5
    seed: int | None = None
    logger: Any = None
    progress_bar: bool = True
    options: Any = None
    _target_: str = f"{_HERE}.make_recurrent_ppo_trainer"


def make_module(kind: str, shared: bool = False, **arguments: Any) -> nn.Module:
    """Make a recurrent module by the name of its cell.

    Args:
        kind: as for :func:`rnnkeys.recurrent_module`.
        shared: of TorchRL's configs of models; it has no effect here.
        **arguments: as for :func:`rnnkeys.recurrent_module`, nested keys as lists.
    """
    return recurrent_module(kind, **_without_none(arguments))


def wire_loss(loss: Any, init_key: Any = None) -> Any:
    """Wire a loss or value estimator, or a function that makes one.

    Args:
        loss: a ``LossModule``, a ``ValueEstimatorBase``, or a function that returns one.
        init_key: key of the flags; nested keys as lists.

    Returns:
        The wired loss, or a function that makes it.
    """
    key = _as_key(init_key)
    wire: Any = recurrent_loss
    if isinstance(loss, nn.Module) or not callable(loss):
        return wire(loss, key)
    return lambda *args, **kwargs: wire(loss(*args, **kwargs), key)


def make_transforms(module: nn.Module, init_key: Any = None) -> Any:
    """Make the transforms that an environment needs for a recurrent policy.

    Args:
        module: as for :func:`rnnkeys.get_env_transforms_from_module`.
        init_key: key of the flags; nested keys as lists.
    """
    return get_env_transforms_from_module(module, _as_key(init_key))


def make_previous_action_reward(action_key: Any, reward_key: Any) -> PreviousActionReward:
    """Make a ``PreviousActionReward``.

    Args:
        action_key: key of the action; nested keys as lists.
        reward_key: key of the reward, or None.
    """
    return PreviousActionReward(_as_key(action_key), _as_key(reward_key))


def make_env(name: str, **options: Any) -> Any:
    """Make a vector of environments.

    Args:
        name: as for :func:`rnnkeys.environments.make_gym_env`.
        **options: as for :func:`rnnkeys.environments.make_gym_env`; lists as Hydra makes them.
    """
    return make_gym_env(name, **{key: _as_list(value) for key, value in options.items()})


def make_recurrent_ppo_trainer(
    *,
    env: Any,
    actor: nn.Module,
    critic: nn.Module,
    loss: Any,
    optimizer: Any,
    transforms: Any,
    lr_scheduler: Any,
    total_frames: int,
    frames_per_batch: int,
    minibatch_steps: int | None,
    seq_len: int | None,
    num_epochs: int,
    gamma: float,
    lmbda: float,
    normalize_advantage: bool,
    clip_norm: float | None,
    seed: int | None,
    logger: Any,
    progress_bar: bool,
    options: Any,
) -> PPOTrainer:
    """Make TorchRL's ``PPOTrainer`` for a recurrent actor and critic.

    Every network is made once, so that the networks that collect are those that learn. The
    trainer's collector gathers the states of both, its loss and its estimator are wired, and it
    learns from sequences.

    Args:
        env: of :func:`rnnkeys.environments.make_gym_env`, without transforms of the networks.
        actor: writes the parameters of the distribution that
            :func:`rnnkeys.spaces.action_distribution` chooses for the actions of ``env``:
            ``"logits"``, or ``"loc"`` and ``"scale"``.
        critic: writes ``"state_value"``.
        loss: makes the loss from ``actor_network=`` and ``critic_network=``, a partial config.
        optimizer: makes the optimizer from ``params=``, a partial config.
        transforms: a list of transforms to append to ``env``, or None.
        lr_scheduler: makes a schedule of the learning rate, stepped once a rollout, from the
            optimizer, a partial config; None for a constant one.
        total_frames: environment steps of the run.
        frames_per_batch: environment steps of a rollout, of all environments together.
        minibatch_steps: as for :class:`rnnkeys.objectives.SequenceMinibatches`.
        seq_len: as for :class:`rnnkeys.objectives.SequenceMinibatches`.
        num_epochs: passes over a rollout.
        gamma: discount.
        lmbda: lambda of GAE.
        normalize_advantage: whether minibatches have normalized advantages.
        clip_norm: largest norm of a gradient.
        seed: of networks and environments; None draws one.
        logger: one of TorchRL's loggers, or None.
        progress_bar: whether to show one.
        options: further keyword arguments of ``PPOTrainer``, or None.

    Raises:
        ValueError: if ``env`` plays several actions at a time.
    """
    kind, arguments, _ = action_distribution(env.action_spec)
    if kind is CompositeDistribution:
        raise ValueError(
            f"env plays several actions at a time, {env.action_keys}: expected one, for PPOTrainer "
            "has one action key. Learn them in a loop such as that of tutorials/recurrent_ppo.py."
        )
    masks = [key for key in env.observation_spec.keys() if key == "action_mask"]
    network: Any = actor
    value: Any = critic
    keys: Any = ["logits"] if "logits" in network.out_keys else ["loc", "scale"]
    policy: Any = ProbabilisticActor(
        network,
        in_keys=[*keys, *masks],
        distribution_class=kind,
        distribution_kwargs=arguments,
        return_log_prob=True,
    )
    both = TensorDictSequential(policy, value)
    for transform in (*(transforms or ()), get_env_transforms_from_module(both)):
        env = env.append_transform(transform)
    if seed is not None:
        env.set_seed(seed)
    collector = ActorCriticCollector(
        env, both, frames_per_batch=frames_per_batch, total_frames=total_frames
    )
    wired = recurrent_loss(loss(actor_network=policy, critic_network=critic))
    estimator: Any = GAE(gamma=gamma, lmbda=lmbda, value_network=value)
    learner = optimizer(params=wired.parameters())
    trainer = PPOTrainer(
        collector=collector,
        total_frames=total_frames,
        frame_skip=1,
        optim_steps_per_batch=None,  # pyright: ignore[reportArgumentType]
        loss_module=wired,
        optimizer=learner,
        lr_scheduler=None if lr_scheduler is None else lr_scheduler(learner),
        gae=recurrent_loss(estimator),
        num_epochs=num_epochs,
        clip_norm=clip_norm,
        logger=logger,
        progress_bar=progress_bar,
        **(options or {}),
    )
    minibatches = SequenceMinibatches(
        minibatch_steps, seq_len, networks=both, normalize_advantage=normalize_advantage
    )
    SequenceMinibatchesHook(minibatches).register(trainer)
    return trainer


def _without_none(arguments: dict[str, Any]) -> dict[str, Any]:
    """Drop arguments that are None, and turn lists of strings into keys."""
    given = {name: value for name, value in arguments.items() if value is not None}
    for name in _KEYS:
        if name in given:
            given[name] = _as_key(given[name])
    if "device" in given:
        given["device"] = torch.device(given["device"])
    return given


def _as_key(key: Any) -> Any:
    """Return a key: a list of strings is a nested one."""
    return tuple(key) if isinstance(key, (list, ListConfig)) else key


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, ListConfig) else value


def _register() -> None:
    store = ConfigStore.instance()
    for group, name, node in (
        ("env", "gym_vector", GymVectorEnvConfig),
        ("model", "lstm", LSTMModuleConfig),
        ("model", "gru", GRUModuleConfig),
        ("model", "recurrent", RecurrentModuleConfig),
        ("transform", "recurrent", RecurrentTransformsConfig),
        ("transform", "previous_action_reward", PreviousActionRewardConfig),
        ("loss", "recurrent", RecurrentLossConfig),
        ("trainer", "recurrent_ppo", RecurrentPPOTrainerConfig),
    ):
        store.store(group=group, name=name, node=node)


_register()
