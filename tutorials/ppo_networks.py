"""Actors and critics with memory: from observations to distributions of actions, and to values."""

from __future__ import annotations

from typing import Any

from eye import make_eye
from lasting_noise import LastingNoise
from ppo_settings import Settings
from tensordict import TensorDictBase
from tensordict.nn import (
    AddStateIndependentNormalScale,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.modules import MLP, OneHotCategorical, ProbabilisticActor, TanhNormal

from rnnkeys import GRUModule, LSTMModule


def make_memory(settings: Settings, observation: TensorSpec, name: str) -> list[Any]:
    """Make what turns observations into ``name``: eye and recurrent layer, or a memoryless one."""
    eye, size = make_eye(observation)
    modules: list[TensorDictModuleBase] = []
    key = "observation"
    if eye is not None:
        modules.append(Layers(eye, key, [f"{name}_seen"]))
        key = f"{name}_seen"
    if settings.memoryless:
        layer = nn.Sequential(nn.Linear(size, settings.hidden_size), nn.Tanh())
        return [*modules, Layers(layer, key, [name])]
    kind, states = {"lstm": (LSTMModule, "hc"), "gru": (GRUModule, "h")}[settings.cell]
    memory = kind(
        input_size=size,
        hidden_size=settings.hidden_size,
        in_keys=[key, *(f"{name}_{state}" for state in states)],
        out_keys=[name, *(("next", f"{name}_{state}") for state in states)],
    )
    return [*modules, memory]


class Layers(TensorDictModuleBase):
    """Layers that read one entry and write others.

    What TensorDictModule does, without its looking for a way to convert what layers return: that
    takes longer than the layers, and a step of a small policy is little more than such calls.
    """

    def __init__(self, layers: nn.Module, in_key: str, out_keys: list[str]) -> None:
        super().__init__()
        self.layers, self.in_keys, self.out_keys = layers, [in_key], out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = self.layers(tensordict.get(self.in_keys[0]))
        values = (out,) if isinstance(out, Tensor) else out
        for key, value in zip(self.out_keys, values, strict=True):
            tensordict.set(key, value)
        return tensordict


class Agent:
    """Actor and critic, with a memory each or, ``--shared``, with one for both."""

    def __init__(self, settings: Settings, observation: TensorSpec, action: TensorSpec) -> None:
        memory = make_memory(settings, observation, "actor")
        self.actor = make_actor(settings, memory, action)
        head = make_head(settings, 1)
        if settings.shared:
            value = Layers(head, "actor", ["state_value"])
            self.critic = TensorDictSequential(*memory, value)
            # The loss runs the memory once, for the actor, and the critic goes on from there.
            self.critic_in_loss = TensorDictSequential(value)
            memories = []
        else:
            memories = make_memory(settings, observation, "critic")
            value = Layers(head, "critic", ["state_value"])
            self.critic = self.critic_in_loss = TensorDictSequential(*memories, value)
        noise = make_noise(settings, self.actor, action)
        # What collects: all that remembers. Values are worked out later, for all steps at once.
        self.both = TensorDictSequential(self.actor, *noise, *memories).to(settings.device)
        self.critic.to(settings.device)


def make_noise(settings: Settings, actor: Any, spec: TensorSpec) -> list[LastingNoise]:
    """Make what lets exploration outlast a step, if that is asked for."""
    if not settings.noise_correlation:
        return []
    if spec.domain == "discrete":
        raise ValueError(
            f"--noise-correlation is {settings.noise_correlation}, and the actions of "
            f"{settings.env} are discrete: expected 0, because there is no noise in them"
        )
    return [LastingNoise(actor, settings.noise_correlation, spec.shape[-1], settings.device)]


def make_head(settings: Settings, outputs: int) -> MLP:
    return MLP(
        in_features=settings.hidden_size,
        out_features=outputs,
        num_cells=[settings.head_size],
        activation_class=nn.Tanh,
    )


def make_actor(settings: Settings, memory: list[Any], spec: TensorSpec) -> Any:
    """Memory -> distribution of actions: categories, or a bell squeezed between bounds."""
    options: dict[str, Any] = {"return_log_prob": True, "spec": spec}
    size = spec.shape[-1]
    if spec.domain == "discrete":
        head = Layers(make_head(settings, size), "actor", ["logits"])
        body = TensorDictSequential(*memory, head)
        return ProbabilisticActor(
            body, in_keys=["logits"], distribution_class=OneHotCategorical, **options
        )
    layers = nn.Sequential(make_head(settings, size), AddStateIndependentNormalScale(size))
    body = TensorDictSequential(*memory, Layers(layers, "actor", ["loc", "scale"]))
    bounds = {"low": spec.space.low.flatten(0, -2)[0], "high": spec.space.high.flatten(0, -2)[0]}
    return ProbabilisticActor(
        body,
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={**bounds, "tanh_loc": False},
        **options,
    )
