"""Starting kernels: on which device, and the memory that the programs of one launch meet in."""

from typing import Any

import torch
import triton.language as tl

from syncbn.kernels.triton.plan import NUM_WARPS
from syncbn.moments import compute_dtype

_MAX_BLOCKS = 1 << 14
_INTERPRETED_PROCESSORS = 2  # for tensors that are on no GPU: Triton's interpreter runs the programs one by one

_arrivals: dict[tuple[torch.device, int], torch.Tensor] = {}
_num_processors: dict[torch.device, int] = {}


# Multiply-adds may be fused: what has to come out alike in two kernels is written as one. Said, for defaults differ.
_OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}


def launch(kernel: Any, num_programs: int, on: torch.Tensor, *arguments: object) -> None:  # noqa: ANN401 - jitted
    """Starts a kernel on the current stream of a tensor's device.

    Args:
        kernel: The jitted function.
        num_programs: Size of the one-dimensional grid.
        on: Any tensor of that device.
        arguments: The kernel's, in their order.
    """
    if on.is_cuda and on.get_device() != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            kernel[(num_programs,)](*arguments, **_OPTIONS)
    else:
        kernel[(num_programs,)](*arguments, **_OPTIONS)


def arrivals(device: torch.device, num_blocks: int) -> torch.Tensor:
    """Counters at zero, shape (num_blocks,), int32, which a kernel leaves at zero again.

    One stream's launches follow each other, so they share one memory. A CUDA graph gets memory of its own, which it
    clears itself: it may be replayed beside anything.
    """
    if device.type != "cuda":
        return torch.zeros(num_blocks, dtype=torch.int32, device=device)
    if num_blocks > _MAX_BLOCKS or torch.cuda.is_current_stream_capturing():
        return torch.zeros(num_blocks, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    counters = _arrivals.get(key)
    if counters is None:
        counters = _arrivals[key] = torch.zeros(_MAX_BLOCKS, dtype=torch.int32, device=device)
    return counters


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    number = _num_processors.get(device)
    if number is None:
        number = _num_processors[device] = torch.cuda.get_device_properties(device).multi_processor_count
    return number


def compute_type(dtype: torch.dtype) -> Any:  # noqa: ANN401 - Triton's own kind of type
    """Triton's name of the precision that a batch is computed in."""
    return tl.float64 if compute_dtype(dtype) == torch.float64 else tl.float32
