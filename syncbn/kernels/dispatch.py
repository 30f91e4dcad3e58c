from typing import Protocol

import torch

from syncbn.kernels import eager
from syncbn.moments import Affine, InputGradient, Moments


class Backend(Protocol):
    """The four passes over a batch; a module of this package with these functions is a backend.

    x, dy and what is returned have shape (N, C, *), any strides, and may hold no samples.
    """

    def moments(self, x: torch.Tensor) -> Moments:
        """Moments of each channel over this rank's samples."""
        ...

    def normalize(self, x: torch.Tensor, affine: Affine) -> torch.Tensor:
        """y, in the dtype and memory format of x."""
        ...

    def gradient_sums(self, dy: torch.Tensor, x: torch.Tensor, pivot: torch.Tensor) -> torch.Tensor:
        """`[Σdy, Σdy·(x − pivot)]` over this rank's samples, shape (2, C), float64."""
        ...

    def input_gradient(self, dy: torch.Tensor, x: torch.Tensor, coefficients: InputGradient) -> torch.Tensor:
        """dx, in the dtype and memory format of x."""
        ...


def backend_for(input: torch.Tensor) -> Backend:
    """The fastest backend that takes this tensor."""
    return eager
