"""Convolutions of one, two and three spatial dimensions, and the block that most networks are made of."""

import math
from collections.abc import Mapping
from types import MappingProxyType

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

CONVOLUTIONS: Mapping[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = MappingProxyType(
    {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
)
UP_CONVOLUTIONS: Mapping[int, type[nn.ConvTranspose2d | nn.ConvTranspose3d]] = MappingProxyType(
    {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
)
BATCH_NORMS: Mapping[int, type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = MappingProxyType(
    {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
)
MAX_POOLS: Mapping[int, type[nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d]] = MappingProxyType(
    {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
)


def conv_norm_relu(in_channels: int, out_channels: int, *, num_dimensions: int = 2, stride: int = 1) -> list[nn.Module]:
    """Return convolution, batch norm and ReLU: (N, in_channels, *) to (N, out_channels, *), each size ⌈size / stride⌉.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        num_dimensions: spatial ones; the window has 3 cells along each.
        stride: along each.
    """
    return [
        # The norm's β makes a bias before it redundant.
        CONVOLUTIONS[num_dimensions](in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        BATCH_NORMS[num_dimensions](out_channels),
        nn.ReLU(inplace=True),
    ]


def initialize_for_relu(model: nn.Module) -> None:
    """Draw the weights of all convolutions from N(0, 2 / n), where n values enter each output (He et al. 2015, eq. 10).

    Biases become zero.
    """
    for layer in model.modules():
        if not isinstance(layer, _ConvNd):
            continue
        num_inputs = layer.in_channels * math.prod(layer.kernel_size)
        if isinstance(layer, _ConvTransposeNd):
            # Windows overlap as often as the stride goes into them.
            num_inputs //= math.prod(layer.stride)
        nn.init.normal_(layer.weight, std=math.sqrt(2 / num_inputs))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
