"""A network that finds objects in images."""

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from service.training.models.convolutions import conv_norm_relu, initialize_for_relu

PRIOR = 0.01


class Detector(nn.Module):
    """A one-stage detector without anchors, of one resolution (after FCOS, Tian et al. 2019).

    Cell (y, x) of the output stands for the point ((x + 0.5) · stride, (y + 0.5) · stride) of the image, in pixels from
    its upper left corner. Of each cell, ``scores`` are the logits of the classes, each a sigmoid of its own and none
    for the background; ``boxes`` are the distances, in pixels and positive, from that point to the left, top, right
    and bottom side of the box, in this order.

    Convolutions are initialized as in He et al. 2015, equation 10, the last one of each head with σ = 0.01, and the
    bias of the scores so that every cell begins at probability 0.01 (Lin et al. 2017, sections 3.3 and 4.1).

    Args:
        in_channels: C of the images.
        num_outputs: classes to find, K.
        stride: pixels of the image per cell.
        width: channels after the first halving, doubled at each next.
        num_blocks: residual blocks at the final resolution.
        head_depth: convolutions of each head before its last.

    Attributes:
        stride: pixels of the image per cell.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_outputs: int,
        stride: Literal[4, 8],
        width: int,
        num_blocks: int,
        head_depth: int,
    ) -> None:
        super().__init__()
        self.stride = stride
        layers: list[nn.Module] = []
        channels = in_channels
        for halving in range(int(math.log2(stride))):
            layers += conv_norm_relu(channels, width * 2**halving, stride=2)
            channels = width * 2**halving
            layers += conv_norm_relu(channels, channels)
        layers += [_ResidualBlock(channels) for _ in range(num_blocks)]
        self.backbone = nn.Sequential(*layers)
        self.score_head = _head(channels, num_outputs, depth=head_depth)
        self.box_head = _head(channels, 4, depth=head_depth)

        initialize_for_relu(self)
        for head, bias in ((self.score_head, -math.log((1 - PRIOR) / PRIOR)), (self.box_head, 0.0)):
            last = head[-1]
            assert isinstance(last, nn.Conv2d)
            assert last.bias is not None
            nn.init.normal_(last.weight, std=0.01)
            nn.init.constant_(last.bias, bias)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Find objects in images, (N, C, H, W).

        Returns:
            ``scores``, (N, K, H', W'), and ``boxes``, (N, 4, H', W'), where H' = ⌈H / stride⌉ and W' = ⌈W / stride⌉.
        """
        features = self.backbone(images)  # (N, channels, H', W')
        # Distances in strides begin near log 2; softplus, unlike exp, cannot overflow half precision.
        distances = F.softplus(self.box_head(features)) * self.stride
        return {"scores": self.score_head(features), "boxes": distances}


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(*conv_norm_relu(channels, channels), *conv_norm_relu(channels, channels)[:-1])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.relu(features + self.residual(features))


def _head(channels: int, num_outputs: int, *, depth: int) -> nn.Sequential:
    layers = [layer for _ in range(depth) for layer in conv_norm_relu(channels, channels)]
    return nn.Sequential(*layers, nn.Conv2d(channels, num_outputs, 3, padding=1))
