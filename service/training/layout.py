"""Where the values of samples and weights lie: on which device, as which dtype, in which order."""

from dataclasses import replace

import torch
from torch import nn

from service.domain.spec import JobSpec
from service.training.data import Batch
from service.training.precision import parameter_dtype


def memory_format(spec: JobSpec, num_dimensions: int) -> torch.memory_format:
    """Return the format of a model's inputs.

    Args:
        spec: the job.
        num_dimensions: of a batch of inputs, (N, C, *).
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return formats.get(num_dimensions, torch.contiguous_format) if spec.channels_last else torch.contiguous_format


def to_format(model: nn.Module, format_: torch.memory_format) -> nn.Module:
    """Lay a model's weights out as its inputs are; values and names stay."""
    return model if format_ is torch.contiguous_format else model.to(memory_format=format_)  # type: ignore[call-overload]


def on_device(batch: Batch, spec: JobSpec, device: torch.device) -> Batch:
    """Return a batch on a device, in the job's dtype and memory format."""
    moved = batch.to(device, parameter_dtype(spec.precision))
    return replace(moved, inputs=moved.inputs.contiguous(memory_format=memory_format(spec, moved.inputs.ndim)))
