"""A residual network for small images."""

import torch
from torch import nn
from torch.nn import functional as F


class SmallResNet(nn.Module):
    """A residual network for small images (He et al. 2016, section 4.2).

    Every normalization layer costs two collectives a step, so it has those that learning needs: two in each block.
    Shortcuts are parameter-free (their option A), and the stem is a plain convolution.

    Args:
        in_channels: C of the images.
        num_outputs: width of the output.
        width: channels of the first stage, doubled at each next, where height and width are halved.
        blocks_per_stage: number of basic blocks in each stage.
    """

    def __init__(self, *, in_channels: int, num_outputs: int, width: int, blocks_per_stage: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(inplace=True))
        blocks: list[nn.Module] = []
        channels = width
        for stage, num_blocks in enumerate(blocks_per_stage):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_BasicBlock(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, num_outputs)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify images, (N, C, H, W) to (N, num_outputs)."""
        features = self.blocks(self.stem(images))  # (N, channels, H', W')
        logits: torch.Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = F.relu(self.norm1(self.conv1(images)), inplace=True)
        features = self.norm2(self.conv2(features))
        shortcut = images[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(features + shortcut)
