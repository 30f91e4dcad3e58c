"""In which floating-point format a job computes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["float64", "float32", "bfloat16", "float16"]
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def parameter_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of weights and inputs."""
    return torch.float64 if precision == "float64" else torch.float32


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context for forward passes: autocast where that is the precision."""
    dtype = _AUTOCAST.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
