"""What transforms of batches of sequences share."""

from __future__ import annotations

from typing import Any

from torchrl.envs import EnvBase, Transform


class BatchTransform(Transform):
    """A transform of batches of sequences; an environment, which has one step at a time, has none.

    Abstract: a transform says in ``_purpose`` what it is for instead.
    """

    _purpose: str

    @property
    def _in_buffer(self) -> bool:
        """Whether a replay buffer runs it, which keeps its transforms in a Compose in eval mode."""
        return self.__dict__["_container"] is not None and not self.training

    def set_container(self, container: Any) -> None:
        """Refuse environments: a single step has nothing to cut, nor a next view to run.

        Raises:
            RuntimeError: if it is appended to an environment.
        """
        super().set_container(container)
        # Not self.container, which raises for a Compose that belongs to no environment.
        while isinstance(container, Transform):
            outer = container.__dict__["_container"]
            container = None if outer is None else outer()
        if isinstance(container, EnvBase):
            name = type(self).__name__
            raise RuntimeError(f"{name} is no transform of an environment: {self._purpose}")
