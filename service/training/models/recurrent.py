"""A recurrent network for sequences."""

from typing import Literal

import torch
from torch import nn


class Recurrent(nn.Module):
    """Recurrent layers, each followed by batch norm over time and batch, then a linear layer on one state.

    Statistics are those of all N · T vectors of a layer, for each feature: what goes up the layers is normalized, what
    goes along time is not (Laurent et al. 2016). Input weights are initialized as in
    Glorot & Bengio 2010, recurrent ones orthogonal gate by gate (Saxe et al. 2014), and the forget gates of an LSTM
    begin open (bias 1; Jozefowicz et al. 2015).

    Args:
        in_channels: C of the sequences.
        num_outputs: width of the output.
        cell: ``lstm`` or ``gru``.
        hidden_size: width of a layer's state, in each direction.
        num_layers: how many.
        bidirectional: whether each layer also runs backward in time.
        pooling: what the linear layer sees: ``last``, the state at the end (of the backward direction: at the start);
            ``mean``, the mean over time.
        dropout: probability with which a feature is dropped after each layer's norm.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_outputs: int,
        cell: Literal["lstm", "gru"],
        hidden_size: int,
        num_layers: int,
        bidirectional: bool,
        pooling: Literal["last", "mean"],
        dropout: float,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.norms = nn.ModuleList()
        layer_type = nn.LSTM if cell == "lstm" else nn.GRU
        size = in_channels
        for _ in range(num_layers):
            layer = layer_type(size, hidden_size, batch_first=True, bidirectional=bidirectional)
            _initialize(layer)
            self.layers.append(layer)
            size = hidden_size * (2 if bidirectional else 1)
            self.norms.append(nn.BatchNorm1d(size))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(size, num_outputs)
        self.hidden_size = hidden_size
        self.pooling = pooling

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """Classify sequences, (N, C, T) to (N, num_outputs)."""
        features = sequences
        for layer, norm in zip(self.layers, self.norms, strict=True):
            states, _ = layer(features.transpose(1, 2))  # (N, T, features)
            features = self.dropout(norm(states.transpose(1, 2)))  # (N, features, T)
        if self.pooling == "mean":
            pooled = features.mean(dim=2)
        else:
            # The backward direction, where there is one, has seen the whole sequence at its start.
            pooled = torch.cat([features[:, : self.hidden_size, -1], features[:, self.hidden_size :, 0]], dim=1)
        outputs: torch.Tensor = self.classifier(pooled)
        return outputs


def _initialize(layer: nn.LSTM | nn.GRU) -> None:
    num_gates = 4 if isinstance(layer, nn.LSTM) else 3
    for name, parameter in layer.named_parameters():
        if name.startswith("weight_ih"):
            for gate in parameter.chunk(num_gates):
                nn.init.xavier_uniform_(gate)
        elif name.startswith("weight_hh"):
            for gate in parameter.chunk(num_gates):
                nn.init.orthogonal_(gate)
        else:
            nn.init.zeros_(parameter)
            if isinstance(layer, nn.LSTM) and name.startswith("bias_ih"):
                nn.init.ones_(parameter.chunk(4)[1])  # torch's order: input, forget, cell, output
