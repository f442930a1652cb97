"""The base of transforms that take batches of sequences."""

from __future__ import annotations

from typing import Any

from torchrl.envs import Transform


class SequenceTransform(Transform):
    """Abstract transform of batches of sequences, for replay buffers and collectors.

    An environment produces one time step at a time, so that it cannot run such a transform.

    Attributes:
        usage: how to use the transform instead, for the error.
    """

    usage: str

    def __init__(self) -> None:
        super().__init__()
        self._has_container = False

    def set_container(self, container: Any) -> None:
        """Remember that the transform belongs to a container, and reject environments.

        Raises:
            RuntimeError: if the transform is appended to an environment.
        """
        super().set_container(container)
        self._has_container = container is not None
        if self.parent is not None:
            raise RuntimeError(
                f"{type(self).__name__} cannot be appended to an environment, which has one time "
                f"step at a time. {self.usage}"
            )

    @property
    def is_in_buffer(self) -> bool:
        """Whether a replay buffer runs the transform: its transforms are in evaluation mode."""
        return self._has_container and not self.training
