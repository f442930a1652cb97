"""Encoders without a notion of time, such as ``nn.Conv2d``, in front of recurrent modules."""

from __future__ import annotations

from torch import Tensor, nn

from ..checks import as_int


class TimeDistributed(nn.Module):
    """Run an encoder on every time step of a batch of sequences.

    Collectors call a policy with observations ``[B, ...]`` or ``[...]``, and losses with ``[B, T,
    ...]``. An encoder such as ``nn.Conv2d`` or ``nn.Flatten`` takes one batch dimension. This
    module folds all leading dimensions into one, and unfolds the encoder's output.

    Args:
        module: the encoder; it maps ``[N, *observation]`` to ``[N, *features]``.
        observation_ndim: number of dimensions of one observation, such as 3 for frames ``(C, H,
            W)``.

    Examples:
        >>> import torch
        >>> encoder = TimeDistributed(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), 3)
        >>> encoder(torch.zeros(2, 7, 1, 12, 12)).shape, encoder(torch.zeros(1, 12, 12)).shape
        (torch.Size([2, 7, 400]), torch.Size([400]))
    """

    def __init__(self, module: nn.Module, observation_ndim: int) -> None:
        super().__init__()
        self.module = module
        self.observation_ndim = as_int("observation_ndim", observation_ndim, minimum=0)

    def forward(self, observation: Tensor) -> Tensor:
        """Encode every observation.

        Args:
            observation: ``[*batch, *observation]``.

        Returns:
            ``[*batch, *features]``.
        """
        split = observation.ndim - self.observation_ndim
        if split < 0:
            raise ValueError(
                f"TimeDistributed(observation_ndim={self.observation_ndim}) got an observation of "
                f"shape {tuple(observation.shape)}, which has fewer dimensions."
            )
        batch = observation.shape[:split]
        features = self.module(observation.reshape(batch.numel(), *observation.shape[split:]))
        return features.reshape(*batch, *features.shape[1:])

    def extra_repr(self) -> str:
        """Show the number of dimensions."""
        return f"observation_ndim={self.observation_ndim}"
