"""A fully connected network."""

from collections.abc import Sequence

from torch import nn


class Mlp(nn.Sequential):
    """Linear → BatchNorm → ReLU blocks, then a linear layer: (N, *) to (N, num_outputs).

    Args:
        in_features: values of a sample.
        num_outputs: width of the output.
        hidden_sizes: width of each block.
        dropout: probability with which an activation is dropped after each block.
    """

    def __init__(self, *, in_features: int, num_outputs: int, hidden_sizes: Sequence[int], dropout: float) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        size = in_features
        for hidden_size in hidden_sizes:
            # The norm's β makes a bias before it redundant.
            layers += [nn.Linear(size, hidden_size, bias=False), nn.BatchNorm1d(hidden_size), nn.ReLU(inplace=True)]
            if dropout:
                layers.append(nn.Dropout(dropout))
            size = hidden_size
        super().__init__(*layers, nn.Linear(size, num_outputs))
