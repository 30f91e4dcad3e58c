"""The builtin models: what ``domain.catalog.MODELS`` names. Their normalization layers are plain ``torch.nn`` ones."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from service.domain.catalog import MlpArguments, SmallResNetArguments
from service.domain.spec import ModelSpec, NormSpec
from service.training.sampling import derive_seed
from syncbn import convert_sync_batchnorm


def build_model(spec: ModelSpec, *, input_shape: tuple[int, ...], num_classes: int, seed: int) -> nn.Module:
    """Build and initialize the model that a specification names, the same on every rank.

    Args:
        spec: names it.
        input_shape: of one sample, (C, *).
        num_classes: width of the output.
        seed: of the job.
    """
    torch.manual_seed(derive_seed(seed=seed, purpose="model"))
    return MODEL_BUILDERS[spec.factory](spec.args, input_shape, num_classes)


def configure_norm(model: nn.Module, norm: NormSpec) -> nn.Module:
    """Make a model's batch norms what the specification says, in place; names and values of its state stay."""
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            if norm.momentum is not None:
                layer.momentum = norm.momentum
            if norm.eps is not None:
                layer.eps = norm.eps
    return convert_sync_batchnorm(model, skip_nonfinite=norm.skip_nonfinite) if norm.kind == "sync" else model


def _mlp(arguments: Mapping[str, object], input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    size = torch.Size(input_shape).numel()
    for hidden_size in MlpArguments.model_validate(dict(arguments)).hidden_sizes:
        # The norm's β makes a bias before it redundant.
        layers += [nn.Linear(size, hidden_size, bias=False), nn.BatchNorm1d(hidden_size), nn.ReLU(inplace=True)]
        size = hidden_size
    return nn.Sequential(*layers, nn.Linear(size, num_classes))


def _small_resnet(arguments: Mapping[str, object], input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    options = SmallResNetArguments.model_validate(dict(arguments))
    return SmallResNet(
        in_channels=input_shape[0],
        num_classes=num_classes,
        width=options.width,
        blocks_per_stage=options.blocks_per_stage,
    )


MODEL_BUILDERS: Mapping[str, Callable[[Mapping[str, object], tuple[int, ...], int], nn.Module]] = MappingProxyType(
    {"builtin:mlp": _mlp, "builtin:small-resnet": _small_resnet}
)


class SmallResNet(nn.Module):
    """A residual network for small images (He et al. 2016, section 4.2).

    Every normalization layer costs two collectives a step, so it has those that learning needs: two in each block.
    Shortcuts are parameter-free (their option A), and the stem is a plain convolution.

    Args:
        in_channels: C of the images.
        num_classes: width of the output.
        width: channels of the first stage, doubled at each next, where height and width are halved.
        blocks_per_stage: number of basic blocks in each stage.
    """

    def __init__(self, *, in_channels: int, num_classes: int, width: int, blocks_per_stage: tuple[int, ...]) -> None:
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
        self.classifier = nn.Linear(channels, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify images, (N, C, H, W) to (N, num_classes)."""
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
