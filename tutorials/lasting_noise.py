"""Exploration that lasts: noise that goes on from step to step moves what inertia holds still."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.envs.utils import ExplorationType, exploration_type


class LastingNoise(TensorDictModuleBase):
    r"""Draw an actor's actions anew, with noise that outlasts a step.

    .. math:: x_t = c\,x_{t-1} + \sqrt{1 - c^2}\,\xi_t, \quad \xi_t \sim \mathcal N(0, 1)

    An episode starts with :math:`x_0 = \xi_0`. At each single step the action is distributed as the
    actor says, and its log-probability is the one that PPO asks for. Over several steps it pushes
    one way, where noise that is drawn afresh cancels itself out. What is left of it is a state as
    that of a recurrent layer is: the environment carries it from step to step.

    See "Colored Noise in PPO: Improved Exploration and Performance through Correlated Action
    Sampling", Hollenstein et al., 2024 (arXiv:2312.11091).

    Args:
        actor: has written ``"loc"`` and ``"scale"`` of a bell that is then squeezed between bounds.
        correlation: ``c``, how much of the noise is left after a step, from 0 to 1.
        size: of an action.
        device: of the noise, which has to be that of the actor.
    """

    def __init__(self, actor: Any, correlation: float, size: int, device: str = "cpu") -> None:
        super().__init__()
        self.in_keys = ["loc", "scale", "noise", "is_init"]
        self.out_keys = ["action", "action_log_prob", ("next", "noise")]
        self.correlation, self.size, self.device = correlation, size, device
        # A method is no submodule: the actor's weights stay the actor's.
        self.distribution_of = actor.build_dist_from_params

    def make_tensordict_primer(self) -> TensorDictPrimer:
        spec = Unbounded(self.size, device=self.device)
        return TensorDictPrimer({"noise": spec}, expand_specs=True)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        noise = tensordict.get("noise")
        fresh = torch.randn_like(noise)
        lasting = self.correlation * noise + math.sqrt(1 - self.correlation**2) * fresh
        noise = torch.where(tensordict.get("is_init"), fresh, lasting)
        tensordict.set(("next", "noise"), noise)
        if exploration_type() is not ExplorationType.RANDOM:
            return tensordict
        bell = self.distribution_of(tensordict)
        action = bell.transforms[0](tensordict.get("loc") + tensordict.get("scale") * noise)
        tensordict.set("action", action)
        tensordict.set("action_log_prob", bell.log_prob(action))
        return tensordict
