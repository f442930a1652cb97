"""The part of an actor that runs in another process: environments, a policy and a collector."""

from __future__ import annotations

import io
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cloudpickle  # of TorchRL's dependencies
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

MakeEnv = Callable[[], EnvBase]
Policy = TensorDictModuleBase | Callable[[int], TensorDictModuleBase]


@dataclass(frozen=True)
class Plan:
    """Arguments that all actors of a group share; see :class:`rnnkeys.collectors.ProcessActors`."""

    make_env: MakeEnv
    policy: Policy
    frames_per_batch: int
    num_threads: int = 1


class Source:
    """Environments, a policy, and the TorchRL collector that runs them.

    Args:
        plan: how to make them.
        actor: number of the actor.
        seed: of the environments.
    """

    def __init__(self, plan: Plan, actor: int, seed: int) -> None:
        torch.manual_seed(seed)
        env = plan.make_env()
        env.set_seed(seed)
        self.policy: Any = plan.policy
        if not isinstance(plan.policy, nn.Module):
            self.policy = plan.policy(actor)
        self.collector: Any = Collector(
            env,
            self.policy,
            frames_per_batch=plan.frames_per_batch,
            total_frames=-1,
            storing_device="cpu",
        )

    def load_weights(self, weights: TensorDictBase) -> None:
        """Copy weights into the policy.

        Raises:
            ValueError: if they are those of another module.
        """
        own: Any = TensorDict.from_module(self.policy)
        mine, theirs = (set(td.flatten_keys(".").keys()) for td in (own, weights))
        if mine != theirs:
            raise ValueError(
                "update_policy needs the weights of a module like the actors' policy, exploration "
                f"included. Missing: {sorted(mine - theirs)[:3]}; unknown: "
                f"{sorted(theirs - mine)[:3]}."
            )
        self.collector.update_policy_weights_(weights)

    def next(self) -> TensorDictBase:
        """Collect a batch ``[num_envs, T]``."""
        batch = self.collector.next()
        return batch.reshape(-1, batch.shape[-1])

    def close(self) -> None:
        """Close the environments; a second call has no effect."""
        if not self.collector.closed:
            self.collector.shutdown()


def read_weights(policy: nn.Module | TensorDictBase) -> TensorDictBase:
    """Return all parameters and buffers of a module; a TensorDict is returned as it is."""
    weights: Any = TensorDict.from_module(policy) if isinstance(policy, nn.Module) else policy
    return weights.data


class Answer(NamedTuple):
    """The answer to a request for a batch: a batch ``[num_envs, T]``, or the text of an error."""

    batch: TensorDictBase | None
    location: str
    error: str = ""


class Worker:
    """Collects batches on request.

    The environments and the policy are made with the first batch, so that an exception there
    reaches the learner as the answer to its request.

    Args:
        plan: a pickled :class:`Plan`.
        actor: number of the actor.
        seed: of its environments.
    """

    def __init__(self, plan: bytes, actor: int, seed: int) -> None:
        self.plan = plan
        self.actor = actor
        self.seed = seed
        self.location = f"process {os.getpid()} on {socket.gethostname()}"
        self.source: Source | None = None

    def collect(self, weights: TensorDictBase | None) -> Answer:
        """Load ``weights`` into the policy, if there are any, and collect a batch."""
        try:
            if self.source is None:
                plan = pickle.loads(self.plan)
                torch.set_num_threads(plan.num_threads)
                self.source = Source(plan, self.actor, self.seed)
            if weights is not None:
                self.source.load_weights(weights)
            return Answer(self.source.next(), self.location)
        except Exception:
            return Answer(None, self.location, traceback.format_exc())


def dumps(plan: Plan) -> bytes:
    """Pickle a plan with its functions and modules; tensors on other devices arrive on the CPU."""
    file = io.BytesIO()
    _CpuPickler(file).dump(plan)
    return file.getvalue()


class _CpuPickler(cloudpickle.Pickler):
    """Replaces devices by the CPU: an actor has no access to the GPU of the learner."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.device) and obj.type != "cpu":
            return torch.device, ("cpu",)
        if isinstance(obj, Tensor) and obj.device.type != "cpu":
            moved = obj.detach().cpu()
            if isinstance(obj, nn.Parameter):
                return nn.Parameter, (moved, obj.requires_grad)
            return moved.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        return super().reducer_override(obj)
