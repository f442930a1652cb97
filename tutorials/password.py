"""A door that opens to a password in parts: an environment for agents that must remember together.

At first each agent is told one word of the password, which no other agent hears. A while later, at
a time that none of them knows before, all are asked at once, and the door opens if each says its
word: the reward is 1, for all of them, or 0. A word said right beside a wrong one earns nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn.functional import one_hot
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

WAIT = (2, 5)
"""How many steps after their words were told all are asked, at least and at most."""


class Password(EnvBase):
    """Many such doors, stepped together.

    Agents see float32 ``[num_envs, agents, words + 1]``: the word told, zeros from the second step
    on, and whether they are asked. ``"state"``, ``[num_envs, agents * words + 1]``, has the whole
    password all the time: a mixer may read it while agents learn, and none of them does.

    Args:
        num_envs: how many doors.
        agents: who are told a word each.
        words: that there are; one that guesses opens the door with chance ``words ** -agents``.
        device: where the data is.
    """

    def __init__(
        self, num_envs: int, agents: int = 3, words: int = 2, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))
        batch, group = self.batch_size, torch.Size([num_envs, agents])
        seen = Unbounded(torch.Size([*group, words + 1]), device=device)
        state = Unbounded(torch.Size([*batch, agents * words + 1]), device=device)
        told = Composite(observation=seen, shape=group)
        says = Composite(action=Categorical(words, group, device=device), shape=group)
        self.observation_spec = Composite(agents=told, state=state, shape=batch)
        self.action_spec = Composite(agents=says, shape=batch)
        self.reward_spec = Unbounded(torch.Size([*batch, 1]), device=device)
        self.password = torch.zeros(group, dtype=torch.long, device=device)
        self.wait = torch.zeros(*batch, 1, dtype=torch.long, device=device)
        self.words, self.draws = words, torch.Generator(device)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        which = None if tensordict is None else tensordict.get("_reset", None)
        new = torch.ones_like(self.wait).bool() if which is None else which
        for held, low, high in ((self.password, 0, self.words - 1), (self.wait, *WAIT)):
            draw = torch.randint(
                low, high + 1, held.shape, generator=self.draws, device=self.device
            )
            held.copy_(torch.where(new, draw, held))
        return self._observe(new)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        asked = self.wait == 0
        opened = (tensordict["agents", "action"] == self.password).all(-1, keepdim=True)
        self.wait -= 1
        out = self._observe(torch.zeros_like(asked))
        return out.update({"reward": (asked & opened).float(), "done": asked, "terminated": asked})

    def _observe(self, told: Tensor) -> TensorDict:
        word = one_hot(self.password, self.words).float()
        asked = (self.wait == 0).float()
        heard = torch.cat(
            [word * told.unsqueeze(-1), asked.unsqueeze(1).expand(*word.shape[:2], 1)], -1
        )
        agents = TensorDict({"observation": heard}, word.shape[:2])
        state = torch.cat([word.flatten(1), asked], -1)
        return TensorDict({"agents": agents, "state": state}, self.batch_size, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        self.draws.manual_seed(seed or 0)
