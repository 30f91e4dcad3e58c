"""Networks that label every pixel of an image or every voxel of a volume."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from service.training.models.convolutions import (
    CONVOLUTIONS,
    MAX_POOLS,
    UP_CONVOLUTIONS,
    conv_norm_relu,
    initialize_for_relu,
)


class Unet(nn.Module):
    """A U-Net: resolution is halved level by level, then restored with the help of each level's features.

    Each level has two blocks of convolution → BatchNorm → ReLU. Convolutions are padded, so that the output is as large
    as the input. An odd size is halved rounding down; on the way up, the last row, which has no counterpart below, is
    filled with zeros before the skip connection joins it. Weights are drawn from N(0, 2 / n) for n values that enter
    each output (Ronneberger et al. 2015, section 3).

    Args:
        num_dimensions: spatial ones, 2 or 3.
        in_channels: C of the inputs.
        num_outputs: channels of the output.
        level_channels: of the two convolutions of each level, finest first; the way up has the second number.
        halve_when_up: whether an up-convolution halves the channels.
    """

    def __init__(
        self,
        *,
        num_dimensions: int,
        in_channels: int,
        num_outputs: int,
        level_channels: Sequence[tuple[int, int]],
        halve_when_up: bool,
    ) -> None:
        super().__init__()
        self.pool = MAX_POOLS[num_dimensions](2)
        self.down = nn.ModuleList()
        channels = in_channels
        for level in level_channels:
            self.down.append(_double_block(channels, *level, num_dimensions))
            channels = level[1]
        self.up_convolutions = nn.ModuleList()
        self.up = nn.ModuleList()
        for _, level_width in reversed(level_channels[:-1]):
            up_channels = channels // 2 if halve_when_up else channels
            self.up_convolutions.append(UP_CONVOLUTIONS[num_dimensions](channels, up_channels, 2, stride=2, bias=False))
            self.up.append(_double_block(up_channels + level_width, level_width, level_width, num_dimensions))
            channels = level_width
        self.head = CONVOLUTIONS[num_dimensions](channels, num_outputs, 1)
        initialize_for_relu(self)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Label inputs, (N, C, *spatial) to (N, num_outputs, *spatial)."""
        skips = []
        features = inputs
        for level, block in enumerate(self.down):
            features = block(self.pool(features) if level else features)
            skips.append(features)
        skips.pop()  # the coarsest level's, which goes up as it is
        for up_convolution, block in zip(self.up_convolutions, self.up, strict=True):
            skip = skips.pop()
            features = _grow_to(up_convolution(features), skip)
            features = block(torch.cat([skip, features], dim=1))
        outputs: torch.Tensor = self.head(features)
        return outputs


def unet(*, in_channels: int, num_outputs: int, depth: int, width: int) -> Unet:
    """Return the network of Ronneberger et al. 2015 (figure 1: depth 4, width 64), with batch norm.

    Args:
        in_channels: C of the images.
        num_outputs: channels of the output.
        depth: how often the resolution is halved.
        width: channels of the finest level, doubled at each next.
    """
    return Unet(
        num_dimensions=2,
        in_channels=in_channels,
        num_outputs=num_outputs,
        level_channels=[(width * 2**level, width * 2**level) for level in range(depth + 1)],
        halve_when_up=True,
    )


def unet3d(*, in_channels: int, num_outputs: int, depth: int, width: int) -> Unet:
    """Return the network of Çiçek et al. 2016 (figure 2: depth 3, width 32).

    Channels are doubled before each halving of the resolution, and not reduced by the up-convolutions.

    Args:
        in_channels: C of the volumes.
        num_outputs: channels of the output.
        depth: how often the resolution is halved.
        width: channels of the first convolution.
    """
    return Unet(
        num_dimensions=3,
        in_channels=in_channels,
        num_outputs=num_outputs,
        level_channels=[(width * 2**level, width * 2 ** (level + 1)) for level in range(depth + 1)],
        halve_when_up=False,
    )


def _double_block(in_channels: int, first: int, second: int, num_dimensions: int) -> nn.Sequential:
    return nn.Sequential(
        *conv_norm_relu(in_channels, first, num_dimensions=num_dimensions),
        *conv_norm_relu(first, second, num_dimensions=num_dimensions),
    )


def _grow_to(features: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """Append zeros along every spatial dimension until it is as long as the skip connection's."""
    padding: list[int] = []
    for dimension in range(skip.dim() - 1, 1, -1):  # pad() counts from the last
        padding += [0, skip.shape[dimension] - features.shape[dimension]]
    return F.pad(features, padding) if any(padding) else features
