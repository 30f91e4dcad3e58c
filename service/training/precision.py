"""In which floating-point format a job computes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch


def parameter_dtype(precision: Literal["float64", "float32", "bfloat16"]) -> torch.dtype:
    """Return the dtype of weights and inputs."""
    return torch.float64 if precision == "float64" else torch.float32


def autocast(
    precision: Literal["float64", "float32", "bfloat16"], device: torch.device
) -> AbstractContextManager[object]:
    """Return the context for forward passes: autocast where that is the precision."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
