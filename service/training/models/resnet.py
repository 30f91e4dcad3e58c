"""The residual networks for ImageNet."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn

STAGE_CHANNELS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut (He et al. 2016, figure 5 left).

    Args:
        in_channels: of the input.
        channels: of both convolutions.
        stride: of the first.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _downsample(in_channels, channels, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm before the sum."""
        return self.bn2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Add what the block computes to its input, (N, in_channels, H, W) to (N, channels, H', W')."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.bn2(self.conv2(features))
        shortcut = images if self.downsample is None else self.downsample(images)
        result: torch.Tensor = self.relu(features + shortcut)
        return result


class Bottleneck(nn.Module):
    """A 1 × 1, a 3 × 3 and a 1 × 1 convolution and a shortcut (He et al. 2016, figure 5 right).

    The 3 × 3 convolution has the stride, not the first, as in torchvision's networks.

    Args:
        in_channels: of the input.
        channels: of the 3 × 3 convolution; the output has four times as many.
        stride: of the 3 × 3 convolution.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(in_channels, channels * self.expansion, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm before the sum."""
        return self.bn3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Add what the block computes to its input, (N, in_channels, H, W) to (N, 4 · channels, H', W')."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.relu(self.bn2(self.conv2(features)))
        features = self.bn3(self.conv3(features))
        shortcut = images if self.downsample is None else self.downsample(images)
        result: torch.Tensor = self.relu(features + shortcut)
        return result


class ResNet(nn.Module):
    """A residual network of four stages (He et al. 2016, table 1), whose weights are named as torchvision's.

    Convolutions are drawn from N(0, 2 / n), n values being reached by each input (He et al. 2015, eq. 14).

    Args:
        block: what the stages are made of.
        blocks_per_stage: how many.
        in_channels: C of the images.
        num_outputs: width of the output.
        stem: ``imagenet``: a 7 × 7 convolution and pooling, which quarter height and width; ``cifar``: a 3 × 3
            convolution, for small images.
        zero_init_residual: start with the last γ of each block at zero, so that every block begins as its shortcut
            (Goyal et al. 2017, section 5.1).
    """

    def __init__(
        self,
        *,
        block: type[BasicBlock | Bottleneck],
        blocks_per_stage: Sequence[int],
        in_channels: int,
        num_outputs: int,
        stem: Literal["imagenet", "cifar"],
        zero_init_residual: bool,
    ) -> None:
        super().__init__()
        channels = STAGE_CHANNELS[0]
        self.maxpool: nn.Module
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = _conv3x3(in_channels, channels, 1)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        stages = []
        for stage, num_blocks in enumerate(blocks_per_stage):
            blocks = []
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, STAGE_CHANNELS[stage], stride))
                channels = STAGE_CHANNELS[stage] * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(channels, num_outputs)

        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for layer in self.modules():
                if isinstance(layer, BasicBlock | Bottleneck):
                    nn.init.zeros_(layer.last_norm.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify images, (N, C, H, W) to (N, num_outputs)."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))  # (N, channels, H', W')
        outputs: torch.Tensor = self.fc(features.mean(dim=(2, 3)))
        return outputs


LAYOUTS: Mapping[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = MappingProxyType(
    {
        "resnet18": (BasicBlock, (2, 2, 2, 2)),
        "resnet34": (BasicBlock, (3, 4, 6, 3)),
        "resnet50": (Bottleneck, (3, 4, 6, 3)),
    }
)
"""Blocks of the networks of He et al. 2016, table 1."""


def _conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return the shortcut where shapes differ (option B)."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )
