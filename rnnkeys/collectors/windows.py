"""Windows of episodes that several actors collect."""

from __future__ import annotations

from functools import partial
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import Transform

from ..transforms import Windows
from ..transforms.windows import EPISODE_KEY
from .base import ACTOR_KEY

_MAX_ACTORS = 2**16


class ActorWindows(Transform):
    """``Windows`` of a replay buffer that several actors fill.

    The rest of an episode waits for the next batch of the same actor, in whatever order batches
    arrive. Where an actor was restarted, its first steps start new episodes.

    Args:
        *args: of :class:`rnnkeys.transforms.Windows`.
        **kwargs: of :class:`rnnkeys.transforms.Windows`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self._make = partial(Windows, *args, **kwargs)
        self._layout = self._make()
        self._of_actor: dict[int, Windows] = {}
        self._first_episode = 0

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Lay out a sample of stored windows as ``[N, L]``."""
        return self._layout.lay_out(tensordict)

    def _inv_call(self, tensordict: TensorDictBase) -> Any:
        stored = self.cut(tensordict)
        # A replay buffer takes None for nothing to store.
        return stored if stored.shape[0] else None

    def cut(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Cut a batch ``[num_envs, T]`` of one actor into windows ``[N]`` as they are stored.

        Raises:
            KeyError: if ``("collector", "actor")`` is missing.
            ValueError: if the batch has steps of more than one actor.
        """
        actor = _read_actor(tensordict)
        if actor not in self._of_actor:
            self._of_actor[actor] = self._make()
            self._of_actor[actor].set_extra_state({"episodes": self._first_episode})
        stored = self._of_actor[actor].cut(tensordict)
        # Each Windows numbers its own episodes; in a buffer their numbers must differ.
        stored[EPISODE_KEY] = stored[EPISODE_KEY] * _MAX_ACTORS + actor
        return stored

    def number_after(self, episodes: Tensor) -> None:
        """Give new episodes larger numbers than those of a buffer that was loaded."""
        self._first_episode = int(episodes.max()) // _MAX_ACTORS

    @property
    def waiting(self) -> int:
        """Number of steps that wait for the batch that continues them."""
        return sum(windows.waiting for windows in self._of_actor.values())


def _read_actor(batch: TensorDictBase) -> int:
    actors = batch.get(ACTOR_KEY, None)
    if actors is None:
        raise KeyError(
            f"There is no {ACTOR_KEY!r}, which says whose episodes this batch continues: keep it "
            "when you select entries of a collected batch."
        )
    distinct = actors.unique().tolist()
    if len(distinct) != 1:
        raise ValueError(
            f"A batch must be of one actor. Got steps of actors {distinct}: pass the batches of "
            "actors one by one."
        )
    return distinct[0]
