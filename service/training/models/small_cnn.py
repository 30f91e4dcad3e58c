"""A plain convolutional network for small inputs."""

from collections.abc import Sequence

import torch
from torch import nn

from service.training.models.convolutions import MAX_POOLS, conv_norm_relu, initialize_for_relu


class SmallCnn(nn.Module):
    """Convolution → BatchNorm → ReLU stages with max pooling between them, then the mean over space and a linear layer.

    Weights are initialized as in He et al. 2015, equation 10; the linear layer as torch does.

    Args:
        in_channels: C of the inputs.
        num_dimensions: spatial ones: 1, 2 or 3.
        num_outputs: width of the output.
        channels: of each stage; between two, every size is halved and rounded up.
        dropout: probability with which a feature is dropped before the linear layer.
    """

    def __init__(
        self, *, in_channels: int, num_dimensions: int, num_outputs: int, channels: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size = in_channels
        for stage, num_channels in enumerate(channels):
            if stage:
                # Rounding up leaves at least one cell, however small the input is.
                layers.append(MAX_POOLS[num_dimensions](2, ceil_mode=True))
            layers += conv_norm_relu(size, num_channels, num_dimensions=num_dimensions)
            size = num_channels
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(size, num_outputs)
        initialize_for_relu(self)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Classify inputs, (N, C, *) to (N, num_outputs)."""
        features = self.features(inputs).flatten(start_dim=2).mean(dim=2)  # (N, channels)
        outputs: torch.Tensor = self.classifier(self.dropout(features))
        return outputs
