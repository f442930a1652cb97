"""The network between rendered frames and a memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.modules import ConvNet


class Ink(nn.Module):
    def forward(self, frame: Tensor) -> Tensor:
        return 1 - frame.float() / 255


def make_eye(observation: TensorSpec) -> tuple[nn.Module | None, int]:
    """Make the network in front of the memory, if there is one; return the size of its output.

    The scene is dark lines on white: as ink, ``1 - grey / 255``, most of it is zero.
    """
    if observation.dtype != torch.uint8:
        return None, observation.shape[-1]
    conv = ConvNet(
        in_features=1,
        num_cells=[16, 32, 32],
        kernel_sizes=[8, 4, 3],
        strides=[4, 2, 1],
        activation_class=nn.ReLU,
        aggregator_class=nn.AdaptiveAvgPool2d,
        aggregator_kwargs={"output_size": (4, 7)},
    )
    return nn.Sequential(Ink(), conv, nn.Flatten(-3)), 32 * 4 * 7
