"""A dataset, a model and a loss that the service has never seen: how large is the square?"""

import torch
from torch import nn


class Squares(torch.utils.data.Dataset):
    """Images (1, 16, 16) of one bright square each, and its side in pixels as the value to predict."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sides = torch.randint(3, 13, (count,), generator=generator)
        self.corners = (torch.rand(count, 2, generator=generator) * (16 - self.sides[:, None])).long()
        self.noise_seed = seed

    def __len__(self) -> int:
        return len(self.sides)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        side, (top, left) = int(self.sides[index]), self.corners[index].tolist()
        generator = torch.Generator().manual_seed(self.noise_seed * 1_000_003 + index)
        image = 0.3 * torch.randn(1, 16, 16, generator=generator)
        image[0, top : top + side, left : left + side] += 1.0
        return image, torch.tensor([side / 10.0])


def squares(count: int) -> tuple[Squares, Squares, int]:
    """Return samples to train on, samples to evaluate on, and how many values are predicted."""
    return Squares(count, seed=1), Squares(count // 4, seed=2), 1


def network(width: int, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return a small network; its batch norms become synchronized ones."""
    return nn.Sequential(
        nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(width * 64, num_outputs),
    )


class RelativeError:
    """A loss that adds up over samples: a sum, and what the sum over all ranks is divided by."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Compare predictions (N, 1) with sides (N, 1)."""
        return ((outputs - targets).abs() / targets).sum(), float(len(targets))

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, tuple[float, float]]:
        """Count the predictions that are right to the pixel."""
        right = ((outputs - targets).abs() < 0.05).sum()
        return {"to_the_pixel": (float(right), float(len(targets)))}


def relative_error() -> RelativeError:
    """Return the task."""
    return RelativeError()
